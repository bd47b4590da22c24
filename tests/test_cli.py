"""The command line as a user meets it: every mistake is one line on standard error and exit status 2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from alignlab import __version__
from alignlab.cli import COMMANDS, main
from alignlab.config import config_folder
from tests.training import runs

Mistake = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("cli")
    runs.prepare(made)
    (made / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completionn": "b"}\n')
    (made / "modules").mkdir()
    (made / "modules/my_own.py").write_text(
        "from alignlab.core import Algorithm\n\n\n"
        "class Own(Algorithm):\n"
        "    def __init__(self, gamma: float = 1.0):\n"
        "        self.gamma = gamma\n\n"
        "    def loss(self, outputs, batch):\n"
        "        return -self.gamma * outputs.logp_T, {}\n\n\n"
        "class Needy(Own):\n"
        "    needs = ('advantage',)\n\n"
        "    def loss(self, outputs, batch):\n"
        "        return -outputs.logp_T * batch['advantage_N'][batch.response_T], {}\n\n\n"
        "class Stranger:\n"
        "    pass\n"
    )
    return made


@pytest.fixture
def mistake(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Mistake:
    """Runs a command that must fail with status 2 and say one line; the line without "alignlab: "."""
    monkeypatch.syspath_prepend(folder / "modules")
    monkeypatch.chdir(folder)
    shutil.rmtree(folder / "mistaken", ignore_errors=True)

    def run(*words: str) -> str:
        capfd.readouterr()
        assert main(list(words)) == 2
        said = capfd.readouterr().err
        assert said.startswith("alignlab: ") and said.count("\n") == 1, said
        return said.removeprefix("alignlab: ").strip()

    return run


def training(folder: Path, *words: str, algorithm: str = "sft", out: str = "mistaken") -> list[str]:
    return ["train", *runs.words_for(folder, algorithm, out, "training.progress=off", "training.steps=1", *words)]


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "trian: unknown command; did you mean 'train'?"),
        (["train"], "model.path: must be given, as in model.path=VALUE"),
        (["evaluate"], "run: must be given, as in run=VALUE"),
        (["train", "--config-dir"], "--config-dir: name a folder"),
        (["train", "--config-dir", "nowhere"], "--config-dir nowhere: there is no such folder"),
        (["train", "--config-dir=base/config.json"], "--config-dir base/config.json: there is no such folder"),
        (["train", "--confg-dir=x"], "--confg-dir=x: unknown option; did you mean '--config-dir'?"),
        (["report", "--all"], "--all: unknown option; known here: --cfg, --config-dir, --help, --multirun"),
        (["report"], "report: name the folder of a comparison, or several: alignlab report DIR..."),
        (["report", "nowhere"], "nowhere/config.yaml: No such file or directory; is this the folder of a comparison?"),
        (["train", "--from=nowhere.yaml"], "--from=nowhere.yaml: cannot be read: [Errno 2] No such file or directory"),
        (["evaluate", "run=nowhere"], "run=nowhere: is not there; a model of the Hub needs a reference: name"),
        (
            ["evaluate", "run=base"],
            "run=base: is no run of alignlab: name the model to measure against, reference=PATH",
        ),
        (
            ["evaluate", "run=base", "reference=base", "max_tokens_per_microbatch=0"],
            "max_tokens_per_microbatch=0: should be greater than or",
        ),
        (
            ["evaluate", "run=base", "reference=base", "best_of=4"],
            "best_of=4: a reward model picks the best, and there is none: give reward_model",
        ),
        (["evaluate", "run=base", "reference=base", "best_of=0"], "best_of=0: should be greater than or equal to 1"),
        (
            ["evaluate", "run=base", "reference=base", "best_of=2", "reward_model=base", "rollout.temperature=0"],
            "rollout.temperature=0.0: best_of=2 needs samples that differ: above 0",
        ),
        (
            ["sample", "model=base", "data.path=prompts.jsonl", "group_size=0"],
            "group_size=0: should be greater than or equal",
        ),
        (["sample", "model=base", "data.path=prompts.jsonl", "out=/proc/x"], "out=/proc/x: cannot be written: No such"),
        (
            ["sample", "model=base"],
            "data.path: is not set; give a file, a folder or a dataset, e.g. data.path=my.jsonl",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistaken_commands(mistake: Mistake, words: list[str], message: str) -> None:
    assert mistake(*words).startswith(message)


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
        ("optimizer=null", "optimizer=null: is a choice between adafactor, adamw, adamw_8bit, paged"),
        ("algoritm=dpo", "algoritm: unknown key; did you mean 'algorithm'?"),
        ("wombat=1", "wombat: unknown key; known here: adapter, algorithm, data, distributed, model, name, "),
        (
            "data=nowhere.jsonl",
            "data=nowhere.jsonl: there is no such file and no such option; known here: base, chat, ",
        ),
        # Values that cannot be.
        ("training.batch_size=-1", "training.batch_size=-1: should be greater than or equal to 1"),
        ("algorithm=dpo algorithm.beta=0", "algorithm.beta=0.0: must be > 0"),
        ("algorithm=dpo algorithm.beta=big", "algorithm.beta='big': should be a valid number, unable to parse string"),
        ("training.mixed_precision=bf17", "training.mixed_precision='bf17': should be 'no', 'bf16' or 'fp16'"),
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
        ("training.steps=null", "training: nothing ends this run: give training.steps, epochs or one of max_*"),
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
        ("algorithm=rejection_sampling", "{folder}/demonstrations.jsonl:"),
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
    if "Needy" in words or words == "algorithm=rejection_sampling":
        assert "`scoring`" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experiment=demoo"], "experiment=demoo: there is no such option; did you mean 'demo'?"),
        (["comparison.seedz=3"], "comparison.seedz: unknown key; did you mean 'seeds'?"),
        (["comparison.seeds=[]"], "comparison.seeds=[]: list should have at least 1 item"),
        (
            ["comparison.seeds=[0,0]"],
            "comparison: two of its parts are called runs/sft-seed0: rename an algorithm or drop",
        ),
        (["comparison.budget.stepz=3"], "comparison.budget.stepz: unknown key; did you mean 'steps'?"),
        (["comparison=null"], "comparison=null: a section with keys is wanted: seeds, budget, common, sft, "),
        (["benchmark.beta=0"], "benchmark.beta=0.0: must be > 0"),
        (["+benchmark.world={words: 1}"], "benchmark.world.words=1: should be greater than or equal to 2"),
        (
            ["comparison.sft=['training.stepz=1']"],
            "comparison: sft: training.stepz: unknown key; did you mean 'steps'?",
        ),
        (
            ["+comparison.algorithms.x=['algorithm=dpoo']"],
            "comparison: runs/x-seed0: algorithm=dpoo: there is no such op",
        ),
        (
            ["+comparison.algorithms.x=['optimizer.lr=abc']"],
            "comparison: runs/x-seed0: optimizer.lr='abc': should be a",
        ),
        (
            ["+comparison.algorithms.x=['source=rollout','source.group_size=0']"],
            "comparison: runs/x-seed0: source.group_size=0: should be",
        ),
        (
            ["+comparison.algorithms.x=['algorithm=dpo','algorithm.beta=0']"],
            "comparison: runs/x-seed0: algorithm.beta=0.0: must be > 0",
        ),
        (
            ["+comparison.algorithms.x=['algorithm=rejection_sampling','source=rollout']"],
            "comparison: runs/x-seed0: scoring: RejectionSampling needs the column 'reward' and nothing fills it",
        ),
        (
            ["+comparison.algorithms.x=['data.path={pears}']"],
            "comparison: runs/x-seed0: 'data.path={pears}': {pears} stands for nothing here; known: base, data, out, ",
        ),
        (["+comparison.algorithms={'a/b': []}"], "+comparison.algorithms={'a/b': []}: cannot be understood: put what "),
        (["+comparison.algorithms={a/b: []}"], "comparison.algorithms.a/b=[]: string should match pattern"),
        (
            ["+comparison.algorithms.sft=[]"],
            "comparison: two of its parts are called runs/sft-seed0: rename an algorithm",
        ),
        (
            ["comparison.best_of=4", "comparison.reward_model=null"],
            "comparison.best_of=4: a reward model picks the best, and there is none: give reward_model",
        ),
        (
            ["+comparison.models.judge=['algorithm=reward_model','training.stepz=1']"],
            "comparison: judge: training.stepz: unknown key; did you mean 'steps'?",
        ),
        (["comparison.pairs=null"], "comparison: reward_model: 'data.path={pairs}': {pairs} stands for nothing here"),
        (["out=/proc/x"], "/proc/x: the comparison could not be written: [Errno 2] No such file or directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistaken_comparisons(
    mistake: Mistake, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are found before anything runs; no base model is made for them either."""
    from alignlab.benchmarks.exact.benchmark import ExactBenchmark
    from alignlab.comparison import compare

    monkeypatch.setattr(ExactBenchmark, "base_model", lambda self: pytest.fail("it made the base model"))
    monkeypatch.setattr(compare, "execute", lambda *_: pytest.fail("it began to run"))
    out = [] if any(w.startswith("out=") for w in words) else ["out=mistaken-comparison"]
    assert mistake("compare", "experiment=demo", "comparison.seeds=[0]", *out, *words).startswith(message)
    assert not Path("mistaken-comparison").exists()


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without the superuser's rights, which go before any folder's mode."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_may_not_be_written(folder: Path, mistake: Mistake, tmp_path: Path) -> None:
    """Refused before the model is loaded, hence before anything is computed in vain."""
    (tmp_path / "there").mkdir()
    tmp_path.chmod(0o555)
    with as_nobody():
        for out in (tmp_path / "new", tmp_path / "there"):
            said = mistake(*training(folder, f"out={out}"))
            assert said.startswith(f"out={out}: cannot be written: Permission denied")
    tmp_path.chmod(0o755)


