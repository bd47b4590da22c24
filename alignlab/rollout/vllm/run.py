"""A run's servers: started or found, given the policy's weights, put to sleep while it trains, ended with it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from alignlab.core import AlignlabError, ConfigError, RolloutContext
from alignlab.models import PackedModel, outline_of, private_api
from alignlab.models.base import load_tokenizer
from alignlab.rollout.settings import VllmSettings
from alignlab.rollout.vllm import weights
from alignlab.rollout.vllm.client import Refused, ServerLost
from alignlab.rollout.vllm.layout import ON_CPU, Replica, memory_share, own_place, replicas_of
from alignlab.rollout.vllm.server import BASE, Server, check_log_probs, start
from alignlab.rollout.vllm.transfer import Ipc, Nccl, Transfer, choose

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks of LoRA adapters that vLLM can be started for."""

TYPES = ("float32", "bfloat16", "float16")
"""Precisions that vLLM has."""


class VllmRun:
    """The servers of a run. All its processes make one and call its methods alike: each server is started, given
    weights and ended by one of them (`Replica.owner`), and asked by some (`Replica.users`).

    Args:
        context: of the run. Servers that share the trainer's GPU are started before its model is there.

    Attributes:
        by_adapter: whether servers have the policy as an adapter on its base; else whole.
        dtype: what they compute in, and what whole weights are sent in.
        level: how deep they sleep while the run trains; 0: not at all.
        way: how weights get to them: "disk", "ipc" or "nccl".
        owned: the servers that this process starts, with where they are.
        servers: those that this process draws from.
    """

    def __init__(self, settings: VllmSettings, context: RolloutContext) -> None:
        self.settings, self.context = settings, context
        self.is_main, self.gather = context.is_main, context.gather
        self.policy = outline_of(context.model_settings, context.adapter)
        self.by_adapter, self.dtype = self.policy.is_plain_lora, context.dtype or self.policy.dtype
        folder = context.folder.absolute()
        self.name = f"alignlab-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"
        shared = settings.shared_dir
        self._weights = Path(shared).absolute() / self.name if shared else folder / "vllm" / "weights"
        self._tokenizer = folder / "vllm" / f"tokenizer-{context.rank}"
        everyone = self.gather((uuid.uuid4().hex, own_place(torch.device(context.device))))
        self._salt, self._pushed = everyone[0][0], 0
        places = [place for _, place in everyone]
        theirs = Replica(0, (), (), tuple(range(len(places))))
        self.replicas = replicas_of(settings, places) if settings.url is None else [theirs]
        self.level = level_of(settings, self.replicas, self.by_adapter)
        self.model_name = self.name if self.by_adapter else BASE
        self.background: Future[Any] | None = None
        self.asleep = False
        self.owned: list[tuple[Replica, Server]] = []
        self.servers: list[Server] = []
        with self.agreed():
            chosen = choose(settings, self.replicas, self.by_adapter) if self.is_main else None
        self.way, self._why = self.gather(chosen)[0]
        try:
            with self.agreed():
                for number, replica in enumerate(self.replicas):
                    if replica.owner == context.rank:
                        self.owned.append((replica, self._server(number, replica)))
            urls = [url for each in self.gather([server.url for _, server in self.owned]) for url in each]
        except BaseException:
            self.close()
            raise
        mine = {server.url: server for _, server in self.owned}
        self.servers = [
            mine.get(url) or Server(url, settings.timeout)
            for replica, url in zip(sorted(self.replicas, key=lambda r: r.owner), urls, strict=True)
            if context.rank in replica.users
        ]
        kinds = {"ipc": Ipc, "nccl": Nccl}
        self.transfer: Transfer | None = kinds[self.way](self.owned, self.gather) if self.way in kinds else None

    def _server(self, number: int, replica: Replica) -> Server:
        """Start one of our servers, or find the one that is named."""
        settings = self.settings
        if settings.url is not None:
            return Server(settings.url, settings.timeout)
        arguments = [*self._served(), "--gpu-memory-utilization", str(self._share(replica))]
        environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
        if replica.devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(replica.devices)
            arguments += ["--tensor-parallel-size", str(len(replica.devices))]
        else:
            arguments.append("--enforce-eager")  # compiling takes longer on CPUs than it saves
        if self.level:
            arguments.append("--enable-sleep-mode")
        if self.way != "disk":
            arguments += ["--weight-transfer-config", json.dumps({"backend": self.way})]
        if self.way == "ipc":
            environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        if self.level or not self.by_adapter:
            environment["VLLM_SERVER_DEV_MODE"] = "1"
        log = f"server-{number}.log" if len(self.replicas) > 1 else "server.log"
        return start(settings, arguments, self.context.folder / "vllm" / log, environment)

    def _share(self, replica: Replica) -> float:
        if not replica.devices:
            return self.settings.memory or ON_CPU / sum(r.owner == replica.owner for r in self.replicas)
        memory = torch.cuda.mem_get_info(self.context.device) if replica.shares and not self.settings.memory else None
        return memory_share(self.settings, memory, self.context.held, self.level > 0)

    def _served(self) -> list[str]:
        """Arguments of a server's command line that say what it serves."""
        kind, adapter, model = str(self.dtype).removeprefix("torch."), self.policy.adapter, self.context.model_settings
        if kind not in TYPES:
            raise ConfigError(f"model.dtype={kind}: vLLM has {', '.join(TYPES)}")
        load_tokenizer(model).save_pretrained(self._tokenizer)
        arguments = ["--model", self.policy.base, "--tokenizer", str(self._tokenizer), "--dtype", kind]
        if self.policy.revision:
            arguments += ["--revision", self.policy.revision]
        if model.trust_remote_code:
            arguments.append("--trust-remote-code")
        if self.by_adapter:
            rank = max([adapter.r, *(adapter.rank_pattern or {}).values()])
            fitting = [r for r in RANKS if r >= rank]
            if not fitting:
                raise ConfigError(f"adapter.r={rank}: vLLM takes adapters up to rank {RANKS[-1]}")
            arguments += ["--enable-lora", "--max-lora-rank", str(fitting[0])]
        return arguments

    def describe(self) -> str:
        """The servers in one line, for a run's first lines."""
        if self.settings.url is not None:
            where = f"the server at {self.settings.url}"
        else:
            gpus = "; ".join(",".join(replica.devices) for replica in self.replicas)
            whose = "the trainer's GPUs" if any(replica.shares for replica in self.replicas) else "GPUs of their own"
            where = f"{len(self.replicas)} server(s) on {f'{whose} ({gpus})' if gpus.strip('; ') else 'the CPU'}"
        sleep = f"asleep at level {self.level} while training" if self.level else "awake while training"
        return f"{where}, {str(self.dtype).removeprefix('torch.')}, {sleep}, weights by {self.way} ({self._why})"

    # ------------------------------------------------------------------ together

    @property
    def salt(self) -> str:
        """What keeps a server from reusing what it computed with earlier weights: one word for each push."""
        return f"{self._salt}-{self._pushed}"

    def ready(self) -> None:
        """Wait until all servers answer, and see that they are ones to work with. Called by all processes.

        Raises:
            ServerLost: one does not answer, or not in time.
            ConfigError: its version is not tested, or its log-probs are of another distribution.
        """
        base = BASE
        with self.agreed():
            for _, server in self.owned:
                server.wait(self.settings.start_timeout, self.context.show_progress and self.is_main)
                base = str(server.client.get("/v1/models")["data"][0]["id"])
                check_log_probs(server.client, base)
        if not self.by_adapter:
            self.model_name = self.gather(base)[0]
        if self.is_main:
            print(f"note: rollout.vllm: {self.describe()}", file=sys.stderr)
        self.rest()

    def rest(self) -> None:
        """Have the servers let go of the GPU until the next weights come, where they are to. Called by all processes,
        once none of them draws any more."""
        if not self.level or self.asleep:
            return
        self.gather(None)
        with self.agreed():
            self._all(f"/sleep?level={self.level}")
        self.asleep = True

    def push(self, policy: PackedModel) -> None:
        """Give the servers the policy's weights as they are now, and wake them up for it. Called by all processes.

        Raises:
            ServerLost: on every process, where a server is gone.
            ConfigError: one cannot take them.
        """
        if self.background is not None:  # what is being drawn is to come from one policy
            wait([self.background])
            self.background = None
        if self.asleep and policy.device.type == "cuda":
            torch.cuda.empty_cache()  # what training no longer needs is the servers' now
        self.gather(None)
        if self.asleep:
            with self.agreed():
                self._all("/wake_up?tags=weights")
        if self.transfer is not None and private_api.renamed(policy.base):
            self.transfer, self.way, self._why = None, "disk", "the model's weights have other names in memory"
            if self.is_main:
                print(f"note: rollout.vllm: weights by {self.way} ({self._why})", file=sys.stderr)
        if self.transfer is not None:
            with self.agreed(), self._taking():
                self.transfer.send(policy, self.dtype)
        else:
            self._push_files(policy)
        if self.asleep:
            with self.agreed():
                self._all("/wake_up?tags=kv_cache")
        self.asleep = False
        self._pushed += 1

    def _push_files(self, policy: PackedModel) -> None:
        with self.agreed():
            try:
                weights.write(policy, self._weights, self.by_adapter, self.dtype, self.is_main)
            except OSError as error:
                raise AlignlabError(f"rollout.vllm: weights cannot be written to {self._weights}: {error}") from error
        adapter = {"lora_name": self.name, "lora_path": str(self._weights), "load_inplace": True}
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(self._weights)}}
        with self.agreed(), self._taking():
            if self.by_adapter:
                self._all("/v1/load_lora_adapter", adapter)
            else:
                self._all("/collective_rpc", reload)

    def _all(self, path: str, body: dict[str, Any] | None = None) -> None:
        for _, server in self.owned:
            server.client.post(path, body)

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
        """What is known of a server that did not answer: of the first of ours that has ended, where one has."""
        ours = [server for _, server in self.owned] or self.servers
        gone = [server for server in ours if server.process is not None and server.process.poll() is not None]
        return f"rollout.vllm: the server is lost: {[*gone, *ours][0].explain(error)}"

    @contextlib.contextmanager
    def _taking(self) -> Iterator[None]:
        """Around giving servers weights: what it means when one does not take them."""
        url = self.settings.url
        try:
            yield
        except Refused as error:
            of = f"rollout.vllm.url={url}" if url else "rollout.vllm"
            raise ConfigError(f"{of}: {self._why_not(error)}") from error
        except ServerLost as error:
            if url is None or self.by_adapter or self.transfer is not None:
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

    def close(self) -> None:
        """End the servers that are ours, or leave somebody else's as it was."""
        for _, server in self.owned:
            if self.settings.url is not None and self.by_adapter and self._pushed:
                with contextlib.suppress(AlignlabError):
                    server.client.post("/v1/unload_lora_adapter", {"lora_name": self.name})
        for server in {*self.servers, *(server for _, server in self.owned)}:
            server.close()
        if self.owned:
            shutil.rmtree(self._tokenizer, ignore_errors=True)
        if self.is_main:
            shutil.rmtree(self._weights, ignore_errors=True)

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


def level_of(settings: VllmSettings, replicas: list[Replica], by_adapter: bool) -> int:
    """How deep servers sleep while the run trains, by `rollout.vllm.sleep`.

    "auto" is 0 where they do not share the trainer's GPUs, or sample while it trains. Else it is 1 for an adapter: its
    base moves to the host's memory meanwhile. And it is 2 for whole weights, which are dropped: new ones come anyway.

    Raises:
        ConfigError: vLLM cannot sleep so.
    """
    shares = any(replica.shares for replica in replicas)
    if settings.sleep == "auto":
        return 0 if not shares or settings.asynchronous else 1 if by_adapter else 2
    if settings.sleep and not any(replica.devices for replica in replicas):
        raise ConfigError(f"rollout.vllm.sleep={settings.sleep}: vLLM sleeps on GPUs only, and there is none: use 0")
    if settings.sleep == 2 and by_adapter:
        raise ConfigError("rollout.vllm.sleep=2: drops the base, and an adapter does not bring it back: use 1")
    return settings.sleep
