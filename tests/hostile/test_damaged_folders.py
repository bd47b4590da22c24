"""Every file that a run, a comparison or a sweep leaves, damaged in every way, before every command that reads it: one
line that names the file, or a note that does, and never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from alignlab.cli import main
from alignlab.comparison.graph import local
from alignlab.core.files import checksums
from alignlab.launch.slurm import commands
from tests.comparison import small
from tests.hostile.corpus import short
from tests.training import forks, runs


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 4),
    "list": lambda path: path.write_text("[1, 2]\n"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "missing": lambda path: path.unlink(),
    "folder": _folder,
}
ALL = tuple(DAMAGES)
DAMAGED = ("empty", "binary", "truncated", "missing", "folder")
STEP = "step-00000001"
CHECKPOINT = f"checkpoints/{STEP}"
RUN = "runs/sft-seed0"


class Quick:
    """A benchmark that takes no time."""

    name = "quick"

    def evaluate(self, subject: Any) -> dict[str, float]:
        return {"reward": 1.0}


@dataclass(frozen=True)
class Pair:
    """A file, and a command that meets it.

    Attributes:
        unsaid: damages of which nothing need be said: the command does without the file, and what it does is right.
        says: where it is told by another name than the file's.
    """

    command: str
    file: str
    unsaid: tuple[str, ...] = ()
    says: tuple[str, ...] = ()
    damages: tuple[str, ...] = ALL


PAIRS = [
    Pair("export", "config.yaml"),
    Pair(
        "export",
        "model/config.json",
        says=("run/model",),
        damages=("empty", "binary", "truncated", "missing", "folder"),
    ),
    Pair("export", "model/model.safetensors", says=("run/model",)),
    Pair("export", "result.json", unsaid=ALL),  # the model is there
    Pair("export", "metrics.jsonl", unsaid=ALL, damages=("binary", "folder")),
    *(Pair("export last", f"{CHECKPOINT}/{f}", says=(STEP,)) for f in ("manifest.json", "state.pt", "SHARD")),
    Pair("evaluate", "config.yaml", says=("is no run of alignlab",), unsaid=("truncated",)),  # half of it says enough
    Pair("evaluate", "evaluation.json", unsaid=ALL[:-1], damages=("list", "folder")),  # is written anew
    Pair("train", "config.yaml", unsaid=("missing",)),  # nothing to compare with: begun as it is asked for
    Pair("train", "metrics.jsonl", unsaid=("empty", "missing")),
    Pair("train", "samples.jsonl", unsaid=("empty", "missing")),
    Pair("train", "provenance.json", unsaid=("missing",)),
    Pair("train", "token_budget.json", unsaid=("missing",)),
    Pair("train", "run_lock", unsaid=ALL[:-1], damages=("binary", "folder")),
    Pair("train", f"{CHECKPOINT}/manifest.json", says=(STEP,)),
    Pair("train", f"{CHECKPOINT}/state.pt"),
    *(Pair("report", f) for f in ("config.yaml", f"{RUN}/evaluation.json", f"{RUN}/result.json")),
    Pair("report", "nodes.json", says=("no finished run",)),
    Pair("report", f"{RUN}/metrics.jsonl"),
    Pair("report", f"{RUN}/done.json", says=("no finished run",)),
    Pair("report", f"{RUN}/node.json", unsaid=("missing",), damages=("list", "missing", "folder")),
    Pair("report", "leaderboard.json", unsaid=ALL[:-1], damages=("list", "folder")),  # is written anew
    Pair("report sweep", "sweep.json", says=("no comparison", "folder of a comparison")),
    Pair("report sweep", "run/done.json", says=("unfinished",)),
    Pair("report sweep", "run/result.json"),
    Pair("report sweep", "nodes.json", says=("unfinished",), damages=("list", "missing", "folder")),
    Pair("status", "submitted.json", says=("handed nothing of this comparison",)),
    Pair("status", "nodes.json", says=("failed",)),
    Pair("status", f"{RUN}/done.json", says=("failed",)),
    Pair("status", f"{RUN}/evaluation.json"),
    Pair("compare", "nodes.json", unsaid=ALL[:-1], damages=("list", "folder")),  # is written anew
    Pair("compare", f"{RUN}/done.json", unsaid=("missing",), damages=("binary", "missing")),
    Pair("compare", f"{RUN}/evaluation.json", damages=("list", "missing")),
]
CASES = [(pair, damage) for pair in PAIRS for damage in pair.damages]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that samples, with a checkpoint of its first step; a comparison; a sweep of one run."""
    home = tmp_path_factory.mktemp("made")
    runs.prepare(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNLAB_CACHE", str(home / "cache"))
        patch.setattr(local, "NodeProcess", forks.Process)
        patch.setattr(commands, "states", lambda jobs: {})
        assert main(["train", *train(home)]) == 0
        shutil.rmtree(home / "run/checkpoints/step-00000002")
        (home / "run/evaluation.json").write_text("{}")
        (home / "run/token_budget.json").write_text('{"asked": 1, "tokens": 1}')
        few = {"seeds": [0], "budget": {"steps": 1}, "sft": None, "pairs": None, "reward_model": None, "baseline": None}
        sft = ["algorithm=sft", "data=demonstrations", "data.path={demonstrations}"]
        small.write(home, "tiny", small.changed(**few, algorithms={"sft": sft}))
        assert main(small.command(home, "comparison")) == 0, small.log_of(home, "comparison")
        sweep(home)
        (home / "configs/benchmark").mkdir()
        (home / "configs/benchmark/quick.yaml").write_text(f"_target_: {__name__}.Quick\n")
        ledger = {"base": [], "data": ["base"], RUN: ["data"], f"{RUN}.evaluate": [RUN]}
        entries = {n: {"id": f"{i}", "key": "", "folder": n, "log": ""} for i, n in enumerate(ledger)}
        (home / "comparison/submitted.json").write_text(json.dumps({"graph": ledger, "entries": entries}))
        yield home


def train(home: Path) -> list[str]:
    return [*short("grpo", home, home), f"out={home}/run", "training.checkpoint_every=1"]


def sweep(home: Path) -> None:
    """A folder as `alignlab train -m` leaves it, around the finished run."""
    folder = home / "sweep"
    shutil.copytree(home / "run", folder / "run")
    one = {"name": "run", "values": {"training.seed": "0"}, "overrides": ["training.seed=0"]}
    told = {"command": "train", "own": None, "sweeper": {"kind": "grid"}, "runs": [one]}
    (folder / "sweep.json").write_text(json.dumps(told))
    (folder / "nodes.json").write_text(json.dumps({"run": "key"}))
    files = checksums(folder / "run", ["result.json", "metrics.jsonl"])
    (folder / "run/done.json").write_text(json.dumps({"key": "key", "seconds": 1.0, "files": files}))


def words(command: str, home: Path) -> tuple[Path, list[str]]:
    """The folder that a command works on, and its command line."""
    run, comparison, of_sweep = home / "run", home / "comparison", home / "sweep"
    return {
        "train": (run, ["train", *train(home)]),
        "export": (run, ["export", f"run={run}", f"out={home}/exported"]),
        "export last": (run, ["export", f"run={run}", f"out={home}/exported", "checkpoint=last"]),
        "evaluate": (run, ["evaluate", f"run={run}", "benchmark=quick", f"--config-dir={home}/configs"]),
        "report": (comparison, ["report", str(comparison)]),
        "compare": (comparison, small.command(home, "comparison")),
        "status": (comparison, ["status", str(comparison)]),
        "report sweep": (of_sweep, ["report", str(of_sweep)]),
    }[command]


@pytest.mark.parametrize(("pair", "damage"), CASES, ids=[f"{p.command}: {p.file} {d}" for p, d in CASES])
def test_what_is_damaged_is_told(
    pair: Pair,
    damage: str,
    made: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, line = words(pair.command, made)
    kept = tmp_path / "kept"
    shutil.copytree(folder, kept)
    file = next(folder.glob(pair.file.replace("SHARD", "trained-*")))
    if pair.command == "train":  # as if it had been stopped
        for name in ("model", "result.json"):
            shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    DAMAGES[damage](file)
    capfd.readouterr()
    try:
        status = main(line)
        said = "".join([*capfd.readouterr(), caplog.text])
    finally:
        shutil.rmtree(folder)
        shutil.move(kept, folder)
        shutil.rmtree(made / "exported", ignore_errors=True)
    assert "Traceback (most recent call last)" not in said, said
    assert status in (0, 1, 2), said
    assert sum(text.startswith("alignlab: ") for text in said.splitlines()) == (status == 2), said
    if damage not in pair.unsaid:
        assert any(name in said.replace("\n", "") for name in (file.name, *pair.says)), said


def test_there_are_many() -> None:
    assert len(CASES) >= 120
