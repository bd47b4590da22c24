"""What a judge's endpoint replies, and the verdict in its text and log-probs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

NUMBER = r"-?\d+(?:\.\d+)?"
MOST_TOKENS = 10_000_000
"""No prompt or answer has more: an endpoint that says so, or says a negative number, has not counted."""
ROUNDING = 0.01
"""A log-prob may exceed 0 by so much."""


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: the answer, "" where there was none.
        tokens: for each token of the answer its text and the log-probs, in nats, of the likeliest alternatives by their
            text (the same text may come several times); empty where the endpoint gave none.
        prompt_tokens, completion_tokens: what was paid for; 0 where the endpoint does not say.
    """

    text: str
    tokens: list[tuple[str, list[tuple[str, float]]]] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @classmethod
    def read(cls, body: str, clean: Callable[[str], str] = str) -> Answer:
        """From the body of a reply. Log-probs that are none, and counts of tokens that cannot be, are left out.

        Args:
            clean: what becomes of texts.

        Raises:
            ValueError: it is no chat completion.
        """
        try:
            reply = json.loads(body)
            choice = reply["choices"][0]
            text = str(choice["message"].get("content") or "")
            usage = reply.get("usage")
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        usage = usage if isinstance(usage, dict) else {}
        counts = (_count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")))
        return cls(_whole(clean(text)), _read_tokens(choice, clean), *counts)

    @classmethod
    def kept(cls, values: Any) -> Answer:
        """From a cache.

        Raises:
            ValueError: it is no answer.
        """
        return TypeAdapter(cls).validate_python(values)


def _read_tokens(choice: Mapping[str, Any], clean: Callable[[str], str]) -> list[tuple[str, list[tuple[str, float]]]]:
    """The tokens of a choice with their alternatives; none where one of the log-probs is not a log-prob."""
    try:
        listed = (choice.get("logprobs") or {}).get("content") or []
        found = [
            (
                _whole(clean(str(t["token"]))),
                [(_whole(clean(str(o["token"]))), float(o["logprob"])) for o in t.get("top_logprobs") or []],
            )
            for t in listed
        ]
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError):
        return []
    return found if all(p <= ROUNDING for _, alternatives in found for _, p in alternatives) else []


def _whole(text: str) -> str:
    """The text with a mark in place of each half of a character, which no request and no file takes."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _count(value: Any) -> int:
    """A number of tokens; 0 where it is none that can be."""
    try:
        count = 0 if isinstance(value, bool) else int(value or 0)
    except (TypeError, ValueError, OverflowError):
        return 0
    return count if 0 <= count <= MOST_TOKENS else 0


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
