"""What a judge's answers become: preferences, scores, ties; against a real server that judges by a known rule."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from alignlab.core import AlignlabError, Batch, ConfigError, Group, Response, Scorer
from alignlab.scoring import Endpoint, JudgePairs, JudgeScores
from alignlab.scoring.endpoint import Answer
from alignlab.scoring.judge_answers import read_choice, read_score
from tests.components import need
from tests.scoring.judge_server import Reply, Server, completion, more_a, serving, shown

need("openai")


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    with ExitStack() as stack:
        yield lambda answer, delay=0.0: stack.enter_context(serving(answer, delay))


def endpoint(server: Server, tmp_path: Path | None = None, **settings: Any) -> Endpoint:
    cache = str(tmp_path / "judge.sqlite") if tmp_path else None
    return Endpoint("rule", server.url, **{"cache": cache, "retries": 0, "timeout": 20.0, **settings})


def group(*texts: str, prompt: str = "say a", line: int = 1) -> Group:
    return Group([5], [Response([6], text=t) for t in texts], f"data.jsonl:{line}", prompt)


def column(groups: Sequence[Group], name: str) -> list[list[float]]:
    return [[float(r.columns[name]) for r in g.responses] for g in groups]  # type: ignore[arg-type]


# Pairs


def test_labels_are_the_rule_s(serve: Callable[..., Server]) -> None:
    """Whichever place the better one stands in; the request is as its settings say."""
    server = serve(more_a)
    texts = [("aa", "a"), ("b", "aba"), ("aaa b", "a b"), ("", "a")]
    groups = [group(*t, line=i) for i, t in enumerate(texts)]
    judge = JudgePairs(endpoint(server))
    assert isinstance(judge, Scorer)
    assert not server.requests
    judge.score(groups)
    assert column(groups, "preference") == [[1, 0], [0, 1], [1, 0], [0, 1]]
    assert column(groups, "score") == column(groups, "preference")
    assert len(server.requests) == 8
    asked = sorted(shown(r) for r in server.requests)
    assert asked == sorted([*texts, *[(b, a) for a, b in texts]]), "each pair once in each order"
    for request in server.requests:
        assert (request["model"], request["temperature"], request["max_tokens"]) == ("rule", 0.0, 16)
        assert (request["logprobs"], request["top_logprobs"]) == (True, 5)
        assert "say a" in request["messages"][0]["content"]
    assert judge.report == {
        "judged": 8, "soft": 0, "unparsable": 0, "ties": 0, "position_bias": 0.0, "agreement": 1.0
    }  # fmt: skip


def test_a_bias_for_a_place_cancels_out(serve: Callable[..., Server]) -> None:
    """Exactly 1/2 for every response, in groups of two and of more; and it is reported."""
    server = serve(lambda *_: "1")
    groups = [group("aa", "b"), group("a", "b", "c", line=2)]
    judge = JudgePairs(endpoint(server))
    judge.score(groups)
    assert column(groups, "score") == [[0.5, 0.5], [0.5, 0.5, 0.5]]
    assert column(groups[:1], "preference") == [[0.5, 0.5]]
    assert (judge.report["position_bias"], judge.report["agreement"]) == (0.5, 0.0)
    last = JudgePairs(endpoint(serve(lambda *_: "2")))
    last.score([group("aa", "b")])
    assert last.report["position_bias"] == -0.5


def test_without_the_swap_each_pair_is_asked_once_in_a_drawn_order(serve: Callable[..., Server]) -> None:
    server = serve(lambda *_: "1")
    groups = [group("a", f"b{i}", line=i) for i in range(40)]
    JudgePairs(endpoint(server), swap=False).score(groups)
    wins = sum(p == 1.0 for p, _ in column(groups, "preference"))
    assert len(server.requests) == 40
    assert wins == sum(shown(r)[0] == "a" for r in server.requests), "who is shown first is who wins here"
    assert 8 <= wins <= 32, "4 standard deviations of 40 fair draws"
    by_rule = [group("aa", f"b{i}", line=i) for i in range(10)]
    JudgePairs(endpoint(serve(more_a)), swap=False).score(by_rule)
    assert column(by_rule, "preference") == [[1.0, 0.0]] * 10


def test_more_than_two_play_a_round_robin(serve: Callable[..., Server]) -> None:
    """Mean of the preferences over the others, by hand; a response met twice over costs nothing more."""
    groups = [group("a", "aaa", "b", "aa")]
    server = serve(more_a)
    JudgePairs(endpoint(server)).score(groups)
    assert column(groups, "score") == [[1 / 3, 1.0, 0.0, 2 / 3]]
    assert len(server.requests) == 12
    assert not any("preference" in r.columns for r in groups[0].responses)
    assert int(Batch(groups).best_G[0]) == 1
    same = [group("a", "a", "b", line=2)]
    server = serve(more_a)
    JudgePairs(endpoint(server)).score(same)
    assert column(same, "score") == [[0.75, 0.75, 0.0]], "equal texts tie, and nobody is asked about them"
    assert len(server.requests) == 2, "a against b, in two orders, once for both"


def test_soft_preferences_are_the_softmax_of_the_labels(serve: Callable[..., Server]) -> None:
    """Order 1: P("1") = 0.6 + 0.1 against 0.2, so 7/9; order 2: 0.3 against 0.5, so 3/8 for the one shown first."""

    def answer(body: dict[str, Any], _: int) -> Reply:
        if shown(body)[0] == "x":
            return completion("1", [("1", {"1": 0.6, " 1": 0.1, "2": 0.2, "The": 0.1})])
        return completion(" 2", [(" 2", {"1": 0.3, " 2": 0.5})])

    groups = [group("x", "y")]
    judge = JudgePairs(endpoint(serve(answer)))
    judge.score(groups)
    p = (7 / 9 + 5 / 8) / 2
    assert column(groups, "preference")[0] == pytest.approx([p, 1 - p], abs=1e-12)
    assert judge.report["soft"] == 1.0
    assert judge.report["position_bias"] == pytest.approx((7 / 9 + 3 / 8) / 2 - 0.5)
    groups = [group("x", "y")]
    server = serve(answer)
    JudgePairs(endpoint(server), soft=False).score([groups[0]])
    assert "logprobs" not in server.requests[0]


def test_the_token_of_the_answer_counts_not_the_first() -> None:
    """Reasons first, then the answer; a label within the reasons is not it."""
    tops: list[tuple[str, list[tuple[str, float]]]] = [
        ("2", [("2", 0.0)]), (" is", []), (" bad.", []), (" Answer", []), (":", []),
        (" 1", [(" 1", math.log(0.75)), (" 2", math.log(0.25))]), ("<end>", []),
    ]  # fmt: skip
    answer = Answer("2 is bad. Answer: 1", tops)
    assert read_choice(answer, "12") == (pytest.approx(0.75), True)
    joined = Answer("Answer: 1", [("Answer", []), (": 1!", [("1", -1.0), ("2", -2.0)])])
    assert read_choice(joined, "12") == (1.0, False), "no token of its own: by the text"
    assert read_choice(Answer("1", [("1", [("yes", -0.1)])]), "12") == (1.0, False)


CHOICES = {
    "1": 1.0, " 2\n": 0.0, "(1)": 1.0, "**2**": 0.0, "Response 1": 1.0, "response 2.": 0.0, "1.": 1.0,
    "Preferred Response=2": 0.0, "The preferred response is Response 1.": 1.0, "**Answer:** 2": 0.0,
    "1\n\nIt is clearer.": 1.0, "Response 2 rambles.\n\n1": 1.0, "Verdict: 1. No, wait. Answer: 2": 0.0,
    "": None, "Both are good.": None, "Response 1 has 2 errors": None, "12": None, "3": None, "1\n2": None,
    "1 or 2": None, "Answer: 15": None, "The answer is not clear: 1 and 2 tie": None,
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), CHOICES.items())
def test_what_a_text_says(text: str, expected: float | None) -> None:
    assert read_choice(Answer(text), "12") == (expected, False)


@pytest.mark.parametrize(("text", "expected"), {"A": 1.0, "(B)": 0.0, "A good answer": None, "Answer: B": 0.0}.items())
def test_other_labels(text: str, expected: float | None) -> None:
    assert read_choice(Answer(text), "AB") == (expected, False)


def test_a_template_of_one_s_own(serve: Callable[..., Server]) -> None:
    """Braces in texts are text: a response cannot pull in another place's content."""
    server = serve(lambda *_: "A")
    template = '{"json": 1} {prompt}|{a}|{b}|{label_a}{label_b}'
    groups = [group("{b}{0}", "y", prompt="{a}")]
    JudgePairs(endpoint(server), template, "AB", attempts=1).score(groups)
    assert sorted(server.questions) == ['{"json": 1} {a}|y|{b}{0}|AB', '{"json": 1} {a}|{b}{0}|y|AB']
    for make, text, missing in (
        (JudgePairs, "{prompt}{a}", "b"), (JudgePairs, "{a}{b}", "prompt"), (JudgeScores, "{prompt}", "response")
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"^scoring\.template=.*must contain {{{missing}}}"):
            make(endpoint(server), text)


