"""Whatever operation on a run's files fails, or is the last before the power goes: the old state or the new one is
there, never a part of either, and the same command goes on to the same weights.

ALIGNLAB_POWER_CUT=all tries every operation in every way and writes the table, ALIGNLAB_POWER_CUT_TABLE=FILE where to;
by default each kind of operation on each file is tried in one of the ways.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Collection
from functools import cache
from pathlib import Path

import pytest
import yaml

import alignlab.config
from alignlab.training.checkpoints.store import verify
from tests.hostile.power import Disk
from tests.training import forks, runs

HOW = ("once", "full", "kill")
MORE = ["training.batch_size=4", "training.checkpoint_every=1", "training.progress=off", "training.threads=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("power")
    runs.prepare(made, records=8)
    runs.train(made, "sft", "first", *MORE, "training.steps=1")  # imports what the processes that are forked need
    return made


@pytest.fixture(autouse=True)
def composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Composing a config takes longer than the run."""
    real = alignlab.config.compose
    compose = cache(lambda name, overrides: real(name, overrides))
    monkeypatch.setattr(alignlab.config, "compose", lambda name, overrides, own=None: compose(name, tuple(overrides)))


class Life:
    """A run's: of two steps, in a new folder; or made three steps long, over what the run of two has left."""

    def __init__(self, folder: Path, name: str, steps: int, begun: Path | None = None) -> None:
        self.folder, self.name, self.begun = folder, name, begun
        self.out = folder / name
        self.words = ["train", *runs.words_for(folder, "sft", name, *MORE, f"training.steps={steps}")]
        alignlab.config.compose("train", self.words[1:])  # before processes are forked
        self.log = folder / f"{name}.log"
        assert self.run(Disk(self.out, log=folder / f"{name}.operations"))[0] == 0, self.log.read_text()
        self.operations = [line.split(" ", 1) for line in (folder / f"{name}.operations").read_text().splitlines()]
        self.weights = runs.weights(folder, name)
        self.steps = steps

    def run(self, disk: Disk | None = None, anew: bool = True) -> tuple[int, str]:
        """The exit status of the command and what it said, begun from the state that it is to begin from."""
        if anew:
            shutil.rmtree(self.out, ignore_errors=True)
            if self.begun is not None:
                shutil.copytree(self.begun, self.out)
                saved = self.out / "config.yaml"
                saved.write_text(saved.read_text().replace(str(self.begun), str(self.out)))
        self.log.unlink(missing_ok=True)

        def act() -> None:
            if disk is not None:
                disk.install()
            forks.command(self.words)()

        status = forks.wait(forks.fork(act, self.log))
        return status, self.log.read_text(errors="replace")

    @property
    def known(self) -> set[str]:
        """Its kinds of operations, each with the file."""
        return {plain(f"{kind} {file}") for kind, file in self.operations}

    def points(self, but: Collection[str]) -> list[tuple[int, str]]:
        """Which operation fails, and how."""
        if os.environ.get("ALIGNLAB_POWER_CUT") == "all":
            return [(at, how) for at in range(1, len(self.operations) + 1) for how in HOW]
        first: dict[str, int] = {}
        for at, (kind, file) in enumerate(self.operations, start=1):
            first.setdefault(plain(f"{kind} {file}"), at)
        return [(at, HOW[i % len(HOW)]) for i, (name, at) in enumerate(first.items()) if name not in but]

    def whole(self, failed: bool) -> list[str]:
        """What is wrong with what is there; how far the run got comes first."""
        wrong, checkpoints = [], sorted((self.out / "checkpoints").glob("step-*"))
        for step in checkpoints:
            wrong += verify(step)
        for name in ("result.json", "provenance.json"):
            if (self.out / name).exists():
                json.loads((self.out / name).read_text())
        if (self.out / "config.yaml").exists():
            assert yaml.safe_load((self.out / "config.yaml").read_text())["training"]["steps"] in (2, 3)
        if (self.out / "model").exists():
            found = runs.weights(self.folder, self.name)
            if not runs.identical(found, self.weights) and self.begun is None:
                wrong.append("the model is another")
        if (self.out / "result.json").exists():
            step = json.loads((self.out / "result.json").read_text())["step"]
            reference = self.weights if step == self.steps else runs.weights_of(self.begun / "model")  # type: ignore[operator]
            if not runs.identical(runs.weights(self.folder, self.name), reference):
                wrong.append("a result without its model")
        if failed:
            wrong += [f"{p} is left" for p in self.out.rglob("*") if re.search(r"\.tmp|\.old$", p.name)]
        return wrong


