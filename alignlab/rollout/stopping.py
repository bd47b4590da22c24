"""When a response ends by itself, and what its text is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alignlab.core import ConfigError
from alignlab.models import PackedModel
from alignlab.rollout.settings import RolloutSettings

SPARE_TOKENS = 8
"""Tokens decoded besides those that a stop string can span: for context, and for tokens that yield no text."""


class Stopping:
    """End tokens, stop strings and banned tokens of one model and settings.

    End tokens are those of the tokenizer and of the model's generation config, the configured `stop_tokens`, and
    those of `stop` that are special tokens (which have no text to be found in).

    Attributes:
        tokens: ids of the end tokens.
        strings: the stop strings.
        suppressed: ids of tokens that are never drawn.

    Raises:
        ConfigError: for a token that the model or its tokenizer does not have, or where nothing is left to draw.
    """

    def __init__(self, model: PackedModel, settings: RolloutSettings) -> None:
        self._tokenizer = model.tokenizer
        self._vocabulary = int(model.config.vocab_size)
        self._least = settings.min_new_tokens
        special = {str(t): i for i, t in model.tokenizer.added_tokens_decoder.items() if t.special}
        self.strings = [s for s in settings.stop if s not in special]
        self.tokens = frozenset(
            [
                *_listed(model.tokenizer.eos_token_id),
                *_listed(getattr(getattr(model.base, "generation_config", None), "eos_token_id", None)),
                *self._ids("stop_tokens", settings.stop_tokens),
                *(special[s] for s in settings.stop if s in special),
            ]
        )
        self.suppressed = frozenset(self._ids("suppress_tokens", settings.suppress_tokens))
        self._window = max((len(s.encode()) for s in self.strings), default=0) + SPARE_TOKENS
        if len(self._banned(0)) == self._vocabulary:
            raise ConfigError("rollout.suppress_tokens: no token is left that could begin a response")

    def ban(self, logits_RV: Tensor, step: int) -> Tensor:
        """-inf, in place, for tokens that may not be number `step` (from 0) of a response."""
        if banned := self._banned(step):
            logits_RV.index_fill_(-1, torch.tensor(banned, device=logits_RV.device), -torch.inf)
        return logits_RV

    def ended(self, tokens: list[int]) -> str | None:
        """The response's text where it ends with the last of its tokens, cut before a stop string; None otherwise."""
        if tokens[-1] in self.tokens:
            return self.text(tokens)
        if not self.strings:
            return None
        tail = self.text(tokens[-self._window :])  # what a new token completes lies here; all of it only on a hit
        if not any(s in tail for s in self.strings):
            return None
        text = self.text(tokens)
        early = len(self.text(tokens[: self._least]))  # a stop string that ends in this much text does not count
        found = [text.find(s, max(0, early - len(s) + 1)) for s in self.strings]
        return text[: min(i for i in found if i >= 0)] if max(found) >= 0 else None

    def text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _banned(self, step: int) -> list[int]:
        early = self.tokens if step < self._least else frozenset()
        return sorted(i for i in self.suppressed | early if i < self._vocabulary)

    def _ids(self, key: str, tokens: Sequence[int | str]) -> list[int]:
        known = self._tokenizer.get_vocab() if any(isinstance(t, str) for t in tokens) else {}
        ids = []
        for token in tokens:
            if isinstance(token, str) and token not in known:
                raise ConfigError(
                    f"rollout.{key}: {token!r} is no single token of this tokenizer; rollout.stop is for strings"
                )
            number = known[token] if isinstance(token, str) else token
            if not 0 <= number < self._vocabulary:
                raise ConfigError(f"rollout.{key}: the model has no token {token!r}, only 0 to {self._vocabulary - 1}")
            ids.append(number)
        return ids


def _listed(ids: int | list[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
