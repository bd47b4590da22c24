"""A scorer like any user's, which hides a fault: FAULT="MOMENT RANK ACT", done once, at the second opportunity."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

CALLS: dict[str, int] = {}


def rule(prompt: str, response: str, extra: dict[str, Any]) -> float:
    """More of the word "w1"."""
    moment("rollout", 16)
    return response.split().count("w1") + 0.01 * len(response)


def moment(name: str, call: int) -> str | None:
    """Do what is to be done, if it is here and now. Returns an act that is the caller's to do."""
    where, rank, act = os.environ.get("FAULT", "none 0 none").split()
    CALLS[name] = CALLS.get(name, 0) + 1
    marker = Path(os.environ.get("FAULT_MARKER", "/nonexistent"))
    if name != where or CALLS[name] != call or os.environ.get("RANK", "0") != rank or marker.exists():
        return None
    marker.write_text(str(time.time()))
    if act.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[act])
    elif act.startswith("parent:"):
        os.kill(os.getppid(), signal.Signals[act.removeprefix("parent:")])
    elif act == "sleep":
        sleep_for_ever()
    elif act == "bug":
        raise ZeroDivisionError("a bug in one process")
    elif act == "memory":
        import torch

        torch.empty(1 << 50, dtype=torch.uint8)  # the real allocator says no
    elif act == "readonly":
        checkpoints = Path(os.environ["FAULT_MOUNT"], "run/checkpoints")
        subprocess.run(["mount", "--bind", checkpoints, checkpoints], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", checkpoints], check=True)
    elif act == "fill":
        with Path(os.environ["FAULT_MOUNT"], "ballast").open("wb") as file:
            try:
                while file.write(b"\0" * 4096):
                    file.flush()
            except OSError:
                pass
    return act


def sleep_for_ever() -> None:
    while True:
        time.sleep(1)


def _install() -> None:
    """Opportunities in a step, between forward and backward, and in the middle of writing a checkpoint."""
    import safetensors.torch

    from alignlab.training import step

    aggregate, save_file = step.aggregate, safetensors.torch.save_file

    def sabotaged(loss: Any, *arguments: Any) -> Any:
        act = moment("step", 4)
        return aggregate(loss * float("nan") if act == "nan" else loss, *arguments)

    def torn(tensors: Any, path: Any, **options: Any) -> None:
        if Path(path).name.startswith("trained-"):
            moment("before", 2)
        save_file(tensors, path, **options)
        if Path(path).name.startswith("trained-") and os.environ.get("FAULT", "").startswith("checkpoint"):
            if CALLS.get("checkpoint") == 1 and os.environ.get("RANK", "0") == os.environ["FAULT"].split()[1]:
                os.truncate(path, os.path.getsize(path) // 2)
            moment("checkpoint", 2)

    step.aggregate, safetensors.torch.save_file = sabotaged, torn


_install()
