"""`alignlab train` as a user meets it: mistakes in runs and sweeps, and folders that cannot be used."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from alignlab.cli import main
from alignlab.commands import parse
from alignlab.comparison.graph import local
from tests.commands.helpers import Mistake, training
from tests.training import forks


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # Keys, options and groups that are not there.
        ("training.stepz=3", "training.stepz: unknown key; did you mean 'steps'?"),
        ("+training.stepz=3", "training.stepz: unknown key; did you mean 'steps'?"),
        ("~training.stepz", "training.stepz: unknown key; did you mean 'steps'?"),
        ("algorithm=dpo algorithm.betta=1", "algorithm.betta: unknown key; did you mean 'beta'?"),
        ("algorithm=dpo +algorithm.betta=1", "algorithm.betta: unknown key; did you mean 'beta'?"),
        ("algorithm=dpoo", "algorithm=dpoo: there is no such option; did you mean 'dpo'?"),
        ("training=quick", "training=quick: there is no such option; known here: default"),
        ("optimizer=null", "optimizer=null: is a choice between adafactor, adamw, adamw_8bit, adamw_kahan, paged"),
        ("algoritm=dpo", "algoritm: unknown key; did you mean 'algorithm'?"),
        (
            "wombat=1",
            "wombat: unknown key; known here: adapter, algorithm, callbacks, data, distributed, environment, ",
        ),
        (
            "data=nowhere.jsonl",
            "data=nowhere.jsonl: there is no such file and no such option; known here: base, chat, ",
        ),
        # Values that cannot be.
        ("training.batch_size=-1", "training.batch_size=-1: should be greater than or equal to 1"),
        ("algorithm=dpo algorithm.beta=0", "algorithm.beta=0.0: must be > 0"),
        ("algorithm=dpo algorithm.beta=big", "algorithm.beta='big': should be a valid number, unable to parse string"),
        (
            "training.mixed_precision=bf17",
            "training.mixed_precision='bf17': should be 'auto', 'no', 'bf16', 'fp16' or 'pure'",
        ),
        ("optimizer.lr=abc", "optimizer.lr='abc': should be a valid number, unable to parse string as a number"),
        ("optimizer.lr=-1", "optimizer._target_=torch.optim.SGD: ValueError: Invalid learning rate: -1.0 (sgd.py:"),
        (
            "optimizer._target_=torch.optim.AdamZ",
            "optimizer._target_=torch.optim.AdamZ: torch.optim has no 'AdamZ'; did",
        ),
        (
            "data.validation=2",
            "data.validation=2: must be a fraction in [0, 1), the name of a split, or a path; got 2.0",
        ),
        ("data.parser=xml", "data.parser=xml: is no format; known here: auto, chat, demonstrations, groups, "),
        ("data.format=text", "data.format: unknown key: it is called data.parser"),
        ("rollout.temperature=-1", "rollout.temperature=-1: should be greater than or equal to 0"),
        # Settings at odds with each other.
        ("training.patience=2", "training.patience: needs evaluations: give training.eval_every, in steps"),
        ("training.final=best", "training.final: needs evaluations: give training.eval_every, in steps"),
        ("training.eval_every=1", "training.eval_every: there are no validation records: see data.validation"),
        (
            "training.eval_every=1 data.validation=0.3 training.metric=eval/looss",
            "training.metric=eval/looss: an evaluation gives eval/loss, eval/nll, eval/response_length",
        ),
        ("adapter=lora model.freeze=[embed]", "model.freeze: with an adapter all of the model's own weights stay as"),
        # Columns that nobody fills.
        (
            "algorithm=rejection_sampling data=prompts source=rollout",
            "scoring: RejectionSampling needs the column 'reward' and nothing fills it: choose a scorer, as in ",
        ),
        ("algorithm=rejection_sampling", "scoring: RejectionSampling needs the column 'reward' and nothing fills it"),
        ("algorithm=rejection_sampling source=data", "{folder}/demonstrations.jsonl:"),
        ("training.checkpoint_every=10m", "training.checkpoint_every='10m': must be steps, as in 100, or a time, as "),
        ("training.checkpoint_every=0", "training.checkpoint_every=0: must be steps, as in 100, or a time, as in "),
        (
            "algorithm._target_=my_own.Mistyped",
            "my_own.Mistyped.needs: nothing fills the column 'ref_lgp'; did you",
        ),
        ("algorithm._target_=my_own.Needy", "{folder}/demonstrations.jsonl:"),
        ("scoring=function", "scoring.function.path: must be given, as in scoring.function.path=VALUE"),
        (
            "scoring=function scoring.function.path=my_own.rule",
            "scoring.function.path=my_own.rule: my_own has no 'rule'",
        ),
        # Models, data and folders.
        ("model=/nowhere/model", "model.path='/nowhere/model': there is no such folder"),
        ("model.path=", "model.path='': string should have at least 1 character"),
        ("data.path={folder}/nowhere.jsonl", "{folder}/nowhere.jsonl: no such file or folder"),
        (
            "data.path={folder}/bad.jsonl",
            "{folder}/bad.jsonl:2: no field 'completion' or 'answer' or 'output'; there are: ",
        ),
        (
            "algorithm=dpo",
            "{folder}/demonstrations.jsonl:1: DPO needs at least 2 responses to a prompt; this record has 1",
        ),
        ("out=/proc/x", "out=/proc/x: cannot be written: No such file or directory"),
        ("out={folder}/base/config.json/x", "out={folder}/base/config.json/x: cannot be written: Not a directory"),
        ("out={folder}/base/config.json", "out={folder}/base/config.json: cannot be written: File exists"),
        ("out=", "out: must name a folder, as in out=DIR"),
        # Classes of the user's.
        (
            "algorithm._target_=no.such.Thing",
            "algorithm._target_=no.such.Thing: there is no module 'no': is its folder",
        ),
        ("algorithm._target_=my_own.Owm", "algorithm._target_=my_own.Owm: my_own has no 'Owm'; did you mean 'Own'?"),
        (
            "algorithm._target_=my_own.Stranger",
            "algorithm._target_=my_own.Stranger: not a subclass of alignlab.core.Al",
        ),
        ("algorithm._target_=my_own.Own +algorithm.gama=2", "algorithm.gama: unknown key; did you mean 'gamma'?"),
        ("algorithm._target_=my_own.Own +algorithm.gamma=x", "algorithm.gamma='x': should be a valid number"),
        # Words that cannot be parsed.
        ("training={steps:", "training={steps:: a bracket or quote in it is not closed"),
        ("training.steps=[1,2", "training.steps=[1,2: a bracket or quote in it is not closed"),
        ("training.steps='3", "training.steps='3: a bracket or quote in it is not closed"),
        ("optimizer.betas=[a=1]", "optimizer.betas=[a=1]: cannot be understood: put what holds spaces, brackets, "),
        ("training.steps", "training.steps: a setting is written KEY=VALUE"),
        ("=3", "=3: a setting is written KEY=VALUE"),
        ("training..steps=3", "training..steps=3: 'training..steps' cannot be a key"),
        ("training.steps=1,2", "training.steps=1,2: a list is written [1,2]; to run with each value in turn, add -m"),
    ],
)
def test_mistaken_runs(folder: Path, mistake: Mistake, words: str, message: str) -> None:
    chosen = words.replace("{folder}", str(folder)).split(" ")
    said = mistake(*training(folder, *chosen))
    assert said.startswith(message.replace("{folder}", str(folder)))
    if "Needy" in words or words.startswith("algorithm=rejection_sampling"):
        assert "scoring=" in said


@contextmanager
def modes_hold() -> Iterator[None]:
    """Without the superuser's right to write into any folder (capability CAP_DAC_OVERRIDE); reading stays as it was, so
    that this works wherever the project lies."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the call; this thread
    rights = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: bits 0 to 31, then the others
    assert libc.capget(header, rights) == 0
    override = rights[0] & 0b10
    rights[0] &= ~0b10
    assert libc.capset(header, rights) == 0
    try:
        yield
    finally:
        rights[0] |= override
        assert libc.capset(header, rights) == 0


