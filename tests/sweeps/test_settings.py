"""How a sweep is to run: its settings, what is refused, and what its runs are called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignlab.cli import main
from alignlab.comparison.graph.slurm import Slurm
from alignlab.core import AlignlabError, ConfigError
from alignlab.launch.slurm.settings import SlurmSettings
from alignlab.sweeps import settings as sweep_settings
from alignlab.sweeps.combinations import Composer, node_of
from alignlab.sweeps.settings import LocalSettings, OptunaSettings, chosen
from tests.sweeps import helpers as sweeps
from tests.training import runs


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweeps")
    runs.prepare(folder)
    return folder


def test_words_of_launcher_and_sweeper_are_taken_out() -> None:
    words = [
        "algorithm=dpo",
        "launcher=slurm",
        "launcher.partition=x",
        "sweeper=optuna",
        "sweeper.trials=3",
        "launch=1",
    ]
    launcher, sweeper, rest = chosen([*words, "launcher.additional_parameters={mail-type: FAIL}"], None)
    assert rest == ["algorithm=dpo", "launch=1"]
    assert isinstance(launcher, SlurmSettings)
    assert (launcher.partition, launcher.additional_parameters) == ("x", {"mail-type": "FAIL"})
    assert isinstance(sweeper, OptunaSettings)
    assert sweeper.trials == 3
    assert chosen([], None)[0] == LocalSettings(n_jobs=1)
    assert chosen(["launcher.n_jobs=3"], None)[0] == LocalSettings(n_jobs=3)


def test_a_launcher_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "launcher").mkdir()
    (tmp_path / "launcher/mine.yaml").write_text("defaults:\n  - slurm\npartition: a100\nmem_gb: 64\n")
    launcher, _, _ = chosen(["launcher=mine", "launcher.mem_gb=8"], tmp_path)
    assert isinstance(launcher, SlurmSettings)
    assert (launcher.partition, launcher.mem_gb, launcher.nodes) == ("a100", 8, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("launcher=slrum", "launcher=slrum: there is no such option; did you mean 'slurm'?"),
        ("launcher=slurm launcher.partion=x", "launcher.partion: unknown key; did you mean 'partition'?"),
        ("launcher=slurm launcher.n_jobs=3", "launcher.n_jobs: unknown key of launcher=slurm; known here: "),
        ("launcher=joblib", "launcher=joblib: is now launcher=local, with launcher.n_jobs=N for several at a time"),
        ("launcher.n_jobs=0", "launcher.n_jobs=0: should be greater than or equal to 1"),
        ("launcher=slurm launcher.nodes=0", "launcher.nodes=0: should be greater than or equal to 1"),
        ("launcher=slurm launcher.stages.sft.nodes=2", "launcher.stages.sft.nodes=2: is for `alignlab submit` alone"),
        ("launcher=local,slurm", "launcher=local,slurm: a sweep has one launcher"),
        ("launcher.kind=pbs", "launcher.kind=pbs: is not known; known here: local, slurm"),
        ("sweeper=optuna sweeper.sampler=grid", "sweeper.sampler='grid': should be 'tpe' or 'random'"),
        ("hydra/launcher=joblib", "hydra/launcher=joblib: alignlab sets this itself: see launcher=… and sweeper=…"),
        (
            "optimizer.lr=interval(0,1)",
            "optimizer.lr=interval(0,1): an interval has no end of values: add sweeper=optuna",
        ),
    ],
)
def test_mistaken_settings(home: Path, words: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert sweeps.sweep(home, "mistaken", *words.split(" ")) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"alignlab: {message}") and said.count("\n") == 1, said
    assert not (home / "mistaken").exists()


@pytest.mark.parametrize("word", ["launcher=slurm", "launcher.partition=x", "sweeper=optuna", "+sweeper.metric=x"])
@pytest.mark.parametrize("command", ["train", "compare"])
def test_without_m_there_is_no_sweep(command: str, word: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([command, "model=m", word]) == 2
    assert capfd.readouterr().err.startswith(f"alignlab: {word}: is for sweeps: add -m")


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_settings, "find_spec", lambda module: None)
    with pytest.raises(ConfigError, match=r"^sweeper=optuna: .* is not installed: pip install 'alignlab\[sweep\]'$"):
        chosen(["sweeper=optuna"], None)


def test_slurm_where_there_is_none(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sweeps.sweep(home, "nowhere", "launcher=slurm", "training.seed=0,1") == 2
    (said,) = (line for line in capfd.readouterr().err.splitlines() if line)
    assert said.startswith("alignlab: there is no Slurm here (sbatch is not on the PATH): run this on")


def test_tasks_of_a_job(tmp_path: Path) -> None:
    """One for each process where there are several nodes; on one, alignlab starts them itself."""

    def of(nodes: int, mode: str, processes: int | None, gpus: int = 4) -> int:
        settings = SlurmSettings(nodes=nodes, gpus_per_node=gpus)
        config = {"distributed": {"mode": mode, "processes": processes}, "training": {"resume": "auto"}}
        node = node_of("train", "run", tmp_path / "run", config, None)
        (batch,) = Slurm(tmp_path, "s", [node], settings, is_all=False).batches()
        return batch.per_node

    assert [of(1, "ddp", 4), of(1, "single", None), of(2, "ddp", 6), of(3, "fsdp", None)] == [1, 1, 3, 4]
    with pytest.raises(ConfigError, match=r"distributed\.processes=5: cannot be spread evenly over 2 nodes"):
        of(2, "ddp", 5)
    with pytest.raises(ConfigError, match=r"launcher\.nodes=2: run has distributed=single, one process"):
        of(2, "single", None)


# ------------------------------------------------------------------ folders and names


@pytest.fixture
def combined(home: Path) -> Callable[..., list[Any]]:
    def make(*words: str) -> list[Any]:
        composer = Composer("train", [*runs.words_for(home, "sft", "named"), *words], None)
        return [composer.combination(values) for values in composer.grid()]

    return make


def test_names_of_folders(combined: Callable[..., list[Any]], home: Path) -> None:
    (one, _) = combined("name=a,b")
    assert (one.name, one.folder, one.config["out"]) == ("name=a", home / "named/name=a", f"{home}/named/name=a")
    paths = combined("data.path=/some/where/a.jsonl,/some/where/b.jsonl")
    assert [c.name for c in paths] == ["data.path=_some_where_a.jsonl", "data.path=_some_where_b.jsonl"]
    assert paths[0].config["data"]["path"] == "/some/where/a.jsonl"
    long = combined(f"name={'x' * 300}a,{'x' * 300}b")
    assert len({c.name for c in long}) == 2
    assert all(len(c.name) < 256 for c in long)


def test_the_folder_of_a_sweep() -> None:
    assert Composer("train", ["model=a,b/c", "training.steps=3", "out=here"], None).folder == Path("here")
    assert Composer("compare", ["benchmark.beta=0.1,0.2"], None).folder == Path("runs/demo")
    assert Composer("train", ["algorithm=dpo,rloo", "algorithm.beta=1", "name=x"], None).folder == Path("runs/x")


def test_paths_that_vary(combined: Callable[..., list[Any]]) -> None:
    """As in `model=PATH`, and `out` is the sweep's: each run gets a folder of its own."""
    found = combined("model=a,b/c")
    assert [c.config["model"]["path"] for c in found] == ["a", "b/c"]
    assert [c.name for c in found] == ["model=a", "model=b_c"]
    assert [o for c in found for o in c.overrides if o.startswith("out=")] == [f"out={_out(c)}" for c in found]


def _out(combination: Any) -> str:
    return f"'{combination.folder}'" if "=" in str(combination.folder) else str(combination.folder)


def test_runs_of_a_sweep_are_one_group_of_the_tracker(combined: Callable[..., list[Any]]) -> None:
    (one, _) = combined("tracker=wandb", "tracker.mode=offline", "training.seed=0,1")
    assert (one.config["tracker"]["group"], one.config["tracker"]["name"]) == ("named", "named/training.seed=0")
    (one, _) = combined("tracker=wandb", "tracker.mode=offline", "training.seed=0,1", "tracker.group=mine")
    assert (one.config["tracker"]["group"], one.config["tracker"]["name"]) == ("mine", "named/training.seed=0")
    (one, _) = combined("tracker=none", "training.seed=0,1")
    assert not one.config["tracker"].get("group")


def test_no_sweep_to_report(tmp_path: Path) -> None:
    from alignlab.sweeps.results import gather

    with pytest.raises(AlignlabError, match=r"sweep\.json: cannot be read: .*is this the folder of a sweep\?"):
        gather(tmp_path)
