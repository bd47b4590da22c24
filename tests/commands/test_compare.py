"""`alignlab compare` as a user meets it: mistakes are found before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands.helpers import Mistake


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