def test_a_folder_that_may_not_be_written(folder: Path, mistake: Mistake, tmp_path: Path) -> None:
    """Refused before the model is loaded, hence before anything is computed in vain."""
    (tmp_path / "there").mkdir(mode=0o555)
    tmp_path.chmod(0o555)
    with modes_hold():
        for out in (tmp_path / "new", tmp_path / "there"):
            said = mistake(*training(folder, f"out={out}"))
            assert said.startswith((f"out={out}: cannot be written", f"{out}: config.yaml could not be written"))
            assert "Permission denied" in said
    tmp_path.chmod(0o755)


def test_a_folder_that_holds_another_run(folder: Path, mistake: Mistake) -> None:
    assert main(training(folder, out="taken")) == 0
    said = mistake(*training(folder, "optimizer.lr=0.5", "training.steps=2", out="taken"))
    where = f"out={folder}/taken: this folder holds a run with another optimizer.lr"
    assert said == f"{where}: choose another out=DIR, or training.resume=never to start it anew"
    assert main(training(folder, "training.progress=plain", out="taken")) == 0  # the same run, otherwise shown
    assert main(training(folder, "optimizer.lr=0.5", "training.resume=never", out="taken")) == 0
    assert json.loads((folder / "taken/metrics.jsonl").read_text())["lr"] == 0.5


