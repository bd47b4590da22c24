"""A run's folder over its life: what the same command does when the run is over, made longer, or on edited data; and
when a disk is full at the end."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignlab.cli import main
from alignlab.core.files import discard, replacing, restore
from alignlab.core.storage import StorageError
from alignlab.training import provenance
from alignlab.training.callbacks.callback import CheckpointEvery
from alignlab.training.settings import TrainingSettings
from tests.training import runs

MORE = ["training.progress=off", "training.batch_size=4"]
Said = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("life")
    runs.prepare(made)
    return made


@pytest.fixture
def said(folder: Path, capsys: pytest.CaptureFixture[str]) -> Said:
    """Trains; what was printed, errors last."""

    def run(out: str, *more: str, status: int = 0) -> str:
        assert main(["train", *runs.words_for(folder, "sft", out, *MORE, *more)]) == status
        found = capsys.readouterr()
        return found.out + found.err

    return run


def steps(folder: Path, out: str) -> list[int]:
    return [int(line["step"]) for line in runs.metrics(folder, out)]


def test_a_finished_run_is_already_done(folder: Path, said: Said) -> None:
    assert "\ndone: 2 steps" in said("done", "training.steps=2")
    files = {p: p.stat().st_mtime_ns for p in (folder / "done").rglob("*")}
    assert said("done", "training.steps=2").startswith("already done: 2 steps")
    assert {p: p.stat().st_mtime_ns for p in (folder / "done").rglob("*")} == files
    assert "\ndone: 2 steps" in said("done", "training.steps=2", "training.resume=never")
    shutil.rmtree(folder / "done/model")
    again = said("done", "training.steps=2")  # only the model is made again, from the checkpoint
    assert "note: nothing is left to train at step 2 (training.steps=2)" in again
    assert steps(folder, "done") == [1, 2]


def test_a_finished_run_is_made_longer(folder: Path, said: Said) -> None:
    said("whole", "training.steps=4")
    said("longer", "training.steps=2")
    (folder / "longer/evaluation.json").write_text("{}")
    longer = said("longer", "training.steps=4")
    assert "a run with training.steps=2 goes on with training.steps=4" in longer
    assert runs.identical(runs.weights(folder, "whole"), runs.weights(folder, "longer"))
    assert steps(folder, "longer") == [1, 2, 3, 4]
    assert not (folder / "longer/evaluation.json").exists()  # of the shorter run's model
    assert "which can be made longer only" in said("longer", "training.steps=3", status=2)
    assert json.loads((folder / "longer/result.json").read_text())["step"] == 4


def test_a_run_of_the_one_epoch_that_is_implied_is_made_longer(folder: Path, said: Said) -> None:
    """Where no limit is given one epoch is: two are more."""
    none = "training.steps=null"
    one = said("implied", none)
    assert "(training.epochs=1)" in one
    assert "nothing is left to train" in said("implied", none, "training.epochs=1")
    longer = said("implied", none, "training.epochs=2")
    assert "a run with training.epochs=1 goes on with training.epochs=2" in longer
    assert "can be made longer only" in said("implied", none, status=2)


def test_a_run_that_cannot_be_made_longer_says_why(folder: Path, said: Said) -> None:
    said("short", "training.steps=2", "training.checkpoint_every=null")
    assert not (folder / "short/checkpoints").exists()
    refused = said("short", "training.steps=4", status=2)
    assert "no checkpoint to go on from" in refused and "training.resume=never" in refused
    assert (folder / "short/result.json").exists()
    said("epoch", "training.epochs=1", "training.steps=3")
    assert "(training.epochs=1)" in said("epoch", "training.epochs=1", "training.steps=9")


def edited(folder: Path, out: str) -> list[str]:
    """Overrides for data of its own, in which a record is then changed."""
    path = folder / f"{out}.jsonl"
    shutil.copy(folder / "demonstrations.jsonl", path)
    return [f"data.path={path}", "training.steps=2"]


@pytest.mark.parametrize("unfinished", [True, False])
def test_edited_data_is_refused_unless_wanted(folder: Path, said: Said, unfinished: bool) -> None:
    out = f"edited-{unfinished}"
    words = edited(folder, out)
    said(out, *words)
    if unfinished:
        (folder / out / "result.json").unlink()
        shutil.rmtree(folder / out / "model")
    with (folder / f"{out}.jsonl").open("a") as file:
        file.write('{"prompt": "a b", "completion": "c"}\n')
    refused = said(out, *words, status=2)
    assert f"{folder}/{out}.jsonl: has been edited since the run in {folder}/{out} was trained on its data" in refused
    assert "training.resume=despite_changes" in refused
    said(out, *words, "training.resume=despite_changes")
    if unfinished:
        assert said(out, *words).startswith("already done")  # what it was last at work on


def test_other_versions_are_told(folder: Path, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    said("versions", "training.steps=2")
    version = provenance._version
    monkeypatch.setattr(provenance, "_version", lambda name: "99.0" if name == "torch" else version(name))
    later = said("versions", "training.steps=3")
    assert re.search(r"note: \S+/versions: since this run was last at work: torch \S+ → 99\.0\n", later)
    assert "transformers" not in later


def test_a_disk_that_is_full_at_the_end(folder: Path, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedModel

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    said("undisturbed", "training.steps=2")
    with monkeypatch.context() as patched:
        patched.setattr(PreTrainedModel, "save_pretrained", full)
        failed = said("full", "training.steps=2", status=2)
    (line,) = [line for line in failed.splitlines() if line.startswith("alignlab: ")]
    assert "model could not be saved" in line and "Free some space" in line
    assert sorted(p.name for p in (folder / "full").iterdir()) == [
        *("checkpoints", "config.yaml", "metrics.jsonl", "provenance.json", "run_lock")
    ]
    assert "nothing is left to train at step 2" in said("full", "training.steps=2")
    assert runs.identical(runs.weights(folder, "full"), runs.weights(folder, "undisturbed"))


def test_there_may_be_room_for_the_model_alone(folder: Path, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    from alignlab.training import trainer

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(trainer, "save_state", full)
    said("room", "training.steps=2")
    assert (folder / "room/model").is_dir() and not list((folder / "room/checkpoints").iterdir())


def test_checkpoints_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One after ten minutes; a slow one later, so that a twentieth of the time goes into them."""
    assert TrainingSettings().checkpoint_seconds == 600
    assert TrainingSettings(checkpoint_every="1.5h").checkpoint_seconds == 5400
    assert (
        TrainingSettings(checkpoint_every=7).checkpoint_steps,
        TrainingSettings(checkpoint_every=7).checkpoint_seconds,
    ) == (7, None)
    now, asked = [0.0], []

    class Trainer:
        class checkpoints:
            took = 0.0

        class state:
            step = 1

        def request_checkpoint(self) -> None:
            asked.append(now[0])
            callback.on_checkpoint(self, Path())  # type: ignore[arg-type]

    monkeypatch.setattr("time.monotonic", lambda: now[0])
    callback, trainer = CheckpointEvery(None, 600), Trainer()
    callback.on_start(trainer)  # type: ignore[arg-type]
    for now[0] in (1.0, 599.0, 601.0, 1200.0, 1202.0):
        callback.on_step(trainer)  # type: ignore[arg-type]
    assert asked == [601.0, 1202.0]
    Trainer.checkpoints.took = 100.0
    for now[0] in (1803.0, 3201.0, 3203.0):
        callback.on_step(trainer)  # type: ignore[arg-type]
    assert asked == [601.0, 1202.0, 3203.0]


