"""The filtered distribution, the draw and the random numbers, against hand arithmetic and transformers' warpers."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from scipy import stats

from alignlab.rollout import LocalRollout, filtered_log_probs
from alignlab.rollout.sampling import BLOCK, draw, sample, stream_key, uniforms

LAST = 1 - 2.0**-53  # the largest float64 below 1


def filtered(probabilities: list[float], **settings: float) -> list[float]:
    logits = torch.tensor(probabilities, dtype=torch.float64).log() + 3.0  # logits are known up to a constant
    return filtered_log_probs(logits, LocalRollout(**settings)).exp().tolist()


@pytest.mark.parametrize(
    ("given", "settings", "expected"),
    [
        # p^2 = .25, .0625, .0625, sum .375
        ([0.5, 0.25, 0.25], {"temperature": 0.5}, [2 / 3, 1 / 6, 1 / 6]),
        # sqrt p = .8, .4, .4472, sum 1.6472
        ([0.64, 0.16, 0.2], {"temperature": 2.0}, [0.8 / 1.6472136, 0.4 / 1.6472136, 0.4472136 / 1.6472136]),
        ([0.3, 0.5, 0.2], {"top_k": 2}, [0.375, 0.625, 0]),
        ([0.25, 0.25, 0.25, 0.25], {"top_k": 2}, [0.5, 0.5, 0, 0]),
        ([0.3, 0.7], {"top_k": 5}, [0.3, 0.7]),
        ([0.125, 0.25, 0.125, 0.5], {"top_p": 0.8}, [1 / 7, 2 / 7, 0, 4 / 7]),
        ([0.5, 0.25, 0.25], {"top_p": 0.75}, [2 / 3, 1 / 3, 0]),
        ([0.2, 0.5, 0.3], {"top_p": 0.01}, [0, 1, 0]),
        # after top_k: 4/7, 3/7; the first holds more than half, which it does not before
        ([0.4, 0.3, 0.2, 0.1], {"top_k": 2, "top_p": 0.5}, [1, 0, 0, 0]),
        ([0.4, 0.3, 0.2, 0.1], {"top_p": 0.5}, [4 / 7, 3 / 7, 0, 0]),
        # p^2 / .46: the first holds .78
        ([0.6, 0.3, 0.1], {"temperature": 0.5, "top_p": 0.7}, [1, 0, 0]),
        ([0.6, 0.3, 0.1], {"top_p": 0.7}, [2 / 3, 1 / 3, 0]),
        ([0.5, 0.3, 0.2], {"min_p": 0.5}, [0.625, 0.375, 0]),
        ([0.5, 0.3, 0.2], {"min_p": 1.0}, [1, 0, 0]),
        # p^2 relative to the first: 1, .36, .16
        ([0.5, 0.3, 0.2], {"temperature": 0.5, "min_p": 0.2}, [0.25 / 0.34, 0.09 / 0.34, 0]),
        ([0.2, 0.4, 0.4], {"temperature": 0.0}, [0, 1, 0]),
        ([0.5, 0.0, 0.5], {}, [0.5, 0, 0.5]),
        ([0.5, 0.0, 0.5], {"temperature": 2.0, "top_p": 0.9}, [0.5, 0, 0.5]),
    ],
)
def test_filters_by_hand(given: list[float], settings: dict[str, float], expected: list[float]) -> None:
    assert filtered(given, **settings) == pytest.approx(expected, abs=1e-7)


def test_ties_go_to_the_lower_id() -> None:
    level = torch.zeros(3, 5000)
    for settings in ({"top_k": 10}, {"top_p": 9.5 / 5000}):
        kept = filtered_log_probs(level, LocalRollout(**settings)).isfinite()
        assert kept.nonzero()[:, 1].tolist() == [*range(10)] * 3


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6},
        {"top_k": 7},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.8},
    ],
)
def test_agrees_with_transformers(settings: dict[str, float]) -> None:
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    warpers = {
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    logits = 3 * torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    chain = LogitsProcessorList([warpers[name](value) for name, value in settings.items()])
    expected = chain(torch.empty(50, 0), logits.clone()).softmax(-1)
    found = filtered_log_probs(logits, LocalRollout(**settings)).exp()
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected)
    assert torch.equal(logits, before), "the logits given must not change"


def test_extreme_temperatures_and_precisions() -> None:
    logits = torch.tensor([[1.0, 5.0, -math.inf, 4.0]])
    assert filtered_log_probs(logits, LocalRollout(temperature=1e-38)).exp().tolist() == [[0, 1, 0, 0]]
    flat = filtered_log_probs(logits, LocalRollout(temperature=1e30)).exp()
    assert flat[0].tolist() == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])
    assert filtered_log_probs(logits.bfloat16(), LocalRollout()).dtype == torch.float32
    assert filtered_log_probs(logits.double(), LocalRollout()).dtype == torch.float64


def test_draw_takes_the_quantile() -> None:
    logp = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64).log()
    u = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, LAST], dtype=torch.float64)
    assert draw(logp.expand(6, 3), u).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("u", [0.0, 2.0**-53, 0.5, 1 - 1e-9, LAST])
@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_draw_never_takes_a_token_of_probability_zero(u: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(20, 5000, generator=generator)
    logits[torch.rand(20, 5000, generator=generator) < 0.5] = -math.inf
    logits[:, :50] = -math.inf
    logits[:, -50:] = -math.inf
    logp = logits.log_softmax(-1)  # float32: the probabilities sum to 1 but for rounding, above or below
    token = draw(logp, torch.full((20,), u, dtype=torch.float64))
    assert logp.gather(-1, token[:, None]).isfinite().all()
    allowed = logp.isfinite()
    if u == 0.0:
        assert torch.equal(token, allowed.int().argmax(-1)), "quantile 0 is the first possible token"


@pytest.mark.parametrize("log_total", [-1e-6, 0.0, 1e-6])
def test_draw_survives_sums_that_are_not_one(log_total: float) -> None:
    """A quantile beyond the sum as computed must give the last possible token, not one past it."""
    logp = torch.tensor([[-math.inf, math.log(0.5), math.log(0.5), -math.inf]], dtype=torch.float64) + log_total
    assert draw(logp, torch.tensor([LAST], dtype=torch.float64)).tolist() == [2]
    assert draw(logp, torch.tensor([1.0], dtype=torch.float64)).tolist() == [2], "even rounded up to 1"
    assert draw(logp, torch.tensor([0.0], dtype=torch.float64)).tolist() == [1]


def test_draw_survives_sums_that_go_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parallel running sums, as on GPUs, round differently from place to place."""
    cumsum = torch.Tensor.cumsum

    def shaken(self: torch.Tensor, dim: int) -> torch.Tensor:
        return cumsum(self, dim) + 2.0**-52 * (torch.arange(self.shape[-1]) % 2)

    monkeypatch.setattr(torch.Tensor, "cumsum", shaken)
    logp = torch.tensor([[0.5, 0.0, 0.5, 0.0, 0.0]], dtype=torch.float64).log()
    assert draw(logp, torch.tensor([0.5], dtype=torch.float64)).tolist() == [2]
    assert draw(logp, torch.tensor([LAST], dtype=torch.float64)).tolist() == [2]
    blocks = torch.full((1, 5 * BLOCK), -math.inf, dtype=torch.float64)
    blocks[0, 7], blocks[0, 2 * BLOCK + 7] = math.log(0.5), math.log(0.5)
    assert draw(blocks, torch.tensor([0.5], dtype=torch.float64)).tolist() == [2 * BLOCK + 7]
    assert draw(blocks, torch.tensor([LAST], dtype=torch.float64)).tolist() == [2 * BLOCK + 7]


