"""Several rewards made into one, by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from alignlab.config import compose, resolve
from alignlab.core import AlignlabError, ConfigError, Group, Response, Scorer
from alignlab.scoring import CombinedScorer, FunctionScorer, build_scorers
from tests.training import runs

TABLE = {"a": (1.0, 4.0, 1.0), "b": (0.0, -3.0, 6.0)}
"""What three members say of two responses: means 2 and 1, variances 2 and 14."""


def member(place: int) -> FunctionScorer:
    return FunctionScorer(lambda _, response, __: TABLE[response][place])


MEMBERS = {"helpful": member(0), "harmless": member(1), "honest": member(2)}


def scored(scorer: CombinedScorer) -> list[dict]:
    group = Group([1], [Response([2], text=t) for t in TABLE], "data.jsonl:5")
    scorer.score([group])
    return [r.columns for r in group.responses]


@pytest.mark.parametrize(
    ("how", "penalty", "expected"),
    [
        ("weighted_sum", 1.0, (6.0, 3.0)),
        ("minimum", 1.0, (1.0, -3.0)),
        ("mean_minus_deviation", 1.0, (2 - math.sqrt(2), 1 - math.sqrt(14))),
        ("mean_minus_deviation", 0.5, (2 - math.sqrt(2) / 2, 1 - math.sqrt(14) / 2)),
        ("mean_minus_variance", 0.1, (2 - 0.2, 1 - 1.4)),
        ("mean_minus_deviation", 0.0, (2.0, 1.0)),
    ],
)
def test_by_hand(how: str, penalty: float, expected: tuple[float, float]) -> None:
    found = scored(CombinedScorer(dict(MEMBERS), how, penalty=penalty))  # type: ignore[arg-type]
    assert [c["reward"] for c in found] == pytest.approx(expected)
    for columns, values in zip(found, TABLE.values(), strict=True):
        assert tuple(columns[f"reward_{name}"] for name in MEMBERS) == values, "as the members gave them"


def test_weights_are_by_name_and_one_elsewhere() -> None:
    scorer = CombinedScorer(dict(MEMBERS), weights={"harmless": 0.5, "honest": -1.0})
    assert [c["reward"] for c in scored(scorer)] == pytest.approx([1 + 2 - 1, 0 - 1.5 - 6])
    scorer = CombinedScorer(dict(MEMBERS), "minimum", weights={"helpful": 10.0})
    assert [c["reward"] for c in scored(scorer)] == pytest.approx([1.0, -3.0])


def test_what_it_fills() -> None:
    scorer = CombinedScorer(dict(MEMBERS))
    assert isinstance(scorer, Scorer)
    assert scorer.fills == ("reward", "reward_helpful", "reward_harmless", "reward_honest")
    assert [c["reward"] for c in scored(CombinedScorer({"only": member(1)}, "mean_minus_deviation"))] == [4.0, -3.0]


class Silent:
    """Says that it fills rewards and fills none."""

    fills = ("reward",)

    def score(self, groups: Sequence[Group]) -> None:
        pass


def test_no_member_passes_with_another_s_reward() -> None:
    said = r"^data\.jsonl:5: scoring\.members\.honest, .*Silent\.score: response 1 got no 'reward'"
    with pytest.raises(AlignlabError, match=said):
        scored(CombinedScorer({"helpful": member(0), "honest": Silent()}))
    group = Group([1], [Response([2], columns={"reward": 7.0})], "data.jsonl:5")
    with pytest.raises(AlignlabError, match="got no 'reward'"):
        CombinedScorer({"honest": Silent()}).score([group])


def test_what_cannot_be_combined() -> None:
    with pytest.raises(ConfigError, match=r"^scoring\.members=\{\}: must name"):
        CombinedScorer({})
    with pytest.raises(ConfigError, match=r"^scoring\.members\.x: fills length; it must fill reward"):
        CombinedScorer({"x": FunctionScorer(lambda *_: 1.0, "length")})
    with pytest.raises(ConfigError, match=r"^scoring\.weights=.*there is no member helpfull"):
        CombinedScorer(dict(MEMBERS), weights={"helpfull": 1.0})
    with pytest.raises(ConfigError, match=r"^scoring\.how='sum': must be one of weighted_sum, minimum"):
        CombinedScorer(dict(MEMBERS), "sum")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^scoring\.penalty=-1\.0"):
        CombinedScorer(dict(MEMBERS), penalty=-1.0)


def test_from_the_command_line(tmp_path: Path) -> None:
    """Members by their `_target_`; a rollout is scored by both, and a typing error is told by its key."""
    runs.prepare(tmp_path)
    rule = "{_target_: alignlab.scoring.FunctionScorer, function: {_target_: hydra.utils.get_method, path: %s}}"
    words = [
        "scoring=combined",
        f"scoring.members={{words: {rule % 'tests.training.runs.count_of_a'}, "
        f"letters: {rule % 'tests.scoring.test_combined.letters'}}}",
        "scoring.weights={letters: 0.5}",
    ]
    own = [w for w in runs.ALGORITHMS["rejection_sampling"] if not w.startswith("scoring")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(runs.ALGORITHMS, "combined", [*own, *words])
        runs.train(tmp_path, "combined", "out", "training.steps=2")
        config = resolve(compose("train", runs.words_for(tmp_path, "combined", "other", "scoring.how=product")))
    lines = [json.loads(s) for s in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert lines
    for line in lines:
        expected = runs.count_of_a("", line["response"], {}), letters("", line["response"], {})
        assert (line["reward_words"], line["reward_letters"]) == pytest.approx(expected)
        assert line["reward"] == pytest.approx(expected[0] + 0.5 * expected[1])
    with pytest.raises(ConfigError, match=r"^scoring\.how='product'"):
        build_scorers(config["scoring"])


def letters(prompt: str, response: str, extra: dict) -> float:
    return float(len(set(response)))
