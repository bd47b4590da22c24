"""The real processes of nodes: what they start with, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from alignlab.comparison.graph import local
from alignlab.comparison.graph.local import execute, is_free
from alignlab.comparison.graph.node import Command, Node

NO_GPU = """
import torch

def refuse(*_arguments, **_options):
    raise SystemExit("it asks for a GPU")

for name in dir(torch._C):
    if name.startswith("_cuda") and callable(getattr(torch._C, name)) and not isinstance(getattr(torch._C, name), type):
        setattr(torch._C, name, refuse)
for name in ("is_available", "device_count", "get_device_capability", "is_bf16_supported", "_lazy_init"):
    setattr(torch.cuda, name, refuse)
import alignlab.comparison.graph.preloaded
"""


def test_what_is_loaded_before_the_fork_asks_for_no_gpu() -> None:
    done = subprocess.run([sys.executable, "-c", NO_GPU], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A benchmark whose base model says what process made it, and then does as its file says."""
    (tmp_path / "deeds.py").write_text(
        textwrap.dedent(
            """
            import os, pathlib, signal, sys, time


            class Deeds:
                name = "deeds"

                def __init__(self, deed=""):
                    self.deed = deed

                def base_model(self):
                    here = pathlib.Path(sys.argv[2])
                    apart = os.getsid(0) == os.getpid()
                    print(sys.argv[1], apart, os.environ.get("MINE"), sys.stdin.read(), flush=True)
                    (here / "pid").write_text(str(os.getpid()))
                    exec(self.deed, {**globals(), "here": here})
                    return "none"

                def evaluate(self, subject):
                    return {}
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MINE", "yes")
    return "deeds.Deeds"


def node(out: Path, module: str, name: str, deed: str = "") -> Node:
    return Node(name, out / name, [Command("base", {"benchmark": {"_target_": module, "deed": deed}})])


def test_each_has_a_session_the_environment_and_a_log_of_its_own(tmp_path: Path, module: str) -> None:
    nodes = [
        node(tmp_path, module, "well"),
        node(tmp_path, module, "killed", "os.kill(os.getpid(), signal.SIGKILL)"),
        node(tmp_path, module, "left", "os._exit(3)"),
    ]
    failed = execute(nodes, workers=2, threads=1)
    assert (tmp_path / "well/log.txt").read_text() == "node True yes \nbase model: none\n"
    assert failed == {
        "killed": f"ended by SIGKILL (log: {tmp_path}/killed/log.txt)",
        "left": f"node True yes (log: {tmp_path}/left/log.txt)",
    }
    assert all(is_free(n.folder) for n in nodes)
    assert "alignlab.comparison.graph.preloaded" not in sys.modules


def test_it_is_told_when_the_executor_is_killed(tmp_path: Path, module: str) -> None:
    """By kill -9 of the executor; the lock is the process's until it ends."""
    deed = (
        "signal.signal(signal.SIGTERM, lambda *_: ((here / 'told').touch(), time.sleep(1), os._exit(143)))\n"
        "(here / 'listens').touch()\n"
        "time.sleep(60)"
    )
    script = tmp_path / "script.py"  # without a guard: the new process must not run it again
    script.write_text(
        "from pathlib import Path\n"
        "from tests.comparison.graph.test_process import execute, node\n"
        f"execute([node(Path({str(tmp_path)!r}), {module!r}, 'a', {deed!r})], workers=1)\n"
    )
    path = os.pathsep.join([str(Path(local.__file__).parents[3]), str(tmp_path)])
    executor = subprocess.Popen([sys.executable, script], env={**os.environ, "PYTHONPATH": path})
    try:
        _until(lambda: (tmp_path / "a/listens").exists())
        assert not is_free(tmp_path / "a")
    finally:
        executor.send_signal(signal.SIGKILL)
        executor.wait()
    _until(lambda: (tmp_path / "a/told").exists())
    assert not is_free(tmp_path / "a")
    _until(lambda: is_free(tmp_path / "a"))


def _until(met: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not met():
        assert time.monotonic() < end
        time.sleep(0.02)
