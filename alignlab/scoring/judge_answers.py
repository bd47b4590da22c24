"""From a judge's text and log-probs to a verdict."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from alignlab.scoring.endpoint import Answer

NUMBER = r"-?\d+(?:\.\d+)?"


def find_answer(text: str, wanted: str) -> re.Match[str] | None:
    """Where the answer stands in a text; its first group is the answer. None where that is not sure.

    Taken are, in this order: what follows the last "Answer:", "Preferred Response=", "score is" or the like; a first or
    last line with nothing else on it, provided that the two do not contradict each other.

    Args:
        wanted: a pattern of the answer, with one group around it.
    """
    word = r"(?:preferred(?:\s+response)?|preference|answer|verdict|choice|score|rating|grade)"
    marked = rf"(?i:\b{word}\W{{0,4}}(?:\bis\b|[=:])\W{{0,6}}?(?:\b(?:response|option)\W{{1,4}})?){wanted}(?![\w/%])"
    matches = list(re.finditer(marked, text))
    if matches:
        return matches[-1]
    alone = re.compile(rf"[\s*_(\[\"'`]*(?i:(?:response|option)\W{{1,4}})?{wanted}[\s*_)\]\"'`.!]*")
    lines = [m for m in re.finditer(r"[^\n]+", text) if m[0].strip()]
    ends = [m for line in lines[:1] + lines[-1:] if (m := alone.fullmatch(text, line.start(), line.end()))]
    return ends[0] if ends and len({m[1] for m in ends}) == 1 else None


def read_choice(answer: Answer, labels: str) -> tuple[float | None, bool]:
    """Probability that the first label is meant, and whether it comes from log-probs.

    With log-probs it is the softmax over the two labels' tokens (Lee et al. 2023, arXiv:2309.00267; Bai et al. 2022,
    arXiv:2212.08073), in [0, 1]; without, 1 or 0 by the text; None where the text does not say.
    """
    found = find_answer(answer.text, f"([{re.escape(labels)}])")
    if found is None:
        return None, False
    masses = _masses(answer, found, labels)
    if masses is None:
        return float(found[1] == labels[0]), False
    return masses[0] / sum(masses), True


def read_score(answer: Answer, low: float, high: float, soft: bool) -> tuple[float | None, bool]:
    """The score, and whether it comes from log-probs: then the expectation over the integers from `low` to `high`
    (direct RLAIF, Lee et al. 2023). Without, the number in the text; None where there is none, or it
    is not in [low, high]."""
    found = find_answer(answer.text, rf"({NUMBER})(?:\s*/\s*{re.escape(f'{high:g}')}(?:\.0+)?)?")
    if found is None or not low <= float(found[1]) <= high:
        return None, False
    scores = [str(i) for i in range(math.ceil(low), math.floor(high) + 1)] if soft else []
    masses = _masses(answer, found, scores) if scores else None
    if masses is None:
        return float(found[1]), False
    return sum(int(s) * m for s, m in zip(scores, masses, strict=True)) / sum(masses), True


def _masses(answer: Answer, found: re.Match[str], labels: Sequence[str]) -> list[float] | None:
    """Probability of each label's token at the place of the answer; 0 for one that is not among the alternatives. None
    where there are no log-probs there, or the answer is not a token by itself."""
    written = "".join(token for token, _ in answer.tokens)
    place = written.find(answer.text)
    if place < 0:
        return None
    place += found.start(1)
    for token, alternatives in answer.tokens:
        if place < len(token):
            if _bare(token) != found[1]:
                return None
            masses = [sum(math.exp(p) for t, p in alternatives if _bare(t) == label) for label in labels]
            return masses if sum(masses) > 0 else None
        place -= len(token)
    return None


def _bare(token: str) -> str:
    """A token without space and signs around it; "-1" stays itself."""
    return re.sub(r"^[\sĠ▁(\[*_\"'=:]+|[\s)\]*_\"'.]+$", "", token)
