"""A run's server: started or found, given the policy's weights, ended with the run."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from alignlab.core import AlignlabError, ConfigError, RolloutContext
from alignlab.models import ModelSettings, PackedModel
from alignlab.models.quantization import plain_copy
from alignlab.rollout.settings import VllmSettings
from alignlab.rollout.vllm.client import Refused, ServerLost
from alignlab.rollout.vllm.server import BASE, Server, check_log_probs, start

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks of LoRA adapters that vLLM can be started for."""

TYPES = ("float32", "bfloat16", "float16")
"""Precisions that vLLM has."""


class VllmRun:
    """The server of a run, the same for all its processes; the main process starts, feeds and ends it.

    Args:
        context: of the run; its model's base is what the server is started with, its folder is for the log and,
            unless there is a `shared_dir`, for weights.
    """

    def __init__(self, settings: VllmSettings, context: RolloutContext) -> None:
        self.settings, model, folder = settings, context.model, context.folder
        self.is_main, self.gather, self._show = context.is_main, context.gather, context.show_progress
        self.by_adapter = _hot_loadable(model.network)
        self.name = f"alignlab-{hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:12]}"
        shared = settings.shared_dir
        self._weights = (Path(shared) / self.name if shared else folder / "vllm" / "weights").absolute()
        self._tokenizer = folder.absolute() / "vllm" / "tokenizer"
        self._salt, self._pushed = self.gather(uuid.uuid4().hex)[0], 0
        started: Server | None = None
        if settings.url is None and self.is_main:
            arguments = _served(model, context.model_settings, self._tokenizer, self.by_adapter)
            on_gpu = model.device.type == "cuda"
            started = start(settings, arguments, folder / "vllm" / "server.log", not self.by_adapter, on_gpu)
        url = settings.url or self.gather(started.url if started else "")[0]
        self.server = started or Server(url, settings.timeout)
        self.model_name = self.name if self.by_adapter else BASE
        self.background: Future[Any] | None = None

    @property
    def salt(self) -> str:
        """What keeps the server from reusing what it computed with earlier weights: one word for each push."""
        return f"{self._salt}-{self._pushed}"

    def ready(self) -> None:
        """Wait until the server answers, and see that it is one to work with. Called by all processes.

        Raises:
            ServerLost: it does not answer, or not in time.
            ConfigError: its version is not tested, or its log-probs are of another distribution.
        """
        base = BASE
        with self.agreed():
            if self.is_main:
                self.server.wait(self.settings.start_timeout, self._show)
                base = str(self.server.client.get("/v1/models")["data"][0]["id"])
                check_log_probs(self.server.client, base)
        if not self.by_adapter:
            self.model_name = self.gather(base)[0]

    def push(self, policy: PackedModel) -> None:
        """Give the server the policy's weights as they are now. Called by all processes.

        Raises:
            ServerLost: on every process, where the server is gone.
            ConfigError: it cannot take them.
        """
        if self.background is not None:  # what is being drawn is to come from one policy
            wait([self.background])
            self.background = None
        self.gather(None)
        with self.agreed():
            if self.is_main:
                self._push(policy)
        self._pushed += 1

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """Around what each process does by itself: where one fails, all raise. Called by all processes."""
        problem: AlignlabError | None = None
        try:
            yield
        except ServerLost as error:
            told = str(error)
            problem = error if told.startswith("rollout.vllm") else ServerLost(self._lost(error))
        except AlignlabError as error:
            problem = error
        found = self.gather(None if problem is None else (isinstance(problem, ServerLost), str(problem)))
        lost, told = next((f for f in found if f is not None), (False, ""))
        if lost:
            raise ServerLost(told) from problem
        if told:
            raise problem or AlignlabError(told)

    def _lost(self, error: ServerLost) -> str:
        return f"rollout.vllm: the server is lost: {self.server.explain(error)}"

    def close(self) -> None:
        """End the server, or leave somebody else's as it was."""
        if self.is_main and self.settings.url is not None and self.by_adapter and self._pushed:
            with contextlib.suppress(AlignlabError):
                self.server.client.post("/v1/unload_lora_adapter", {"lora_name": self.name})
        self.server.close()
        if self.is_main:
            for written in (self._weights, self._tokenizer):
                shutil.rmtree(written, ignore_errors=True)

    def __enter__(self) -> VllmRun:
        try:
            self.ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ weights

    def _push(self, policy: PackedModel) -> None:
        client = self.server.client
        try:
            _write(policy.network, self._weights, self.by_adapter)
        except OSError as error:
            raise AlignlabError(f"rollout.vllm: weights cannot be written to {self._weights}: {error}") from error
        try:
            if self.by_adapter:
                client.post(
                    "/v1/load_lora_adapter",
                    {"lora_name": self.name, "lora_path": str(self._weights), "load_inplace": True},
                )
            else:
                call = {"method": "reload_weights", "kwargs": {"weights_path": str(self._weights)}}
                client.post("/collective_rpc", call)
        except Refused as error:
            raise ConfigError(f"rollout.vllm.url={self.server.url}: {self._why_not(error)}") from error
        except ServerLost as error:
            if self.settings.url is None or self.by_adapter:
                raise
            raise ServerLost(f"{error}. Does it see {self._weights} (rollout.vllm.shared_dir)?") from error

    def _why_not(self, error: Refused) -> str:
        if "adapter found" in error.reason:
            return (
                f"the server does not see the folder {self._weights}: name one that is the same for both, "
                "rollout.vllm.shared_dir=DIR"
            )
        if error.code == 404:
            switches = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"
            needed = switches if self.by_adapter else "VLLM_SERVER_DEV_MODE=1"
            return f"the server cannot take new weights: start it with {needed}"
        return f"the server does not take the policy's weights: {error.reason}"


