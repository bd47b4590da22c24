"""Measurements, each in a process of its own that begins with every library loaded and nothing computed."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from measuring.work import Scale

Function = Callable[..., dict[str, Any]]

PRELOADED = ("torch", "transformers", "peft", "datasets", "scipy.stats", "alignlab.training.run", "alignlab.rollout")
PRELOADED_PEERS = (
    "trl.trainer.dpo_trainer",
    "trl.trainer.sft_trainer",
    "trl.trainer.reward_trainer",
    "trl.trainer.grpo_trainer",
)

PPO_PYTHON = Path(__file__).resolve().parents[3] / ".venv-trl-ppo" / "bin" / "python"


@dataclass(frozen=True)
class Case:
    """One thing to measure: a function of a module, called as `run(scale, **options)` in a process of its own.

    Attributes:
        key: its name within the part and the work.
        label: for people.
        work: what is done, "P = 192": cases of equal work are compared.
        run: returns figures as JSON can hold them.
        slow: measured in the first round only.
        base: the one that the others of the same work are divided by.
        needs: "trl", or "trl_ppo": TRL's last release with PPO, in an environment of its own.
    """

    key: str
    label: str
    work: str
    run: Function
    options: dict[str, Any] = field(default_factory=dict)
    slow: bool = False
    base: bool = False
    needs: Literal["", "trl", "trl_ppo"] = ""


class Failed(Exception):
    """A measurement ended without a result; the message is the end of what it said."""


def prepare(scale: Scale) -> None:
    """Set what all processes inherit. Before the first of them, and before torch is imported anywhere."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": str(scale.threads),
        "ALIGNLAB_CACHE": str(Path(scale.folder) / "cache"),  # nothing of an earlier study is found again
    }
    if scale.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        peers = () if missing("trl") else PRELOADED_PEERS
        multiprocessing.get_context("forkserver").set_forkserver_preload([*PRELOADED, *peers])


def missing(needs: str) -> str:
    """What to do about something that is not installed; empty where it is."""
    if needs == "trl" and importlib.util.find_spec("trl") is None:
        return 'TRL is not installed: pip install -e ".[peers]"'
    if needs == "trl_ppo" and not PPO_PYTHON.exists():
        return f"there is no environment with TRL's PPO ({PPO_PYTHON.parents[1].name}): make peers-ppo"
    return ""


def measure(case: Case, scale: Scale) -> dict[str, Any]:
    """Run the case and return its figures.

    Raises:
        Failed: it did not come to an end.
    """
    # A process that was forked cannot use a GPU that its parent has touched: there, each starts from nothing.
    context: Any = multiprocessing.get_context("forkserver" if scale.device == "cpu" else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said.txt"
        process = context.Process(target=_child, args=(sender, str(said), case.run, scale, case.options))
        process.start()
        sender.close()
        try:
            result = json.loads(receiver.recv())
        except EOFError:
            result = None
        except BaseException:
            process.terminate()
            raise
        process.join()
        if result is None:
            words = said.read_text(errors="replace")[-3000:] if said.exists() else ""
            raise Failed(f"{case.work}, {case.label}: ended with status {process.exitcode}\n{words}")
    return dict(result)


def _child(sender: Connection, said: str, run: Function, scale: Scale, options: dict[str, Any]) -> None:
    file = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        import torch

        torch.set_num_threads(scale.threads)
        found = json.dumps(run(scale, **options))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sender.send(found)
    sender.close()
    sys.stdout.flush()
    os._exit(0)  # threads of datasets and others are of no more use