def plain(name: str) -> str:
    """An operation and its file without what makes no difference: the step, and which file of a whole folder is
    synced."""
    return re.sub(r"(?<=^fsync )(\S+/?\.(model\.tmp|tmp-step-N))/.*", r"\1/FILE", re.sub(r"step-\d+", "step-N", name))


def try_each(life: Life, but: Collection[str] = ()) -> dict[int, dict[str, str]]:
    """Number of the operation → how it failed → what became of the run.

    Args:
        but: operations that have been tried, as `Life.known` has them.
    """
    rows: dict[int, dict[str, str]] = {}
    for at, how in life.points(but):
        kind, file = life.operations[at - 1]
        status, said = life.run(Disk(life.out, how, at))
        where = f"{kind} {file}, number {at}, {how}: status {status}\n{said}"
        assert "Traceback" not in said, where
        assert status in ((-signal.SIGKILL,) if how == "kill" else (0, 2)), where
        lines = [line for line in said.splitlines() if line.startswith("alignlab: ")]
        assert len(lines) == (status == 2), where
        assert not (wrong := life.whole(failed=status == 2)), f"{where}\n{wrong}"
        there = sorted(p.name for p in (life.out / "checkpoints").glob("step-*"))
        state = "finished" if (life.out / "result.json").exists() else there[-1] if there else "not begun"
        again, said_again = life.run(anew=False)
        assert again == 0, f"{where}\nand again:\n{said_again}"
        assert not (wrong := life.whole(failed=how != "once")), f"{where}\nand again:\n{said_again}\n{wrong}"
        assert json.loads((life.out / "result.json").read_text())["step"] == life.steps, where
        assert runs.identical(runs.weights(life.folder, life.name), life.weights), where
        rows.setdefault(at, {})[how] = f"{'killed' if status < 0 else 'error' if status else 'survived'}: {state}"
    return rows


def test_a_run_that_is_cut_off_anywhere_goes_on(folder: Path) -> None:
    life = Life(folder, "two", 2)
    rows = try_each(life)
    assert len(rows) >= 40
    write_table("A run of two steps", life, rows)


def test_a_finished_run_that_is_made_longer_is_cut_off_anywhere(folder: Path) -> None:
    first = Life(folder, "start", 2)
    longer, whole = Life(folder, "longer", 3, begun=first.out), Life(folder, "three", 3)
    assert runs.identical(longer.weights, whole.weights)
    rows = try_each(longer, but=first.known)
    assert rows
    write_table("A finished run of two steps, made three steps long", longer, rows)


def write_table(title: str, life: Life, rows: dict[int, dict[str, str]]) -> None:
    if (path := os.environ.get("ALIGNLAB_POWER_CUT_TABLE")) is None:
        return
    lines = [
        f"\n## {title}\n",
        "| | operation | file | fails once (EIO) | disk full from here on (ENOSPC) | killed here |",
    ]
    lines.append("|--:|---|---|---|---|---|")
    for at, found in rows.items():
        kind, file = life.operations[at - 1]
        lines.append(f"| {at} | {kind} | `{file}` | {' | '.join(found.get(how, '') for how in HOW)} |")
    with Path(path).open("a", encoding="utf-8") as table:
        table.write("\n".join(lines) + "\n")
