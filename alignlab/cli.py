"""The command line: `alignlab COMMAND [--config-dir DIR] [KEY=VALUE …]`. Heavy imports wait for the command."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignlab.core.errors import Interrupted

COMMANDS = {
    "train": "one training run:  alignlab train algorithm=dpo model=PATH data=preferences data.path=FILE",
    "compare": "many algorithms under one budget:  alignlab compare experiment=demo",
    "submit": "the same as jobs of a Slurm cluster:  alignlab submit experiment=demo launcher.partition=gpu",
    "status": "how submitted comparisons go:  alignlab status [DIR ...] [--json]",
    "cancel": "cancel the jobs of a submitted comparison:  alignlab cancel DIR",
    "evaluate": "measure a saved model:  alignlab evaluate run=DIR benchmark=exact",
    "sample": "sample responses, score or label them, write a data set:  alignlab sample model=PATH data.path=FILE",
    "plan": "what a run needs and where it fits, nothing loaded:  alignlab plan model=llama-65b adapter=lora gpu=48",
    "export": "a model that any tool loads, adapters merged:  alignlab export run=DIR out=DIR",
    "report": "leaderboard and report from runs on disk:  alignlab report DIR",
}

OPTIONS = ("--config-dir", "--cfg", "--help", "--multirun")

HELP = """alignlab: which alignment algorithm should I use, and how far is it from the best that is possible?

usage: alignlab COMMAND [KEY=VALUE ...]

{commands}

