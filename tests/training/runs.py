"""Small training runs as the command line makes them, for every algorithm."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from alignlab.config import compose, resolve
from tests import tiny

REPOSITORY = Path(__file__).parents[2]

ONLINE = [
    "data=prompts",
    "source=rollout",
    "source.group_size=3",
    "rollout.max_new_tokens=6",
    "scoring=function",
    "scoring.function.path=tests.training.runs.count_of_a",
]
"""Three samples to each prompt, scored by a rule."""

ALGORITHMS: dict[str, list[str]] = {
    "sft": ["algorithm=sft", "data=demonstrations"],
    "dpo": ["algorithm=dpo", "data=preferences", "algorithm.label_smoothing=0.1"],
    "ipo": ["algorithm=ipo", "data=preferences"],
    "hinge": ["algorithm=hinge", "data=preferences"],
    "kto": ["algorithm=kto", "data=preferences"],
    "orpo": ["algorithm=orpo", "data=preferences"],
    "simpo": ["algorithm=simpo", "data=preferences"],
    "rrhf": ["algorithm=rrhf", "data=rankings"],
    "slic": ["algorithm=slic", "data=preferences"],
    "reward_model": [
        *("algorithm=reward_model", "data=rankings", "algorithm.center=0.01", "algorithm.lm_weight=0.1"),
        *("algorithm.margin=0.5", "algorithm.mean_over=prompts"),
    ],
    "pairwise_model": ["algorithm=pairwise_model", "data=preferences", "algorithm.separator=z z"],
    "process_reward_model": ["algorithm=process_reward_model", "data=steps", "data.step_separator=' z '"],
    "rejection_sampling": ["algorithm=rejection_sampling", *ONLINE],
    "expert_iteration": ["algorithm=expert_iteration", "algorithm.minimum=0.02", *ONLINE],
    "ppo": [
        "algorithm=ppo",
        *ONLINE,
        "source.ppo_epochs=2",
        "source.rollout_batch_size=10",
        "algorithm.entropy_weight=0.01",
    ],
    "grpo": ["algorithm=grpo", *ONLINE],
    "rloo": ["algorithm=rloo", *ONLINE],
    "reinforce_pp": ["algorithm=reinforce_pp", *ONLINE],
}
"""What each algorithm needs said beyond the data's path."""

ONE_OF_EACH = ("sft", "dpo", "reward_model", "process_reward_model", "ppo", "grpo")
"""Algorithms that have, between them, a loss of every unit (tokens, responses, pairs, groups), every head, a reference,
a critic, and records as well as samples. For tests of what knows no more of an algorithm than these; what depends on
its loss, its columns or its state is tested with each of `ALGORITHMS`."""

SGD = ["optimizer=sgd", "optimizer.lr=0.05", "optimizer.momentum=0.9"]
"""Linear in the gradient, so that rounding stays rounding; Adam would divide it by small numbers."""


def count_of_a(prompt: str, response: str, extra: dict[str, Any]) -> float:
    """A rule that a policy can learn: more of the word "a"."""
    return response.split().count("a") + 0.01 * len(response)


def prepare(folder: Path, records: int = 12, **sizes: Any) -> None:
    """A tiny Llama in `folder/base`, of other `sizes` if given, and records of every format beside it."""
    tiny.save(folder / "base", std=0.15, **sizes)
    rng = random.Random(5)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choices(tiny.WORDS, k=rng.randint(low, high)))

    kinds: dict[str, list[dict[str, Any]]] = {
        k: [] for k in ("demonstrations", "preferences", "prompts", "rankings", "steps")
    }
    for _ in range(records):
        prompt, chosen, rejected = words(1, 9), words(1, 7), words(1, 7)
        if chosen == rejected:
            rejected += " q"
        kinds["demonstrations"].append({"prompt": prompt, "completion": chosen})
        kinds["preferences"].append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        kinds["prompts"].append({"prompt": prompt})
        answers = [chosen, rejected, f"{words(1, 5)} r"]
        kinds["rankings"].append({"prompt": prompt, "responses": answers, "scores": [2.0, 0.5, rng.random()]})
        steps = [words(1, 4).replace("z", "y") for _ in range(rng.randint(1, 4))]
        kinds["steps"].append({"prompt": prompt, "steps": steps, "labels": [rng.choice([-1, 0, 1]) for _ in steps]})
    for kind, lines in kinds.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def words_for(folder: Path, algorithm: str, out: str, *more: str) -> list[str]:
    """Overrides for a short run of an algorithm in `folder/out`."""
    own = ALGORITHMS[algorithm]
    kind = next(w.removeprefix("data=") for w in own if w.startswith("data="))
    return [
        f"model={folder}/base",
        *own,
        f"data.path={folder}/{kind}.jsonl",
        "training.batch_size=5",
        "training.epochs=null",
        "training.steps=6",
        "training.progress=plain",
        *([] if any(w.startswith("optimizer=") for w in more) else SGD),
        f"out={folder}/{out}",
        *more,
    ]


