"""From logits to a drawn token: the filtered distribution, the random numbers, the draw."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from alignlab.rollout.settings import RolloutSettings

BLOCK = 256
"""Probabilities summed at once where the quantile is looked for: first which block it is in, then which token."""

NUCLEUS = 256
"""How many of the most probable tokens are looked at first for `top_p`; eight times as many where that is too few."""


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
    logits = _widened(logits)
    if settings.temperature == 0:
        certain = torch.full_like(logits, -math.inf)
        return certain.scatter_(-1, logits.argmax(-1, keepdim=True), 0.0)
    return _filtered(logits, settings).log_softmax(-1)


def sample(logits_RV: Tensor, uniform_R: Tensor, settings: RolloutSettings) -> tuple[Tensor, Tensor, Tensor]:
    """For each row the token at quantile `uniform_R` of the filtered distribution, see `draw`.

    Returns:
        the tokens, int64; their log-probs as in `filtered_log_probs`, in nats; whether the row's logits were finite
        but for banned tokens (where not, the token means nothing). Shape (R,) each.
    """
    logits_RV = _widened(logits_RV)
    if settings.temperature == 0:
        token_R = logits_RV.argmax(-1)
        finite_R = logits_RV.gather(-1, token_R[:, None]).squeeze(-1).isfinite()
        return token_R, torch.zeros_like(token_R, dtype=logits_RV.dtype), finite_R
    probability_RV = _filtered(logits_RV, settings).softmax(-1)
    token_R, total_R = _quantile(probability_RV, uniform_R)
    logp_R = probability_RV.gather(-1, token_R[:, None]).squeeze(-1).log().clamp(max=0)
    return token_R, logp_R, total_R.isfinite()


def _widened(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _filtered(logits: Tensor, settings: RolloutSettings) -> Tensor:
    """Logits of the filtered distribution, temperature > 0."""
    top_k = settings.top_k if settings.top_k < logits.shape[-1] else 0
    if settings.temperature == 1 and not top_k and settings.top_p == 1 and settings.min_p == 0:
        return logits
    scaled = (logits - logits.amax(-1, keepdim=True)) / settings.temperature  # 0 for the most probable: no overflow
    if top_k or settings.top_p < 1:
        scaled = _keep_top(scaled, top_k, settings.top_p)
    if settings.min_p > 0:
        scaled = scaled.masked_fill(scaled < math.log(settings.min_p), -math.inf)
    return scaled


def _keep_top(scaled: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf for all but the most probable tokens; without sorting the vocabulary."""
    size = scaled.shape[-1]
    width = top_k or min(NUCLEUS, size)
    ordered = scaled.topk(width).values
    count: Tensor | int = width
    least = ordered[..., -1:]
    if top_p < 1:
        while True:
            total = (ordered if top_k else scaled).logsumexp(-1, keepdim=True)
            cumulative = (ordered - total).exp().cumsum(-1)
            if top_k or width == size or bool((cumulative[..., -1] >= top_p).all()):
                break
            width = min(8 * width, size)
            ordered = scaled.topk(width).values
        before = torch.nn.functional.pad(cumulative[..., :-1], (1, 0))  # probability of all more probable tokens
        count = (before < top_p).sum(-1, keepdim=True).clamp(min=1)
        least = ordered.gather(-1, count - 1)
    kept = scaled >= least
    if bool((kept.sum(-1, keepdim=True) > count).any()):  # of equally probable tokens at the border, the first
        above, border = scaled > least, scaled == least
        kept = above | (border & (border.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
    return scaled.masked_fill(~kept, -math.inf)


def draw(logp_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """The token at quantile `uniform_R` of each row's distribution, in the order of token ids; int64, shape (R,).

    Never a token of probability zero, whatever the rounding: candidates are those of positive probability only, and
    the quantile is of the sum as computed, so that it lies below it for any uniform below 1.

    Args:
        logp_RV: log-probs, each row with at least one finite value.
        uniform_R: in [0, 1), float64.
    """
    return _quantile(logp_RV.exp(), uniform_R)[0]


def _quantile(probability_RV: Tensor, uniform_R: Tensor) -> tuple[Tensor, Tensor]:
    """See `draw`; returns also the sum of each row's probabilities as computed.

    Running sums, in float64, are over blocks, and over the tokens of one block: not over the vocabulary.
    """
    size = probability_RV.shape[-1]
    whole = size - size % BLOCK
    sums = [probability_RV[:, :whole].unflatten(-1, (-1, BLOCK)).sum(-1)] if whole else []
    if whole < size:
        sums.append(probability_RV[:, whole:].sum(-1, keepdim=True))
    block_sum = torch.cat(sums, -1).double()
    running = block_sum.cumsum(-1)
    upto = running.masked_fill(block_sum == 0, -1.0)
    total = upto.amax(-1, keepdim=True)
    target = torch.minimum(uniform_R[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    block = _first(upto > target)
    before = (running - block_sum).gather(-1, block)

    place = block * BLOCK + torch.arange(BLOCK, device=block.device)
    inside = probability_RV.gather(-1, place.clamp(max=size - 1)).double().masked_fill_(place >= size, 0.0)
    possible = inside > 0
    # Where rounding differs from the block's own sum, the quantile may lie past its last possible token: take that.
    last = BLOCK - 1 - _first(possible.flip(-1))
    reached = possible & (before + inside.cumsum(-1) > target)
    found = torch.where(reached.any(-1, keepdim=True), _first(reached), last)
    return place.gather(-1, found).clamp(max=size - 1).squeeze(-1), total.squeeze(-1)


def _first(true: Tensor) -> Tensor:
    """Where the first True of each row is, shape (R, 1); 0 without one."""
    return true.to(torch.int8).argmax(-1, keepdim=True)  # the first of the maxima


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
