"""How sure a comparison is: intervals, paired tests, correction for many tests.

Two things vary between one comparison and its repetition: the seeds of training and the prompts that the models are
measured on. Both belong in an interval (Bouthillier et al. 2021, arXiv:2103.03098). What is done here, and why:

* **Seeds.** There are few of them, often three. A bootstrap over three seeds can never leave their range, which holds
  the true mean in 3 of 4 cases only, and a permutation test of three differences cannot give a p-value under 1/4. So
  seeds enter through Student's t, exact for normal errors at any number of seeds >= 2.
* **Prompts.** There are many, their values are anything but normal (bounded, tied, skewed), and they are the same for
  all algorithms. So they enter through a bootstrap, in which a draw takes the same prompts for every run: differences
  between algorithms are thereby paired.
* **Both.** A draw is the bootstrapped mean over prompts plus an independent draw of the seeds' error, s/√S · t(S-1);
  the interval is the draws' 2.5 % to 97.5 % range, the p-value the level at which it first holds 0. This is the
  multi-bootstrap of Sellam et al. 2022 (arXiv:2106.16163; the pigeonhole bootstrap of Owen 2007, arXiv:0712.1111) with
  its resampling of seeds replaced by Student's error, for the reason above. Without spread between seeds it is the
  bootstrap over prompts, without spread between prompts it is Student's interval; in between it is somewhat wide, as
  noise that is neither of the seed nor of the prompt counts in both parts.
* **One seed.** Only the prompts' part is left. It says how sure the value of *this trained model* is, and nothing of
  how another seed would have fared. With one seed and no per-prompt values there is no interval and no test.

Agarwal et al. 2021 (arXiv:2108.13264) argue for intervals instead of point estimates where runs are few, as done here;
their interquartile mean is over many tasks, and a comparison has one benchmark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import isfinite

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ALPHA = 0.05
"""Intervals hold 1 - ALPHA, tests err in ALPHA of the cases without a difference."""

DRAWS = 10_000
"""Bootstrap draws. The smallest p-value is 2/DRAWS, still significant after Holm among 200 pairs of algorithms."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval in the metric's own units; None where no interval can be given."""

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Measured:
    """One metric of one algorithm.

    Attributes:
        values: seed → the run's value.
        errors_B: seed → what resampling the prompts does to that value, from `prompt_errors`, shape (DRAWS,). For all
            seeds or, where there are no per-prompt values, for none.
    """

    values: Mapping[int, float]
    errors_B: Mapping[int, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Algorithm `a` against algorithm `b` on one metric, over the seeds that both have.

    Attributes:
        difference: a minus b; None where no seed is common.
        p: two-sided p-value of "no difference"; None where it cannot be tested.
        p_holm: the same, corrected for all pairs of the leaderboard; `p_holm` < 0.05 is called significant.
        seeds: number of common seeds.
    """

    a: str
    b: str
    difference: Estimate | None
    p: float | None
    p_holm: float | None = None
    seeds: int = 0

    @property
    def significant(self) -> bool | None:
        """Whether the two differ; None where it cannot be tested."""
        return None if self.p_holm is None else self.p_holm < ALPHA

    def flipped(self) -> Comparison:
        """b against a."""
        d = self.difference
        if d is not None:
            d = Estimate(-d.mean, None if d.high is None else -d.high, None if d.low is None else -d.low)
        return replace(self, a=self.b, b=self.a, difference=d)


def prompt_errors(value_RQ: Array, draws: int = DRAWS, seed: int = 0) -> Array:
    """How much the mean of each run moves when the Q prompts are drawn again, with replacement.

    A draw takes the same prompts for all R runs, so the difference of two rows is the bootstrap of their paired
    difference. The errors are stretched by √(Q/(Q-1)) · t(Q-1)/z, which undoes the percentile bootstrap's narrowness
    at small Q (the expanded percentile interval of Hesterberg 2015, arXiv:1411.5279; 4 % at Q = 50, 13 % at 15).

    Args:
        value_RQ: one finite value per run and prompt; Q >= 2; column i is the same prompt in every run.
        draws: B, the number of resamples.
        seed: the same seed and Q give the same resamples.

    Returns:
        error_RB, in the units of the values, shape (R, B); its mean is about 0.
    """
    from scipy.stats import norm, t

    Q = value_RQ.shape[1]
    centred_RQ = value_RQ - value_RQ.mean(1, keepdims=True)
    stretch = np.sqrt(Q / (Q - 1)) * t.ppf(1 - ALPHA / 2, Q - 1) / norm.ppf(1 - ALPHA / 2)
    rng = np.random.default_rng(seed)
    error_RB = np.empty((len(value_RQ), draws))
    chunk = max(1, 2_000_000 // Q)  # bounds the memory of the counts
    for start in range(0, draws, chunk):
        size = min(chunk, draws - start)
        drawn_BQ = rng.integers(0, Q, (size, Q)) + Q * np.arange(size)[:, None]
        count_BQ = np.bincount(drawn_BQ.ravel(), minlength=size * Q).reshape(size, Q)
        error_RB[:, start : start + size] = centred_RQ @ count_BQ.T.astype(np.float64) / Q
    return error_RB * stretch


def estimate(measured: Measured) -> Estimate:
    """Mean over seeds with its 95 % interval (see the top of this file for what the interval holds)."""
    seeds = sorted(measured.values)
    value_S = np.array([measured.values[s] for s in seeds])
    error_B = _mean([measured.errors_B[s] for s in seeds]) if measured.errors_B else None
    return _infer(value_S, error_B)[0]


def compare(a: str, measured_a: Measured, b: str, measured_b: Measured) -> Comparison:
    """Paired comparison: a minus b for each common seed (and prompt, where both have per-prompt values).

    With seeds only it is the paired t-test; with prompts only the paired bootstrap; with both see the top of this
    file. Interval and p-value agree: the interval holds 0 exactly where p >= 0.05, up to the draws' resolution.
    """
    seeds = sorted(measured_a.values.keys() & measured_b.values.keys())
    if not seeds:
        return Comparison(a, b, None, None)
    value_S = np.array([measured_a.values[s] - measured_b.values[s] for s in seeds])
    error_B = None
    if measured_a.errors_B and measured_b.errors_B:
        error_B = _mean([measured_a.errors_B[s] - measured_b.errors_B[s] for s in seeds])
    difference, p = _infer(value_S, error_B)
    return Comparison(a, b, difference, p, seeds=len(seeds))


def compare_all(measured: Mapping[str, Measured]) -> list[Comparison]:
    """Every pair once, in the order given, with Holm's correction over all of them.

    All pairs, not just best against rest: the best was picked by looking at the same values, and only the correction
    over all pairs keeps the error rate whichever of them is picked.
    """
    pairs = [compare(a, measured[a], b, measured[b]) for a, b in combinations(measured, 2)]
    return [replace(pair, p_holm=p) for pair, p in zip(pairs, holm([pair.p for pair in pairs]), strict=True)]


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction (Holm 1979): adjusted p-values in the order given.

    The i-th smallest of m is multiplied by m - i + 1, made monotone and capped at 1: rejecting where the result is
    below α keeps the chance of any false rejection below α, whatever the dependence. A None stays None and does not
    count in m.
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[i] = largest
    return adjusted


def _mean(arrays: Sequence[Array]) -> Array:
    return np.mean(np.stack(arrays), axis=0)


def _infer(value_S: Array, error_B: Array | None) -> tuple[Estimate, float | None]:
    """Mean, 95 % interval and the p-value of mean 0, from the seeds' values and the prompts' part of the error."""
    S, mean = len(value_S), float(value_S.mean())
    if error_B is None:
        return _student(value_S)
    if S > 1:
        error_B = error_B + value_S.std(ddof=1) / np.sqrt(S) * _student_draws(S - 1, len(error_B))
    low, high = np.quantile(mean + error_B, [ALPHA / 2, 1 - ALPHA / 2])
    beyond = min(int((mean + error_B <= 0).sum()), int((mean + error_B >= 0).sum()))
    # + 1: the observed value is one of the draws, so that p is never 0 (Phipson & Smyth 2010, arXiv:1603.05766)
    return Estimate(mean, float(low), float(high)), min(1.0, 2 * (beyond + 1) / (len(error_B) + 1))


def _student(value_S: Array) -> tuple[Estimate, float | None]:
    """Student's interval and t-test (of mean 0)."""
    from scipy.stats import ttest_1samp

    mean = float(value_S.mean())
    if len(value_S) < 2:
        return Estimate(mean), None
    if np.ptp(value_S) == 0:  # no spread at all: the t statistic is 0/0 or infinite
        return Estimate(mean, mean, mean), float(mean == 0)
    test = ttest_1samp(value_S, 0.0)
    interval = test.confidence_interval(1 - ALPHA)
    p = float(test.pvalue)
    return Estimate(mean, float(interval.low), float(interval.high)), p if isfinite(p) else None


def _student_draws(freedom: int, draws: int) -> Array:
    """Student's t at evenly spaced levels in random order: its quantiles have no Monte-Carlo error."""
    from scipy.stats import t

    level_B = (np.random.default_rng(1).permutation(draws) + 0.5) / draws
    return np.asarray(t.ppf(level_B, freedom))