options:
  --config-dir DIR   a folder of your own configs, laid out as ours (algorithm/mine.yaml, experiment/mine.yaml, ...)
  --cfg              print the resolved config and stop
  -m, --multirun     run every combination of comma-separated values:  alignlab train -m algorithm=sft,dpo ...
  --help             this text; after a command: its config groups and their options
  --version          the version
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 where parts of it failed, 2 for what the user can put right, and
    128 + n when stopped by signal n with a checkpoint saved."""
    status = _command(list(sys.argv[1:] if arguments is None else arguments))
    if arguments is None:  # in a process of its own, which now ends: it must not look as if it had been stopped
        import signal

        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    return status


def _command(words: list[str]) -> int:
    words = [w for w in words if not w.startswith("--local_rank=")]  # DeepSpeed's launcher adds it, and a variable too
    if not words or words[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        print(HELP.format(commands="\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())), end="")
        return 0
    if words[0] == "--version":
        from alignlab import __version__

        print(__version__)
        return 0
    from alignlab.core.errors import AlignlabError, Interrupted, did_you_mean
    from alignlab.launch.environment import quiet

    quiet()
    name, rest = words[0], words[1:]
    try:
        if name not in _RUN:
            raise AlignlabError(f"{name}: unknown command{did_you_mean(name, COMMANDS)}")
        if any(w in ("-h", "--help") for w in rest):
            return _help(name)
        return _RUN[name](rest)
    except Interrupted as stop:
        return _stopped(stop)
    except AlignlabError as error:
        print(f"alignlab: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("alignlab: stopped", file=sys.stderr)
        return 130


def _stopped(stop: Interrupted) -> int:
    """Say so; the exit status."""
    import signal

    print(f"alignlab: {stop}", file=sys.stderr)
    return 128 + signal.Signals[stop.signal].value


def _train(words: list[str]) -> int:
    if {"-m", "--multirun"} & set(words):
        return _sweep("train", [w for w in words if w not in ("-m", "--multirun")])
    config = _config("train", words)
    if config is None:
        return 0
    from alignlab.launch.start import Failed, train

    try:
        result = train(config, _out(config))
    except Failed as failure:  # has been told
        return failure.status
    if result is not None and _is_main():
        tokens = f"{result['trained_tokens']:,} tokens trained, {result['generated_tokens']:,} sampled"
        told = "pruned" if result.get("pruned") else "done"
        where = config["out"] if result.get("pruned") else f"{config['out']}/model"
        print(f"{told}: {result['step']} steps, {tokens}, {result['seconds']:.1f} s → {where}")
    return 0


def _evaluate(words: list[str]) -> int:
    config = _config("evaluate", words)
    if config is None:
        return 0
    from alignlab.benchmarks.evaluate import evaluate

    for name, value in evaluate(config).items():
        if isinstance(value, float):
            print(f"{name:<24}{value:12.4f}")
    return 0


def _sample(words: list[str]) -> int:
    config = _config("sample", words)
    if config is None:
        return 0
    from alignlab.rollout.produce import produce

    out = _out(config)
    result = produce(config, out)
    made = f"{result['groups']} groups, {result['generated_tokens']:,} tokens, {result['seconds']:.1f} s"
    print(f"{made} → {out}/groups.jsonl")
    return 0


def _compare(words: list[str]) -> int:
    if {"-m", "--multirun"} & set(words):
        return _sweep("compare", [w for w in words if w not in ("-m", "--multirun")])
    config = _config("compare", words)
    if config is None:
        return 0
    from alignlab.comparison.compare import compare

    return compare(config, _out(config), _own_folder(words)[1])


def _submit(words: list[str]) -> int:
    dry_run = "--dry-run" in words
    words = [w for w in words if w != "--dry-run"]
    config = _config("submit", words)
    if config is None:
        return 0
    from alignlab.comparison.compare import submit

    submit(config, _out(config), _own_folder(words)[1], dry_run)
    return 0


def _status(words: list[str]) -> int:
    from alignlab.comparison import status
    from alignlab.core.errors import AlignlabError

    as_json = "--json" in words
    words = [w for w in words if w != "--json"]
    _no_options(words)
    folders = [Path(w) for w in words] or status.submitted()
    if not folders:
        raise AlignlabError("status: nothing was submitted from runs/: name the folder, alignlab status DIR")
    if as_json:
        print(status.as_json(folders))
        return 0
    return max(status.show(folder) for folder in folders)


def _cancel(words: list[str]) -> int:
    from alignlab.comparison import status
    from alignlab.core.errors import ConfigError

    _no_options(words)
    if not words:
        raise ConfigError("cancel: name the folder of a submitted comparison: alignlab cancel DIR")
    for word in words:
        status.cancel(Path(word))
    return 0


def _node(words: list[str]) -> int:
    """A node of a graph of runs, as a comparison or a sweep starts it; not for people."""
    from alignlab.comparison.graph.work import run
    from alignlab.core.errors import ConfigError

    if not words:
        raise ConfigError("node: name the folder of a part of a comparison")
    return run(Path(words[0]), words[1:])


def _plan(words: list[str]) -> int:
    config = _config("plan", ["format=json" if w == "--json" else w for w in words])
    if config is None:
        return 0
    from alignlab.planning import plan

    found = plan(config, _own_folder(words)[0])
    if config["format"] == "json":
        import json

        print(json.dumps(found, indent=2))
        return 0
    from alignlab.planning.show import show

    show(found)
    return 0


def _export(words: list[str]) -> int:
    config = _config("export", words)
    if config is None:
        return 0
    from alignlab.config import section
    from alignlab.training.checkpoints.export import ExportSettings, export

    for line in export(section(ExportSettings, config, "")):
        print(line)
    return 0


def _report(words: list[str]) -> int:
    from alignlab.comparison import collect
    from alignlab.core.errors import ConfigError
    from alignlab.sweeps import results

    if not words:
        raise ConfigError("report: name the folder of a comparison, or several: alignlab report DIR...")
    _no_options(words)
    for word in words:
        (results if (Path(word) / results.FILE).exists() else collect).rebuild(Path(word))
    return 0


_RUN: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "compare": _compare,
    "evaluate": _evaluate,
    "sample": _sample,
    "submit": _submit,
    "status": _status,
    "cancel": _cancel,
    "node": _node,
    "plan": _plan,
    "export": _export,
    "report": _report,
}


def _config(name: str, words: list[str]) -> dict[str, Any] | None:
    """The resolved config of a command, or None after printing it for --cfg."""
    from alignlab.config import as_yaml, compose, read_saved, resolve

    words, own = _own_folder(words)
    show = "--cfg" in words
    words = [w for w in words if w != "--cfg"]
    saved = [w for w in words if w.startswith("--from=")]
    if saved:
        return read_saved(Path(saved[0].removeprefix("--from=")))
    _no_options(words)
    if name in ("train", "compare"):
        from alignlab.sweeps.settings import refuse

        refuse(words)
    config = compose(name, words, own)
    if show:
        print(as_yaml(config), end="")
        return None
    return resolve(config)


def _no_options(words: Sequence[str]) -> None:
    from alignlab.core.errors import ConfigError, did_you_mean

    for word in words:
        if word.startswith("-"):
            raise ConfigError(f"{word}: unknown option{did_you_mean(word, OPTIONS)}")


def _out(config: dict[str, Any]) -> Path:
    """The folder that a command fills."""
    from alignlab.core.errors import ConfigError

    if not isinstance(config["out"], str) or not config["out"]:
        raise ConfigError("out: must name a folder, as in out=DIR")
    return Path(config["out"])


def _own_folder(words: list[str]) -> tuple[list[str], Path | None]:
    """The words without `--config-dir DIR`, and the folder."""
    from alignlab.core.errors import ConfigError

    for i, word in enumerate(words):
        if word.startswith("--config-dir="):
            return [*words[:i], *words[i + 1 :]], Path(word.partition("=")[2])
        if word == "--config-dir":
            if i + 1 == len(words):
                raise ConfigError("--config-dir: name a folder")
            return [*words[:i], *words[i + 2 :]], Path(words[i + 1])
    return words, None


def _help(name: str) -> int:
    """A command's config groups with their options, and its own keys."""
    print(f"alignlab {name}: {COMMANDS[name]}\n")
    from alignlab.config import config_folder

    folder = config_folder()
    if not (folder / f"{name}.yaml").exists():  # it has no settings
        return 0
    text = (folder / f"{name}.yaml").read_text()
    known = text + "".join((folder / f"{c}.yaml").read_text() for c in ("train", "compare") if f"- {c}\n" in text)
    print("groups (GROUP=OPTION; then GROUP.KEY=VALUE):")
    for group in sorted(p for p in folder.iterdir() if p.is_dir()):
        if f"- {group.name}:" in known or f"- override /{group.name}:" in known:
            print(f"  {group.name:<12}{', '.join(sorted(p.stem for p in group.glob('*.yaml')))}")
    print(f"\n{folder / f'{name}.yaml'}:\n\n{text}")
    return 0


def _sweep(name: str, words: list[str]) -> int:
    """Every combination of comma-separated values, or a search."""
    from alignlab.sweeps.command import sweep

    words, own = _own_folder(words)
    _no_options(words)
    return sweep(name, words, own)


def _is_main() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"
