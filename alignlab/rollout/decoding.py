"""Sequences that grow by a token at a time, with what the network remembers of them, for any architecture."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignlab.core.memory import is_memory_error
from alignlab.models import PackedModel, evaluating
from alignlab.models.probe import REFUSALS, tolerance

log = logging.getLogger(__name__)

_modes: weakref.WeakKeyDictionary[Any, Mode] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Mode:
    """How a network can be decoded exactly.

    Attributes:
        cached: it keeps keys and values, or states, and these can be repeated and dropped by row. Where not, every
            step runs over the whole sequences again: slow, but right.
        padded: prompts of different lengths can share a batch, padded on the left.
    """

    cached: bool
    padded: bool


class Decoding:
    """A batch of sequences being extended.

    Attributes:
        logits_RV: logits of the next token of each of the R rows, as the network's own forward gives them.
    """

    logits_RV: Tensor

    tokens = 0
    """Kept for others than its rows: none come on the way."""

    def __init__(self, model: PackedModel, prompts: Sequence[Sequence[int]] = (), cached: bool = True) -> None:
        """Run the prompts, a row for each."""
        self._network = model.base
        self._accepts = inspect.signature(self._network.forward).parameters
        self._states = "cache_params" in self._accepts  # what state-space models call their cache
        self._cached = cached
        self._cache: Any = None
        self._device = model.device
        if prompts:
            self._begin(prompts)

    def _begin(self, prompts: Sequence[Sequence[int]]) -> None:
        length = max(len(p) for p in prompts)
        padding = [length - len(p) for p in prompts]
        # Any token serves as padding, since it is masked; a real one makes the trial below notice where it is not.
        ids = [[p[0]] * pad + list(p) for pad, p in zip(padding, prompts, strict=True)]
        self._ids_RL = torch.tensor(ids, device=self._device)
        self._mask_RL = torch.tensor([[0] * pad + [1] * (length - pad) for pad in padding], device=self._device)
        self._run(length)

    def admit(self, contexts: Sequence[Sequence[int]], counts: Sequence[int], room: int) -> None:
        """Begin `counts` rows with each context; once, at the start."""
        self._begin(contexts)
        self.select([i for i, count in enumerate(counts) for _ in range(count)])

    def retain(self, going: Sequence[int]) -> list[int]:
        """Let the other rows go, at once: every step copies the cache anyway.

        Returns:
            The rows that go on, in their new order.
        """
        if going:
            self.select(going)
        return list(going)

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order; a row may be taken several times."""
        index = torch.tensor(rows, device=self._ids_RL.device)
        self.logits_RV = self.logits_RV[index]
        self._ids_RL, self._mask_RL = self._ids_RL[index], self._mask_RL[index]
        if self._cache is not None:
            self._cache.reorder_cache(index)  # an index_select, the only one that every kind of cache layer has

    def append(self, token_R: Tensor) -> None:
        """One more token for each row."""
        self._ids_RL = torch.cat([self._ids_RL, token_R[:, None]], 1)
        self._mask_RL = torch.cat([self._mask_RL, torch.ones_like(token_R)[:, None]], 1)
        self._run(1 if self._cached else self._ids_RL.shape[1])

    def _run(self, count: int) -> None:
        """Forward over the last `count` tokens of each row."""
        cache_name = "cache_params" if self._states else "past_key_values"
        inputs: dict[str, Any] = {
            "attention_mask": self._mask_RL,
            "position_ids": (self._mask_RL.cumsum(-1) - 1).clamp(min=0)[:, -count:],
            "use_cache": self._cached,
            "logits_to_keep": 1,
        }
        if self._cache is not None:
            inputs[cache_name] = self._cache
            if self._states:
                del inputs["attention_mask"]  # of the new tokens only, none of which is padding
        inputs = {name: value for name, value in inputs.items() if name in self._accepts}
        out = self._network(input_ids=self._ids_RL[:, -count:], **inputs)
        self.logits_RV = out.logits[:, -1]
        if self._cached:
            self._cache = out[cache_name]


def decoding_mode(model: PackedModel) -> Mode:
    """The fastest mode that is exact for this model; tried once for each network, however many engines it gets."""
    if model.base not in _modes:
        _modes[model.base] = _probe(model)
    return _modes[model.base]


def _probe(model: PackedModel) -> Mode:
    """Try the modes on random tokens, since being wrong would be silent.

    The yardstick is the network's own forward over one whole sequence at a time, without cache or padding.
    """
    with torch.no_grad(), evaluating(model), model.precision():
        for mode in (Mode(True, True), Mode(True, False), Mode(False, True)):
            try:
                if _exact(model, mode):
                    break
            except REFUSALS as error:  # some architectures have no cache, or one that cannot be indexed
                if is_memory_error(error):
                    raise
        else:
            mode = Mode(False, False)
    name = type(model.base).__name__
    if not mode.cached:
        log.warning("%s: its cache cannot be used here, generation runs whole sequences again for every token", name)
    if not mode.padded:
        log.warning("%s: padding changes its results, only prompts of equal length are generated together", name)
    return mode


def _exact(model: PackedModel, mode: Mode) -> bool:
    """Whether a prefill and two steps, with rows repeated, dropped and reordered, give what the plain forward gives."""
    random = random_tokens(model)
    longest = max(1, min(7, (model.max_length or 1024) - 2))

    def trial() -> Iterator[tuple[Tensor, list[list[int]]]]:
        sequences = [random(longest), random(max(1, longest // 3) if mode.padded else longest)]
        decoding = Decoding(model, sequences, mode.cached)
        yield decoding.logits_RV, sequences
        for chosen in ([1, 0, 0], [2, 0]):
            decoding.select(chosen)
            tokens = random(len(chosen))
            sequences = [[*sequences[i], token] for i, token in zip(chosen, tokens, strict=True)]
            decoding.append(torch.tensor(tokens, device=model.device))
            yield decoding.logits_RV, sequences

    return is_exact(model, trial())


def random_tokens(model: PackedModel) -> Callable[[int], list[int]]:
    """The next so many of a stream of random tokens, always the same."""
    generator = torch.Generator().manual_seed(0)

    def random(count: int) -> list[int]:
        return torch.randint(0, int(model.config.vocab_size), (count,), generator=generator).tolist()

    return random


def is_exact(model: PackedModel, trial: Iterable[tuple[Tensor, list[list[int]]]]) -> bool:
    """Whether logits of the token after each sequence are those of the network's own forward, up to rounding."""

    def plain(ids: list[int]) -> Tensor:
        tokens = torch.tensor([ids], device=model.device)
        return model.base(input_ids=tokens, use_cache=False).logits[0, -1].float().log_softmax(-1)

    differences: list[Tensor] = []
    contributions: list[Tensor] = []
    for logits_RV, sequences in trial:
        expected = torch.stack([plain(ids) for ids in sequences])
        without_context = torch.stack([plain(ids[-1:]) for ids in sequences])
        differences.append((logits_RV.float().log_softmax(-1) - expected).abs().mean())
        contributions.append((without_context - expected).abs().mean())
    absolute, relative = tolerance(model.dtype, model.device)
    limit = min(absolute, relative * float(torch.stack(contributions).mean()))
    return bool(torch.stack(differences).max() <= limit)
