"""Process supervision where the truth is known: arithmetic in steps that a program checks.

    alignlab compare experiment=reasoning out=runs/reasoning
    python experiments/process_reward/reasoning.py runs/reasoning

Measures, from the comparison's policy and process reward model: how well the model finds the first wrong step of
solutions held out, the teacher's and the policy's own; how much choosing by it is worth, by best of N and by search
over steps; and the same for a model trained on Monte-Carlo labels, for which only answers need be checked.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

from figures import Case, at, baselines, best_threshold, cases, first, steps_right, table

from alignlab.benchmarks.reasoning import ReasoningBenchmark, check_steps
from alignlab.core import Group, Sampler, Scorer
from alignlab.data import DataSettings, load
from alignlab.models import ModelSettings, PackedModel, load_model
from alignlab.rollout import LocalRollout, StepSearch, best_of
from alignlab.scoring import ProcessRewardScorer, StepCheckScorer

ROLLOUT = LocalRollout(max_new_tokens=40)
PROBLEMS, SEED = 1024, 11


def judged(prm: Path, groups: list[Group]) -> list[Case]:
    return cases(ProcessRewardScorer(str(prm)), groups)


def checked(policy: PackedModel, prompts: list[Group], seed: int) -> list[Group]:
    """The policy's own solutions, labelled by the program."""
    groups = ROLLOUT.sampler(policy).sample(prompts, 1, seed)
    scorer = StepCheckScorer(check_steps)
    scorer.bind(policy, policy.tokenizer)
    scorer.score(groups)
    return groups


def accuracy(groups: list[Group], benchmark: ReasoningBenchmark) -> tuple[float, float]:
    """Share of right answers, and its standard error."""
    benchmark.gold().score(groups)
    right = [float(r.columns["reward"]) for g in groups for r in g.responses]  # type: ignore[arg-type]
    mean = sum(right) / len(right)
    return mean, math.sqrt(mean * (1 - mean) / len(right))


def choices(policy: PackedModel, prm: Scorer, prompts: list[Group], benchmark: ReasoningBenchmark) -> list[dict]:
    """Ways to choose an answer: how often it is right, what it costs."""
    rows = []

    def add(name: str, found: list[Group], engine: Sampler, started: float) -> None:
        right, error = accuracy(found, benchmark)
        tokens = engine.generated_tokens / len(prompts)
        rows.append(
            {"choice": name, "right": right, "error": error, "tokens": tokens, "seconds": time.monotonic() - started}
        )
        print(rows[-1], flush=True)

    started, engine = time.monotonic(), ROLLOUT.sampler(policy)
    add("most probable", engine.greedy(prompts), engine, started)
    for n in (1, 4, 16, 64):
        started, engine = time.monotonic(), ROLLOUT.sampler(policy)
        found = best_of(engine, prm, prompts, n, SEED) if n > 1 else engine.sample(prompts, 1, SEED)
        add(f"best of {n}" if n > 1 else "one sample", found, engine, started)
    for beams, expand in ((1, 4), (2, 2), (1, 16), (4, 4), (8, 8)):
        started, engine = time.monotonic(), ROLLOUT.sampler(policy)
        found = StepSearch(prm, beams, expand).rollout(engine, prompts, 1, SEED)
        add(f"search, {beams} beams × {expand}", found, engine, started)
    return rows


def monte_carlo(policy: Path, prompts: Path, out: Path) -> Path:
    """A process reward model from the policy's own solutions, labelled by its own completions."""
    settings = [f"model={policy}", "model.dtype=float32"]
    labels = [
        "scoring=monte_carlo",
        "scoring.function.path=alignlab.benchmarks.reasoning.is_right",
        "scoring.completions=8",
        "scoring.estimate=hard",
    ]
    if not (out / "groups.jsonl").exists():
        words = [*settings, f"data.path={prompts}", "group_size=2", "rollout.max_new_tokens=40", "threads=1", *labels]
        subprocess.run([sys.executable, "-m", "alignlab", "sample", *words, f"out={out}"], check=True)
    subprocess.run(
        [
            *(sys.executable, "-m", "alignlab", "train", "algorithm=process_reward_model", *settings),
            *("data=groups", f"data.path={out / 'groups.jsonl'}", "data.validation=0.1", f"out={out / 'prm'}"),
            *("training.epochs=20", "training.batch_size=64", "schedule=linear", "schedule.warmup=0.05"),
            *(
                "optimizer.lr=2e-3",
                "training.progress=off",
                "training.threads=1",
                "training.max_tokens_per_microbatch=16384",
            ),
        ],
        check=True,
    )
    return out / "prm/model"


def main(folder: Path) -> None:
    import torch

    torch.set_num_threads(1)
    benchmark = ReasoningBenchmark()
    policy = load_model(ModelSettings(path=str(folder / "sft/model")), trainable=False)
    tests = benchmark._test_prompts(policy.tokenizer)[:PROBLEMS]
    splits = load(DataSettings(path=str(folder / "data/steps.jsonl"), validation=0.05, test=0.1), policy.tokenizer)
    own = checked(policy, tests, SEED)
    models = {"labels by the program": folder / "prm/model"}
    models["Monte-Carlo labels"] = monte_carlo(
        folder / "sft/model", folder / "data/prompts.jsonl", folder / "monte_carlo"
    )
    train = [([], first(g.responses[0].columns["step_label"])) for g in splits.train]  # type: ignore[arg-type]
    report: dict = {"first_error": {}, "choices": {}}
    for where, groups in (("the teacher's solutions", splits.test), ("the policy's own", own)):
        rows = {}
        for name, prm in models.items():
            threshold = best_threshold(judged(prm, splits.validation))
            found = judged(prm, groups)
            rows[f"{name}, threshold 1/2"] = at(found, 0.5) | {"steps": steps_right(found)}
            rows[f"{name}, threshold {threshold:g}"] = at(found, threshold)
        rows |= baselines(train, found)
        report["first_error"][where] = rows
        print(f"\n{where}: {len(groups)}\n\n{table(rows)}\n", flush=True)
    for name, prm in models.items():
        print(name)
        report["choices"][name] = choices(policy, ProcessRewardScorer(str(prm)), tests, benchmark)
    (folder / "process_reward.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/reasoning"))
