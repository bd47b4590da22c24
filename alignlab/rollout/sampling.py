"""From logits to a drawn token: the filtered distribution, the random numbers, the draw."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from alignlab.rollout.settings import RolloutSettings


def filtered_log_probs(logits: Tensor, settings: RolloutSettings) -> Tensor:
    """Log-probs of the very distribution that is sampled from, in nats, normalised; -inf for what cannot be drawn.

    In this order: temperature; `top_k`, exactly the k most probable tokens (Fan et al. 2018, arXiv:1805.04833);
    `top_p`, of what is left and renormalised the smallest set of most probable tokens that holds that probability
    (Holtzman et al. 2019, arXiv:1904.09751); `min_p`, tokens at least that fraction as probable as the most probable
    (Nguyen et al. 2024, arXiv:2407.01082). Ties go to the lower token id. The most probable token always remains.

    Args:
        logits: shape (..., V), at least one finite value in each row; -inf for banned tokens.
        settings: temperature 0 puts all probability on the most probable token.

    Returns:
        shape (..., V), float32, or float64 where the logits are.
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    if settings.temperature == 0:
        certain = torch.full_like(logits, -math.inf)
        return certain.scatter_(-1, logits.argmax(-1, keepdim=True), 0.0)
    scaled = (logits - logits.amax(-1, keepdim=True)) / settings.temperature  # 0 for the most probable: no overflow
    if 0 < settings.top_k < logits.shape[-1] or settings.top_p < 1:
        scaled = _keep_top(scaled, settings.top_k, settings.top_p)
    if settings.min_p > 0:
        scaled = scaled.masked_fill(scaled < math.log(settings.min_p), -math.inf)
    return scaled.log_softmax(-1)


def _keep_top(scaled: Tensor, top_k: int, top_p: float) -> Tensor:
    ordered, index = torch.sort(scaled, dim=-1, descending=True, stable=True)
    if top_k:
        ordered[..., top_k:] = -math.inf
    if top_p < 1:
        cumulative = ordered.softmax(-1).cumsum(-1)
        before = torch.nn.functional.pad(cumulative[..., :-1], (1, 0))  # probability of all more probable tokens
        ordered = ordered.masked_fill(before >= top_p, -math.inf)
    return torch.empty_like(scaled).scatter_(-1, index, ordered)


def draw(logp_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """The token at quantile `uniform_R` of each row's distribution, in the order of token ids; int64, shape (R,).

    Never a token of probability zero, whatever the rounding: candidates are those of positive probability only, and
    the quantile is of the sum as computed, so that it lies below it for any uniform below 1.

    Args:
        logp_RV: log-probs, each row with at least one finite value.
        uniform_R: in [0, 1), float64.
    """
    probability = logp_RV.double().exp()
    cumulative = probability.cumsum(-1).masked_fill(probability == 0, -1.0)
    total = cumulative.amax(-1, keepdim=True)
    below_total = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(uniform_R[:, None] * total, below_total)
    return (cumulative > target).to(torch.int8).argmax(-1)  # the first of the maxima


def stream_key(seed: int, origin: str, prompt_ids: Sequence[int]) -> bytes:
    """What identifies a prompt's random numbers: the seed, its token ids and its record.

    The folder is no part of the record's name, so that moving the data changes no sample.
    """
    record = origin.rpartition("/")[2]
    return hashlib.sha256(repr((int(seed), record, [int(i) for i in prompt_ids])).encode()).digest()


def uniforms(key: bytes, sample: int, count: int) -> Tensor:
    """The first `count` of the uniforms in [0, 1) that belong to one sample, float64, shape (count,).

    A counter-based stream: number t is a function of key, sample and t alone (SHAKE-256), the same on every device,
    for every batch and for every `count`.
    """
    bits = bytearray(hashlib.shake_256(key + sample.to_bytes(8, "little")).digest(8 * count))
    return ((torch.frombuffer(bits, dtype=torch.int64) >> 11) & ((1 << 53) - 1)).double() * 2.0**-53