# ------------------------------------------------------------------ folders


def test_a_folder_takes_the_place_of_another_or_nothing_changes(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for content in ("old", "new"):
        with replacing(folder) as temporary:
            (temporary / "file").write_text(content)
    with (
        pytest.raises(StorageError, match=r"model could not be saved: .*Free some space"),
        replacing(folder) as temporary,
    ):
        (temporary / "file").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (folder / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_crash_between_the_two_renames_is_put_right(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    former = tmp_path / ".model.old"
    former.mkdir()
    (former / "file").write_text("old")
    restore(folder)
    assert (folder / "file").read_text() == "old" and not former.exists()
    former.mkdir()  # after them: the new one is there
    restore(folder)
    assert (folder / "file").read_text() == "old" and not former.exists()
    discard(folder)
    discard(folder)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ sources, samples


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "rloo", "reinforce_pp", "rejection_sampling", "expert_iteration"])
def test_algorithms_that_sample_do_so_unless_told_otherwise(algorithm: str) -> None:
    from alignlab.config import compose

    assert compose("train", [f"algorithm={algorithm}"])["source"]["kind"] == "rollout"
    assert compose("train", [f"algorithm={algorithm}", "source=data"])["source"]["kind"] == "data"
    assert compose("train", [f"algorithm={algorithm}", "source.group_size=7"])["source"]["group_size"] == 7


def test_samples_are_not_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "asked.jsonl"
    shutil.copy(folder / "prompts.jsonl", path)

    def sample(*more: str, status: int = 0) -> str:
        words = [f"model={folder}/base", f"data.path={path}", "rollout.max_new_tokens=4", f"out={folder}/samples-kept"]
        assert main(["sample", *words, *more]) == status
        found = capsys.readouterr()
        return found.out + found.err

    made = sample()
    kept = folder / "samples-kept/groups.jsonl"
    content = kept.read_bytes()
    assert sample() == f"already done: {made.splitlines()[-1]}\n"
    assert "groups made with another seed: choose another out=DIR" in sample("seed=1", status=2)
    shutil.copytree(folder / "base", folder / "other")
    assert "another model.path" in sample(f"model={folder}/other", status=2)
    path.write_text(path.read_text() + '{"prompt": "a"}\n')
    assert f"groups made with another {path}" in sample(status=2)
    assert kept.read_bytes() == content
    kept.unlink()
    sample("seed=1")
    (folder / "samples-kept/sample.json").unlink()
    assert "groups made by something else" in sample("seed=1", status=2)