# Scores


def test_scores_are_rewards(serve: Callable[..., Server]) -> None:
    def answer(body: dict[str, Any], _: int) -> str:
        text = body["messages"][0]["content"].split("Response:\n")[1].split("\n\nHow good")[0]
        assert "from 1 (worst) to 9 (best)" in body["messages"][0]["content"]
        return f"{1 + text.count('a')}"

    groups = [group("a", "bab a", "c"), group("aaaa", line=2)]
    judge = JudgeScores(endpoint(serve(answer)))
    assert isinstance(judge, Scorer) and judge.fills == ("reward",)
    judge.score(groups)
    assert column(groups, "reward") == [[2.0, 3.0, 1.0], [5.0]]


def test_soft_scores_are_the_expectation(serve: Callable[..., Server]) -> None:
    """(7 × 0.5 + 8 × 0.3 + 2 × 0.1) / 0.9: what is no score, or not in the range, is left out."""
    tops = {"7": 0.5, " 8": 0.3, "2": 0.1, "x": 0.05, "0": 0.05}
    groups = [group("y")]
    JudgeScores(endpoint(serve(lambda *_: completion("7", [("7", tops)])))).score(groups)
    assert column(groups, "reward")[0][0] == pytest.approx(6.1 / 0.9, abs=1e-12)
    JudgeScores(endpoint(serve(lambda *_: "7")), soft=False, high=10.0).score(groups)
    assert column(groups, "reward") == [[7.0]]


