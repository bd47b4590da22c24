"""What all commands share: every mistake is one line on standard error and exit status 2; help; --cfg."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from alignlab.cli import commands, main
from alignlab.commands import COMPOSING, parse
from alignlab.config import config_folder
from alignlab.core import ConfigError
from tests.commands.helpers import Mistake, spawn, training

COMMANDS = commands()


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
        (["report", "--all"], "--all: unknown option; known here: --help"),
        (["report"], "report: name the folder of a comparison, or several: alignlab report DIR..."),
        (["report", "nowhere"], "nowhere/config.yaml: cannot be read: No such file or directory: is this"),
        (["train", "--from=nowhere.yaml"], "nowhere.yaml: cannot be read: No such file or directory: name the"),
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


@pytest.mark.parametrize("command", [c for c in COMMANDS if (config_folder() / f"{c}.yaml").exists()])
def test_help_of_a_command_shows_its_groups_and_keys(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"alignlab {command}: {COMMANDS[command]}" in said
    groups = {
        "train": {"algorithm": "dpo", "optimizer": "adamw", "quantization": "nf4", "training": "default"},
        "compare": {"benchmark": "exact", "experiment": "demo"},
        "evaluate": {"benchmark": "stories", "rollout": "local"},
        "sample": {"scoring": "labels", "data": "prompts"},
        "submit": {"benchmark": "exact", "launcher": "slurm"},
    }
    for group, option in groups.get(command, {}).items():
        line = next(line for line in said.splitlines() if line.split()[:1] == [group])
        assert option in line.replace(",", " ").split()[1:]
    assert " # " in said  # its own keys, explained


def test_help_shows_the_keys_of_each_group(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the default option, or of the one that is named; with those that it builds on."""
    assert main(["train", "--help"]) == 0
    said = capsys.readouterr().out
    for group in ("training", "model", "optimizer", "rollout", "data"):
        assert re.search(rf"\n    {group}=\w+:\n      ", said)
    assert re.search(r"\n      batch_size: 32 +# groups per optimiser step", said)
    assert re.search(r"\n      on_bad_record: stop +# ", said)  # of data=base, which data=demonstrations builds on
    assert "label_smoothing" not in said
    assert main(["train", "algorithm=dpo", "--help"]) == 0
    assert re.search(r"\n    algorithm=dpo:\n(.+\n)+      label_smoothing: 0\.0 +# ", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("status", {"--json", "--debug"}),
        ("report", {"--debug"}),
        ("cancel", {"--debug"}),
        ("submit", {"--dry-run", "--config-dir", "--cfg", "--debug"}),
        ("train", {"--from", "--config-dir", "--cfg", "--multirun", "--debug"}),
    ],
)
def test_help_shows_the_options(command: str, options: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert {*re.findall(r"^  (--[\w-]+)", said, re.MULTILINE)} == options
    assert said.startswith(f"alignlab {command}: ") and len(said.splitlines()[2]) > 30


RUN, SWEEP, COMPARISON = "metrics.jsonl", "sweep.json", "nodes.json"


@pytest.mark.parametrize(
    ("command", "file", "said"),
    [
        ("report", RUN, "a training run, which has no leaderboard: see its metrics.jsonl and result.json, measure it "),
        ("status", RUN, "alignlab has handed nothing of this training run to a cluster; how far it is stands in "),
        (
            "cancel",
            SWEEP,
            "alignlab has handed nothing of this sweep to a cluster: where it runs on this machine",
        ),
        ("status", COMPARISON, "alignlab has handed nothing of this comparison to a cluster: where it runs on this "),
    ],
)
def test_what_a_folder_is_and_what_to_do_with_it(
    mistake: Mistake, tmp_path: Path, command: str, file: str, said: str
) -> None:
    (tmp_path / file).write_text("{}")
    assert mistake(command, str(tmp_path)).startswith(f"{tmp_path}: {said}")


def test_slurm_that_is_installed_and_has_no_cluster() -> None:
    from alignlab.launch.slurm.commands import explain

    said = "sbatch: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host\nsbatch: fatal"
    assert explain(said).startswith("there is no Slurm here (sbatch is installed and knows of no cluster): ")


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


def test_a_mistake_in_a_process_of_its_own(folder: Path) -> None:
    """No traceback, no warning of a library: what is to be mended stands alone."""
    done = spawn(sys.executable, "-m", "alignlab", *training(folder, "algorithm=dpo", "algorithm.betta=1"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "alignlab: algorithm.betta: unknown key; did you mean 'beta'?\n"


def test_options_and_the_rest_are_told_apart_wherever_they_stand() -> None:
    for words in (["a=1", "--config-dir", "mine", "b", "-m"], ["--config-dir=mine", "-m", "a=1", "b"]):
        given = parse(words, *COMPOSING, "--multirun")
        assert given.overrides == ["a=1", "b"] and given.folders == [Path("a=1"), Path("b")]
        assert given.config_dir == Path("mine") and given.options.keys() == {"--multirun", "--config-dir"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--json=yes"], "--json=yes: unknown option"),
        (["--cfg"], "--cfg: unknown option; known here: --help, --json"),
        (["-x"], "-x: unknown option"),
    ],
)
def test_options_of_other_commands_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        parse(words, "--json")