def _hot_loadable(network: Any) -> bool:
    """Whether vLLM can take the policy as an adapter on its base: plain LoRA."""
    config = getattr(network, "peft_config", {}).get("default")
    if config is None or str(getattr(config, "peft_type", "")).rpartition(".")[2] != "LORA":
        return False
    return not getattr(config, "use_dora", False) and not getattr(config, "modules_to_save", None)


def _served(model: PackedModel, settings: ModelSettings, tokenizer: Path, by_adapter: bool) -> list[str]:
    """Arguments of the server's command line that say what it serves."""
    network: Any = model.network
    config = getattr(network, "peft_config", {}).get("default")
    base = str(network.config.name_or_path if config is None else config.base_model_name_or_path)
    model.tokenizer.save_pretrained(tokenizer)
    kind = str(model.dtype).removeprefix("torch.")
    if kind not in TYPES:
        raise ConfigError(f"model.dtype={kind}: vLLM has {', '.join(TYPES)}")
    arguments = ["--model", base, "--tokenizer", str(tokenizer), "--dtype", kind]
    if settings.revision and not (Path(settings.path) / "adapter_config.json").exists():
        arguments += ["--revision", settings.revision]
    if settings.trust_remote_code:
        arguments.append("--trust-remote-code")
    if by_adapter and config is not None:
        rank = max([config.r, *(config.rank_pattern or {}).values()])
        fitting = [r for r in RANKS if r >= rank]
        if not fitting:
            raise ConfigError(f"adapter.r={rank}: vLLM takes adapters up to rank {RANKS[-1]}")
        arguments += ["--enable-lora", "--max-lora-rank", str(fitting[0])]
    return arguments


def _write(network: Any, folder: Path, by_adapter: bool) -> None:
    """The policy's weights, as vLLM reads them."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    os.makedirs(folder, exist_ok=True)
    if by_adapter:
        network.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
        return
    whole = plain_copy(network).merge_and_unload() if hasattr(network, "peft_config") else network
    whole.save_pretrained(folder)