@pytest.mark.parametrize("size", [BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 7 * BLOCK + 100])
def test_draw_is_the_quantile_of_the_whole_running_sum(size: int) -> None:
    """Against Python's own exact sums, in vocabularies of no, one and several blocks."""
    generator = torch.Generator().manual_seed(size)
    logp = (2 * torch.randn(40, size, generator=generator)).log_softmax(-1)
    logp[:, torch.rand(size, generator=generator) < 0.3] = -math.inf
    u = torch.rand(40, generator=generator, dtype=torch.float64)
    for row, uniform, token in zip(logp, u.tolist(), draw(logp, u).tolist(), strict=True):
        p = [math.exp(x) for x in row.tolist()]
        total = math.fsum(p)
        assert math.fsum(p[:token]) / total <= uniform + 1e-6
        assert math.fsum(p[: token + 1]) / total >= uniform - 1e-6
        assert p[token] > 0


def test_where_a_block_s_sum_rounds_up_its_last_possible_token_is_drawn() -> None:
    """1 + 255·2⁻²⁴ is 1 in float32 if summed one by one, more in pairs; neither is what float64 says."""
    p = torch.full((1, BLOCK), 2.0**-24)
    p[0, 0], p[0, -1] = 1.0, 0.0
    for u in (LAST, 1 - 2.0**-25, 1 - 2.0**-20):
        token = draw(p.log(), torch.tensor([u], dtype=torch.float64)).item()
        assert 0 <= token <= BLOCK - 2, "the last is impossible"


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.6}, {"top_k": 30}, {"top_p": 0.9}, {"min_p": 0.01}, {"temperature": 2.0, "top_p": 0.999}],
    ids=str,
)
def test_sample_is_draw_from_the_filtered_distribution(settings: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(60, 3 * BLOCK + 50, generator=generator)
    logits[:, ::7] = -math.inf
    u = torch.rand(60, generator=generator, dtype=torch.float64)
    logp = filtered_log_probs(logits, LocalRollout(**settings))
    before = logits.clone()
    token, found, finite = sample(logits, u, LocalRollout(**settings))
    assert torch.equal(token, draw(logp, u)) and finite.all()
    torch.testing.assert_close(found, logp.gather(-1, token[:, None]).squeeze(-1), atol=1e-6, rtol=1e-6)
    assert torch.equal(logits, before), "the logits given must not change"


def test_sample_greedily_and_of_broken_logits() -> None:
    u = torch.full((4,), 0.5, dtype=torch.float64)
    logits = torch.tensor([[0.0, 2.0, 1.0], [0.0, math.nan, 1.0], [math.inf, 0.0, 1.0], [-math.inf, 0.0, -math.inf]])
    for settings in ({"temperature": 0}, {}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}):
        token, logp, finite = sample(logits, u, LocalRollout(**settings))
        assert finite.tolist() == [True, False, False, True]
        assert token[3] == 1 and logp[3] == 0
        if settings == {"temperature": 0}:
            assert token[0] == 1 and logp[0] == 0


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.99, 0.999999])
@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("top_k", [0, 400])
def test_the_nucleus_in_a_large_vocabulary(top_p: float, spread: float, top_k: int) -> None:
    """However many tokens it takes: by sorting all of them."""
    logits = spread * torch.randn(4, 3000, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    kept = filtered_log_probs(logits, LocalRollout(top_p=top_p, top_k=top_k)).isfinite()
    for row, found in zip(logits.tolist(), kept, strict=True):
        order = sorted(range(3000), key=lambda i: (-row[i], i))[: top_k or None]
        weight = [math.exp(row[i] - row[order[0]]) for i in order]
        total, mass, expected = math.fsum(weight), 0.0, set()
        for i, w in zip(order, weight, strict=True):
            if mass >= top_p * total:
                break
            expected.add(i)
            mass += w
        assert set(found.nonzero().flatten().tolist()) == expected


def test_uniforms_are_the_leading_53_bits_of_a_hash_stream() -> None:
    key = stream_key(5, "data/train.jsonl:7", [3, 1, 4])
    stream = hashlib.shake_256(key + bytes([2, 1, 0, 0, 0, 0, 0, 0])).digest(24)
    words = [int.from_bytes(stream[i : i + 8], "little") for i in (0, 8, 16)]
    assert uniforms(key, 258, 3).tolist() == [(word >> 11) / 2**53 for word in words]


def test_uniforms_depend_on_seed_prompt_record_and_sample_alone() -> None:
    def first(seed: int = 0, origin: str = "a.jsonl:1", prompt: tuple[int, ...] = (1, 2), sample: int = 0) -> float:
        return uniforms(stream_key(seed, origin, prompt), sample, 1).item()

    changed = [first(seed=1), first(origin="a.jsonl:2"), first(prompt=(1, 2, 0)), first(prompt=(12,)), first(sample=1)]
    assert len({first(), *changed}) == 6
    assert first(origin="/elsewhere/a.jsonl:1") == first()


def test_uniforms_are_uniform_and_a_longer_stream_goes_on() -> None:
    key = stream_key(0, "", [1])
    many = uniforms(key, 0, 20_000)
    assert torch.equal(uniforms(key, 0, 7), many[:7])
    assert many.min() >= 0 and many.max() < 1
    assert stats.kstest(many.numpy(), "uniform").pvalue > 0.01
    across = [uniforms(key, sample, 1).item() for sample in range(5000)]
    assert stats.kstest(across, "uniform").pvalue > 0.01
    assert abs(stats.pearsonr(many[:-1], many[1:]).statistic) < 0.03
