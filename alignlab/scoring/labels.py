"""Labels made from rewards, as a noisy annotator would give them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from alignlab.core import AlignlabError, Group, NeedsPolicy, Scorer, require
from alignlab.core.parts import calling, score


class BradleyTerryLabels:
    """Preferences under P(a ≻ b) = σ((r_a − r_b)/τ) (Bradley and Terry 1952).

    With `certain` false, groups of two get the probability itself, as `preference`. Otherwise each response gets a
    `score` of r/τ plus Gumbel noise, a draw from the Plackett-Luce model: of any two responses the one with the
    higher score is a draw from the equation above.

    Args:
        reward: the scorer that fills `reward`.
        temperature: τ, in units of reward, > 0.
        certain: whether a label says which response won, drawn with that probability, or is the probability itself.
        seed: of the draws. A label depends on the seed, the record (file name and line, not its folder, so that moving
            the data changes no label) and the responses alone.
    """

    def __init__(self, reward: Scorer, temperature: float, certain: bool = True, seed: int = 0) -> None:
        require(temperature > 0, "scoring.temperature", temperature, "must be > 0")
        self.reward, self.temperature, self.certain, self.seed = reward, temperature, certain, seed
        self.fills = ("reward", "score" if certain else "preference")

    def bind(self, policy: Any, tokenizer: Any) -> None:
        """See `alignlab.core.NeedsPolicy`: for the scorer of the reward."""
        if isinstance(self.reward, NeedsPolicy):
            with calling(self.reward, "bind"):
                self.reward.bind(policy, tokenizer)

    def score(self, groups: Sequence[Group]) -> None:
        score(self.reward, groups)
        for group in groups:
            scaled = [float(r.columns["reward"]) / self.temperature for r in group.responses]  # type: ignore[arg-type]
            if self.certain:
                noise = self._generator(group).gumbel(size=len(scaled))
                for response, value, extra in zip(group.responses, scaled, noise, strict=True):
                    response.columns["score"] = value + float(extra)
            else:
                if len(scaled) != 2:
                    raise AlignlabError(f"{group.origin}: probabilities are for pairs, not {len(scaled)} responses")
                p = 1 / (1 + math.exp(min(max(scaled[1] - scaled[0], -700), 700)))
                for response, value in zip(group.responses, (p, 1 - p), strict=True):
                    response.columns["preference"] = value

    def _generator(self, group: Group) -> np.random.Generator:
        record = group.origin.rpartition("/")[2]
        key = repr((self.seed, record, group.prompt_ids, [r.token_ids for r in group.responses]))
        return np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little"))