def test_a_mistake_can_be_mended_in_the_same_folder(folder: Path, mistake: Mistake) -> None:
    """What never began to train holds nothing worth keeping."""
    assert "no such file" in mistake(*training(folder, "data.path=nowhere.jsonl", out="mended"))
    assert main(training(folder, out="mended")) == 0


def test_from_a_saved_config(folder: Path) -> None:
    assert main(training(folder, out="original")) == 0
    result = folder / "original/result.json"
    result.unlink()
    assert main(["train", f"--from={folder}/original/config.yaml"]) == 0
    assert result.exists()


@pytest.mark.parametrize(
    ("words", "processes", "mode"),
    [
        ([], "4", "ddp"),
        (["distributed=single"], "4", "single"),  # is then refused, as it always was
        (["distributed=fsdp"], "4", "fsdp"),
        ([], "1", "single"),
    ],
)
def test_under_a_launcher_the_default_is_ddp(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], processes: str, mode: str
) -> None:
    from alignlab.build import section
    from alignlab.commands.train import COMPOSING, _config
    from alignlab.training.settings import DistributedSettings

    monkeypatch.setenv("WORLD_SIZE", processes)
    config = _config(parse(["model=x", *words], *COMPOSING))
    assert config is not None
    assert section(DistributedSettings, config.get("distributed") or {}, "distributed").mode == mode
    said = "note: 4 processes were started: distributed=ddp, unless you give another\n"
    assert capsys.readouterr().err == (said if mode == "ddp" else "")


def test_a_saved_config_takes_no_overrides(mistake: Mistake) -> None:
    said = mistake("train", "--from=nowhere.yaml", "training.steps=1")
    assert said == "training.steps=1: not with --from, which takes the config as it was saved"


def test_a_sweep_gives_each_combination_a_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an algorithm of the user's, found by a config of the user's."""
    monkeypatch.setattr(local, "NodeProcess", forks.Process)
    monkeypatch.syspath_prepend(folder / "modules")
    (tmp_path / "configs/algorithm").mkdir(parents=True)
    (tmp_path / "configs/algorithm/own.yaml").write_text("_target_: my_own.Own\ngamma: 1.0\n")
    options = ["--config-dir", str(tmp_path / "configs"), "-m"]
    words = training(folder, "algorithm=own", "algorithm.gamma=1,2", f"out={tmp_path}/swept")
    assert main([*words[:1], *options, *words[1:]]) == 0
    folders = sorted(p for p in (tmp_path / "swept").iterdir() if p.is_dir())
    assert [p.name for p in folders] == ["algorithm.gamma=1", "algorithm.gamma=2"]
    one, two = (json.loads((p / "metrics.jsonl").read_text()) for p in folders)
    assert two["loss"] == pytest.approx(2 * one["loss"])
    assert not (folders[0] / ".hydra").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("training.stepz=1,2", "training.stepz: unknown key; did you mean 'steps'?"),
        ("algorithm=sft,dpoo", "algorithm=dpoo: there is no such option; did you mean 'dpo'?"),
        ("algorithm=[sft,", "algorithm=[sft,: a bracket or quote in it is not closed"),
        ("--bogus", "--bogus: unknown option; known here: --cfg, --config-dir, --help, --multirun"),
    ],
)
def test_mistaken_sweeps(
    folder: Path, mistake: Mistake, monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["alignlab"])  # it is set for Hydra, as is HYDRA_FULL_ERROR
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    assert mistake(*training(folder, "-m", words, out="swept")) == message


def test_a_sweep_shows_no_config(mistake: Mistake) -> None:
    assert mistake("train", "-m", "--cfg", "algorithm=sft,dpo") == "--cfg: not with --multirun"