def test_a_folder_that_holds_another_run(folder: Path, mistake: Mistake) -> None:
    assert main(training(folder, out="taken")) == 0
    said = mistake(*training(folder, "optimizer.lr=0.5", "training.steps=2", out="taken"))
    where = f"out={folder}/taken: this folder holds a run with another optimizer.lr, training.steps"
    assert said == f"{where}: choose another out=DIR, or training.resume=never to start it anew"
    assert main(training(folder, "training.progress=plain", out="taken")) == 0  # the same run, otherwise shown
    assert main(training(folder, "optimizer.lr=0.5", "training.resume=never", out="taken")) == 0
    assert json.loads((folder / "taken/metrics.jsonl").read_text())["lr"] == 0.5


def test_a_mistake_can_be_mended_in_the_same_folder(folder: Path, mistake: Mistake) -> None:
    """What never began to train holds nothing worth keeping."""
    assert "no such file" in mistake(*training(folder, "data.path=nowhere.jsonl", out="mended"))
    assert main(training(folder, out="mended")) == 0


# ------------------------------------------------------------------ options


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["-h"], ["help"]):
        assert main(words) == 0
        said = capsys.readouterr().out
        assert all(f"\n  {name} " in said for name in COMMANDS)
        assert "--config-dir DIR" in said


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize("command", [c for c in COMMANDS if (config_folder() / f"{c}.yaml").exists()])
def test_help_of_a_command_shows_its_groups_and_keys(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"alignlab {command}: {COMMANDS[command]}" in said
    groups = {
        "train": {"algorithm": "dpo", "optimizer": "adamw", "training": "default"},
        "compare": {"benchmark": "exact", "experiment": "demo"},
        "evaluate": {"benchmark": "stories", "rollout": "local"},
        "sample": {"scoring": "labels", "data": "prompts"},
        "submit": {"benchmark": "exact", "launcher": "slurm"},
    }
    for group, option in groups.get(command, {}).items():
        line = next(line for line in said.splitlines() if line.split()[:1] == [group])
        assert option in line.replace(",", " ").split()[1:]
    assert " # " in said  # its own keys, explained


def test_cfg_prints_the_config_and_runs_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    assert main([*training(folder, "name=mine", out="unmade"), "--cfg"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["training"]["batch_size"] == 5
    assert shown["model"]["path"] == f"{folder}/base"
    assert not (folder / "unmade").exists()
    assert main(["train", "--cfg", "name=mine"]) == 0  # also where something is still to be given
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["model"]["path"], shown["out"]) == ("???", "runs/mine")


def test_from_a_saved_config(folder: Path) -> None:
    assert main(training(folder, out="original")) == 0
    result = folder / "original/result.json"
    result.unlink()
    assert main(["train", f"--from={folder}/original/config.yaml"]) == 0
    assert result.exists()


# ------------------------------------------------------------------ as processes


def spawn(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, env=runs.environment() | environment, capture_output=True, text=True, timeout=300, cwd=runs.REPOSITORY
    )


def test_help_loads_nothing_heavy() -> None:
    code = "import sys; from alignlab.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = spawn(sys.executable, "-c", code)
    loaded = {name.split(".")[0] for name in done.stderr.split()}
    assert "alignlab" in loaded
    assert not loaded & {"torch", "hydra", "omegaconf", "transformers", "numpy", "pydantic", "yaml", "rich"}


def test_a_mistake_in_a_process_of_its_own(folder: Path) -> None:
    """No traceback, no warning of a library: what is to be mended stands alone."""
    done = spawn(sys.executable, "-m", "alignlab", *training(folder, "algorithm=dpo", "algorithm.betta=1"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "alignlab: algorithm.betta: unknown key; did you mean 'beta'?\n"


def test_a_sweep_gives_each_combination_a_folder(folder: Path, tmp_path: Path) -> None:
    """With an algorithm of the user's, found by a config of the user's, in one process."""
    (tmp_path / "configs/algorithm").mkdir(parents=True)
    (tmp_path / "configs/algorithm/own.yaml").write_text("_target_: my_own.Own\ngamma: 1.0\n")
    options = ["--config-dir", str(tmp_path / "configs"), "-m"]
    words = training(folder, "algorithm=own", "algorithm.gamma=1,2", f"out={tmp_path}/swept")
    path = f"{folder}/modules:{runs.REPOSITORY}"
    done = spawn(sys.executable, "-m", "alignlab", *words[:1], *options, *words[1:], PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-2000:]
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
