"""AI feedback: preferences and rewards from a language model behind an endpoint.

RLAIF (Lee et al. 2023, arXiv:2309.00267) asks an off-the-shelf model which of two responses is better, reads the
preference off the log-probs of the tokens "1" and "2", and asks in both orders, since models favour a place. Its direct
variant asks for a score instead. Constitutional AI (Bai et al. 2022, arXiv:2212.08073) does the same with a principle
in the question: write yours into the template.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from alignlab.core import AlignlabError, Group, require
from alignlab.scoring.endpoint import Answer, Endpoint, Message
from alignlab.scoring.judge_answers import read_choice, read_score
from alignlab.scoring.pairwise import Match, round_robin

PAIR_TEMPLATE = """\
You judge responses to a prompt. A good response does what the prompt asks for, is correct, helpful, honest and \
harmless, and is clearly written. Its length and its place in this text do not count.

Prompt:
{prompt}

Response {label_a}:
{a}

Response {label_b}:
{b}

Which response is better? Answer with {label_a} or {label_b} and nothing else.
Preferred Response="""

SCORE_TEMPLATE = """\
You judge responses to a prompt. A good response does what the prompt asks for, is correct, helpful, honest and \
harmless, and is clearly written. Its length does not count.

Prompt:
{prompt}

Response:
{response}