SCORES = {
    "7": 7.0, "7.5": 7.5, "8/10": 8.0, "Score: 9/10": 9.0, "**Score:** 3.5": 3.5, "Rating = 10": 10.0, "-2": -2.0,
    "8/9": None, "11": None, "-3": None, "80%": None, "Score: 80%": None, "good": None, "7 or 8": None, "": None,
    "6\nbecause": 6.0, "The score is 5.": 5.0,
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), SCORES.items())
def test_which_number_a_text_gives(text: str, expected: float | None) -> None:
    assert read_score(Answer(text), -2, 10, False) == (expected, False)


# Answers that cannot be read


def test_an_unparsable_answer_is_asked_about_again(serve: Callable[..., Server]) -> None:
    """With what it said and a reminder; a null content too."""
    said: dict[int, Any] = {1: "I like both.", 3: completion(None), 5: "2"}
    server = serve(lambda body, _: said[len(body["messages"])])
    judge = JudgePairs(endpoint(server))
    groups = [group("a", "b")]
    judge.score(groups)
    assert column(groups, "preference") == [[0.5, 0.5]]
    longest = max((r["messages"] for r in server.requests), key=len)
    assert [m["role"] for m in longest] == ["user", "assistant", "user", "assistant", "user"]
    assert [m["content"] for m in longest[1:]] == [
        "I like both.", "Answer with 1 or 2 and nothing else.",
        "(no answer)", "Answer with 1 or 2 and nothing else.",
    ]  # fmt: skip
    assert (judge.report["unparsable"], judge.report["ties"], judge.report["judged"]) == (4, 0, 2)
    assert len(server.requests) == 6


def test_what_stays_unparsable_is_an_error_or_a_tie(serve: Callable[..., Server]) -> None:
    server = serve(lambda *_: "no  idea")
    with pytest.raises(AlignlabError, match=r"^data\.jsonl:7: .* cannot be read in 2 attempts: 'no idea'\. Mend"):
        JudgePairs(endpoint(server), attempts=2).score([group("a", "b", line=7)])
    groups = [group("a", "b")]
    pairs = JudgePairs(endpoint(server), attempts=2, unparsable="tie")
    pairs.score(groups)
    assert column(groups, "preference") == [[0.5, 0.5]]
    assert (pairs.report["unparsable"], pairs.report["ties"], pairs.report["judged"]) == (4, 2, 2)
    scores = JudgeScores(endpoint(server), low=2.0, high=5.0, attempts=1, unparsable="tie")
    scores.score(groups)
    assert column(groups, "reward") == [[3.5, 3.5]]
    assert scores.report["ties"] == 2


def test_what_cannot_be(serve: Callable[..., Server]) -> None:
    made = endpoint(serve(more_a))
    with pytest.raises(AlignlabError, match=r"^data\.jsonl:3: a judge of pairs needs two responses or more, not 1"):
        JudgePairs(made).score([group("a", line=3)])
    for settings, match in (
        ({"labels": "1"}, "labels"), ({"labels": "11"}, "labels"), ({"attempts": 0}, "attempts"),
        ({"unparsable": "skip"}, "unparsable"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"^scoring\.{match}="):
            JudgePairs(made, **settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^scoring\.low=9"):
        JudgeScores(made, low=9)
    with pytest.raises(ConfigError, match=r"^scoring\.soft=True: needs scoring\.low and high among"):
        JudgeScores(made, low=1, high=10)


def test_equal_questions_are_asked_once(serve: Callable[..., Server]) -> None:
    server = serve(more_a, 0.05)
    groups = [group("a", "b", line=i) for i in range(6)]
    JudgePairs(endpoint(server)).score(groups)
    assert len(server.requests) == 2
    assert column(groups, "preference") == [[1.0, 0.0]] * 6


def test_groups_survive_json(serve: Callable[..., Server]) -> None:
    """Columns are plain numbers."""
    groups = [group("a", "b")]
    JudgePairs(endpoint(serve(more_a))).score(groups)
    JudgeScores(endpoint(serve(lambda *_: "4"))).score(groups)
    assert json.loads(json.dumps(groups[0].responses[0].columns)) == {"score": 1.0, "preference": 1.0, "reward": 4.0}