def train(folder: Path, algorithm: str, out: str, *more: str) -> dict[str, Any]:
    """Run in this process; the result."""
    from alignlab.training.run import train as run

    config = config_of(folder, words_for(folder, algorithm, out, *more))
    return run(config, Path(config["out"]))


def config_of(folder: Path, words: Sequence[str]) -> dict[str, Any]:
    """The resolved config of a run. Composing one takes as long as such a run: it is done once for the same overrides,
    whatever the folder and the run's name in it, and in part for those that choose the same options."""
    out = next(w.removeprefix("out=") for w in reversed(words) if w.startswith("out="))
    names = {"/the/run": out, "/the/folder": str(folder)}
    for stands_for, name in names.items():
        words = [re.sub(rf"{re.escape(name)}(?![\w.-])", stands_for, word) for word in words]

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: named(v) for k, v in value.items()}
        if isinstance(value, list):
            return [named(v) for v in value]
        if isinstance(value, str):
            for stands_for, name in names.items():
                value = value.replace(stands_for, name)
        return value

    found: dict[str, Any] = named(_composed(tuple(words)))
    return found


@cache
def _composed(words: tuple[str, ...]) -> dict[str, Any]:
    """What `compose` says. Values are set last in it, on what the choices between options give: these are made once for
    many runs whose values differ (tests/training/test_runs.py says that it is the same)."""
    values = [w for w in words if VALUE.match(w)]
    choices = tuple(w for w in words if w not in values)
    if any(w.startswith(("+", "~", "callbacks", "launcher")) for w in choices):
        return resolve(compose("train", words))
    config = deepcopy(_chosen(choices))
    try:
        for value in OverridesParser.create().parse_overrides(values):
            OmegaConf.update(config, value.key_or_group, value.value(), force_add=value.is_force_add())
        return resolve(config)
    except Exception:  # what is wrong is for `compose` to say
        return resolve(compose("train", words))


VALUE = re.compile(r"(\+\+)?(?!callbacks|launcher)\w+\.[\w.]+=(?!~)")
"""An override that sets a value, rather than choosing between a group's options."""


@cache
def _chosen(choices: tuple[str, ...]) -> DictConfig:
    return compose("train", choices)


def scored_samples(folder: Path) -> Path:
    """A file of groups: three samples of the base model to each prompt, with the rule's reward."""
    path = folder / "samples" / "groups.jsonl"
    if not path.exists():
        from alignlab.rollout.produce import produce

        sampling = [w for w in ONLINE if w.startswith(("data=", "rollout.", "scoring"))]
        words = [f"model={folder}/base", *sampling, f"data.path={folder}/prompts.jsonl", "group_size=3"]
        produce(resolve(compose("sample", words)), path.parent)
    return path


def command(folder: Path, algorithm: str, out: str, *more: str, processes: int = 1) -> list[str]:
    """The same run as a command line; under torchrun where there are several processes."""
    start = [sys.executable, "-m", "alignlab"]
    if processes > 1:
        start = [
            *(sys.executable, "-m", "torch.distributed.run"),
            *(f"--nproc-per-node={processes}", f"--master-port={free_port()}", "-m", "alignlab"),
        ]
        if not any(w.startswith("distributed=") for w in more):
            more = (*more, "distributed=ddp")
    return [*start, "train", *words_for(folder, algorithm, out, *more)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "TORCHELASTIC_ERROR_FILE": ""}


def spawn(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=300)


def weights(folder: Path, out: str) -> dict[str, torch.Tensor]:
    """The weights a run saved, full model or adapter."""
    return weights_of(folder / out / "model")


def weights_of(model: Path) -> dict[str, torch.Tensor]:
    path = model / "adapter_model.safetensors"
    return load_file(path if path.exists() else model / "model.safetensors")


def metrics(folder: Path, out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / out / "metrics.jsonl").read_text().splitlines()]


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of two sets of weights, relative to each tensor's largest number."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max() / a[n].abs().max().clamp(min=1e-12)) for n in a)


def identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


class StopAfter:
    """Called instead of the progress display's update: sends this process a signal once a step is reached."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.step, self.number = step, number

    def __call__(self, step: int, metrics: Any) -> None:
        if step == self.step:
            os.kill(os.getpid(), self.number)