How good is the response, from {low} (worst) to {high} (best)? Answer with a number and nothing else.
Score="""

Item = tuple[str, str]
"""A question, and the record it is about."""


class Judge:
    """What both kinds of judge share: a question is asked again until the answer can be read."""

    alternatives: ClassVar[int]
    """Log-probs to ask for at each token."""

    def __init__(
        self,
        endpoint: Endpoint,
        template: str,
        placeholders: Sequence[str],
        soft: bool,
        attempts: int,
        unparsable: Literal["error", "tie"],
    ) -> None:
        for name in placeholders:
            require("{" + name + "}" in template, "scoring.template", template, f"must contain {{{name}}}")
        require(attempts >= 1, "scoring.attempts", attempts, "must be at least 1")
        require(unparsable in ("error", "tie"), "scoring.unparsable", unparsable, "must be error or tie")
        self.endpoint, self.template, self.soft = endpoint, template, soft
        self.attempts, self.unparsable = attempts, unparsable
        self.counts = {"judged": 0, "soft": 0, "unparsable": 0, "ties": 0}

    def read(self, answer: Answer) -> tuple[float | None, bool]:
        """The verdict, None where it cannot be read, and whether it comes from log-probs."""
        raise NotImplementedError

    @property
    def reminder(self) -> str:
        """What is said when an answer could not be read."""
        raise NotImplementedError

    @property
    def undecided(self) -> float:
        """The verdict of a tie."""
        raise NotImplementedError

    @property
    def report(self) -> dict[str, float]:
        """How judging went so far, in this process: questions `judged` (from the cache or not), answers that were
        `unparsable`, questions that became `ties` for it, and the share of `soft` verdicts."""
        judged = max(self.counts["judged"], 1)
        return {**self.counts, "soft": self.counts["soft"] / judged}

    def render(self, **values: str) -> str:
        """The template with its placeholders replaced, in one pass: braces in a text are just text."""
        pattern = re.compile("{(" + "|".join(values) + ")}")
        return pattern.sub(lambda found: values[found[1]], self.template)

    def verdicts(self, questions: Mapping[str, str]) -> dict[str, float]:
        """The verdict on each question; the values are the records they are about, for messages."""
        found = self.endpoint.map(self._verdict, list(questions.items()))
        for _, (_, soft, unread, tie) in found.items():
            self.counts["judged"] += 1
            self.counts["soft"] += soft
            self.counts["unparsable"] += unread
            self.counts["ties"] += tie
        return {question: value for (question, _), (value, *_) in found.items()}

    def _verdict(self, item: Item) -> tuple[float, bool, int, bool]:
        """The verdict, whether it is soft, how many answers could not be read, whether it is a tie for that."""
        question, origin = item
        messages: list[Message] = [{"role": "user", "content": question}]
        answer = Answer("")
        for attempt in range(self.attempts):
            answer = self.endpoint.ask(messages, self.alternatives if self.soft else 0)
            value, soft = self.read(answer)
            if value is not None:
                return value, soft, attempt, False
            messages.append({"role": "assistant", "content": answer.text or "(no answer)"})
            messages.append({"role": "user", "content": self.reminder})
        if self.unparsable == "error":
            raise AlignlabError(
                f"{origin or 'a record'}: the judge's answer cannot be read in {self.attempts} attempts: "
                f"{' '.join(answer.text.split())[:200]!r}. Mend scoring.template, raise "
                "scoring.endpoint.parameters.max_tokens, or count such as ties: scoring.unparsable=tie"
            )
        return self.undecided, False, self.attempts, True


class JudgePairs(Judge):
    """A judge compares the responses of a group two by two.

    Fills `score` with a response's mean probability of being preferred to each of the others, all of them, in [0, 1];
    in groups of two, `preference` as well, the same number. Of two responses with the same text neither is preferred,
    and nobody is asked.

    Args:
        endpoint: whom to ask.
        template: of the question, with {prompt}, {a} and {b}, and {label_a} and {label_b} for what they are called.
        labels: two characters that responses are called by, as "12" or "AB".
        soft: probabilities from log-probs, where the endpoint gives some; false: 0 or 1 by the text.
        swap: ask for each pair in both orders and average, which cancels the judge's bias for a place; false: in one
            order, drawn for each pair by its text.
        attempts: how often to ask until the answer can be read, each time with the answer before and a reminder.
        unparsable: what an answer is then that still cannot be read: an "error", or a "tie" of 1/2.
    """

    alternatives = 5
    fills = ("preference", "score")

    def __init__(
        self,
        endpoint: Endpoint,
        template: str | None = None,
        labels: str = "12",
        soft: bool = True,
        swap: bool = True,
        attempts: int = 3,
        unparsable: Literal["error", "tie"] = "error",
    ) -> None:
        super().__init__(endpoint, template or PAIR_TEMPLATE, ("prompt", "a", "b"), soft, attempts, unparsable)
        good = len(labels) == 2 and labels.isalnum() and len(set(labels)) == 2
        require(good, "scoring.labels", labels, "must be two different letters or digits, as in AB")
        self.labels, self.swap = labels, swap
        self._asked, self._first, self._swapped, self._agreed = 0, 0.0, 0, 0

    @property
    def reminder(self) -> str:
        return f"Answer with {self.labels[0]} or {self.labels[1]} and nothing else."

    @property
    def undecided(self) -> float:
        return 0.5

    @property
    def report(self) -> dict[str, float]:
        """As above; `position_bias` is by how much the mean probability of the response shown first exceeds 1/2 (fair
        only with swap), `agreement` the share of pairs in which both orders prefer the same response."""
        bias = {"position_bias": self._first / self._asked - 0.5} if self._asked else {}
        agreement = {"agreement": self._agreed / self._swapped} if self._swapped else {}
        return {**super().report, **bias, **agreement}

    def read(self, answer: Answer) -> tuple[float | None, bool]:
        return read_choice(answer, self.labels)

    def score(self, groups: Sequence[Group]) -> None:
        for group in groups:
            if len(group.responses) < 2:
                raise AlignlabError(
                    f"{group.origin or 'a group'}: a judge of pairs needs two responses or more, not "
                    f"{len(group.responses)}: raise the samples, or use scoring=judge_scores"
                )
        found = round_robin([len(g.responses) for g in groups], lambda matches: self._compare(groups, matches))
        for group, chances in zip(groups, found, strict=True):
            for response, chance in zip(group.responses, chances, strict=True):
                response.columns["score"] = chance
                if len(chances) == 2:
                    response.columns["preference"] = chance
        report = self.report
        said = f", first shown {report['position_bias']:+.3f} more likely" if "position_bias" in report else ""
        self.endpoint.tell(f"{said}, {report['unparsable']:.0f} answers unparsable")

    def _compare(self, groups: Sequence[Group], matches: Sequence[Match]) -> list[float]:
        """The probability that the first response is better than the second, for each match."""
        asked: list[list[tuple[str, bool]]] = []  # the question, and whether the first response is shown first
        questions: dict[str, str] = {}
        for g, i, j in matches:
            group = groups[g]
            a, b = group.responses[i].text, group.responses[j].text
            orders = [True, False] if self.swap else [_coin(group.prompt, a, b)]
            both = [
                (self._question(group.prompt, a, b) if o else self._question(group.prompt, b, a), o) for o in orders
            ]
            asked.append(both if a != b else [])
            questions |= {question: group.origin for question, _ in asked[-1]}
        first = self.verdicts(questions)
        self._asked += len(first)
        self._first += sum(first.values())
        chances = []
        for both in asked:
            votes = [first[q] if forward else 1 - first[q] for q, forward in both]
            if len(votes) == 2:
                self._swapped += 1
                self._agreed += (votes[0] - 0.5) * (votes[1] - 0.5) > 0
            chances.append(sum(votes) / len(votes) if votes else 0.5)
        return chances

    def _question(self, prompt: str, a: str, b: str) -> str:
        return self.render(prompt=prompt, a=a, b=b, label_a=self.labels[0], label_b=self.labels[1])


class JudgeScores(Judge):
    """A judge gives each response a number, which fills `reward`, in [low, high].

    Args:
        endpoint: whom to ask.
        template: of the question, with {prompt} and {response}, and {low} and {high} for the range.
        low, high: the range of scores, low < high; a number outside counts as no answer.
        soft: the expectation over the scores' tokens, where the endpoint gives log-probs. Needs integers of one digit
            as limits, 0 <= low: many tokenizers spell 10 as 1 and 0. False: the number in the text.
        attempts: how often to ask until the answer can be read, each time with the answer before and a reminder.
        unparsable: what an answer is then that still cannot be read: an "error", or a "tie", the middle of the range.
    """

    alternatives = 20
    fills = ("reward",)

    def __init__(
        self,
        endpoint: Endpoint,
        template: str | None = None,
        low: float = 1.0,
        high: float = 9.0,
        soft: bool = True,
        attempts: int = 3,
        unparsable: Literal["error", "tie"] = "error",
    ) -> None:
        super().__init__(endpoint, template or SCORE_TEMPLATE, ("prompt", "response"), soft, attempts, unparsable)
        require(low < high, "scoring.low", low, f"must be below scoring.high={high}")
        digits = low in range(10) and high in range(10)
        require(digits or not soft, "scoring.soft", soft, "needs scoring.low and high among 0, 1, ... 9")
        self.low, self.high = low, high

    @property
    def reminder(self) -> str:
        return f"Answer with a number from {self.low:g} to {self.high:g} and nothing else."

    @property
    def undecided(self) -> float:
        return (self.low + self.high) / 2

    def read(self, answer: Answer) -> tuple[float | None, bool]:
        return read_score(answer, self.low, self.high, self.soft)

    def score(self, groups: Sequence[Group]) -> None:
        questions = {self._question(g.prompt, r.text): g.origin for g in groups for r in g.responses}
        found = self.verdicts(questions)
        for group in groups:
            for response in group.responses:
                response.columns["reward"] = found[self._question(group.prompt, response.text)]
        self.endpoint.tell(f", {self.counts['unparsable']} answers unparsable")

    def _question(self, prompt: str, response: str) -> str:
        return self.render(prompt=prompt, response=response, low=f"{self.low:g}", high=f"{self.high:g}")


def _coin(*texts: str) -> bool:
    """Heads or tails, by the texts alone."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).digest()[0] % 2 == 0
