"""Float32 weights and sums of gradients, bfloat16 products, in every mode of distribution."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny
from tests.training import many, precision, runs

pytestmark = pytest.mark.component

MODES = ("ddp", "fsdp", "zero2", "zero3")

PAIRS = [
    (algorithm, mode, "full" if (i + j) % 2 else "lora")
    for i, algorithm in enumerate(runs.ONE_OF_EACH)
    for j, mode in enumerate(MODES)
] + [("dpo", "fsdp", "full"), ("dpo", "zero3", "full")]
"""Kinds take turns; heads and critics beside a model that is trained whole, and its reference, are with both engines
that divide weights. experiments/precision has all."""

EVALUATED = ["training.eval_every=1", "data.validation=0.25"]
"""A pass without gradients before each checkpoint: what FSDP gathered for it must not be what is written."""


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("modes")
    runs.prepare(folder, **tiny.QUANTIZABLE)
    pairs = sorted(PAIRS, key=lambda pair: MODES.index(pair[1]))
    jobs = []
    for algorithm, mode, kind in pairs:
        words = [*precision.KINDS[kind], *precision.WORDS, f"distributed={mode}"]
        words += EVALUATED if algorithm == "dpo" else []
        jobs.append({"algorithm": algorithm, "out": f"{algorithm}-{mode}-{kind}", "words": words})
    many.together(folder, jobs)
    return folder


@pytest.mark.parametrize(("algorithm", "mode", "kind"), PAIRS)
def test_each_engine_trains_float32_weights_with_bfloat16_products(
    distributed: Path, algorithm: str, mode: str, kind: str
) -> None:
    precision.check(distributed, algorithm, kind, f"{algorithm}-{mode}-{kind}", world=2)
