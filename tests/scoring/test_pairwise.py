"""The pairwise scorer: tournaments of known order, both orders of a pair, a trained model loaded back."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.core import Batch, ConfigError, Group, Response, Scorer
from alignlab.scoring import PairwiseScorer
from alignlab.scoring.pairwise import Match, knock_out, round_robin
from tests import tiny
from tests.training import runs

# Tournaments


class Known:
    """Compares by strengths; remembers what it was asked."""

    def __init__(self, *strengths: Sequence[float]) -> None:
        self.strengths, self.calls = strengths, []  # type: ignore[var-annotated]

    def __call__(self, matches: Sequence[Match]) -> list[float]:
        self.calls.append(list(matches))
        return [1 / (1 + math.exp(self.strengths[g][j] - self.strengths[g][i])) for g, i, j in matches]

    @property
    def asked(self) -> list[Match]:
        return [m for call in self.calls for m in call]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 13])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_best_is_champion(size: int, seed: int) -> None:
    strengths = random.Random(seed).sample(range(100), size)
    compare = Known(strengths)
    (lost,) = knock_out([size], compare)
    champion = max(range(size), key=lambda i: strengths[i])
    assert [i for i in range(size) if lost[i] == -1] == [champion]
    assert all(strengths[lost[i]] > strengths[i] for i in range(size) if i != champion)
    assert len(compare.asked) == size - 1 == len({frozenset(m) for m in compare.asked})
    assert len(compare.calls) == math.ceil(math.log2(size)), "a call for each round"
    assert {frozenset((i, j)) for _, i, j in compare.asked} == {frozenset((i, v)) for i, v in enumerate(lost) if v >= 0}


def test_neighbours_meet_and_who_sat_out_plays_next() -> None:
    """Five: 4 sits out, then plays the first winner, while the second sits out."""
    compare = Known([5.0, 4.0, 3.0, 2.0, 1.0])
    assert knock_out([5], compare) == [[-1, 0, 0, 2, 0]]
    assert compare.calls == [[(0, 0, 1), (0, 2, 3)], [(0, 4, 0)], [(0, 2, 0)]]


def test_groups_are_played_together() -> None:
    compare = Known([1.0, 2.0, 3.0], [], [4.0], [7.0, 6.0])
    assert knock_out([3, 0, 1, 2], compare) == [[1, 2, -1], [], [-1], [-1, 0]]
    assert compare.calls == [[(0, 0, 1), (3, 0, 1)], [(0, 2, 1)]]
    assert knock_out([1, 0], Known([1.0], [])) == [[-1], []]


def test_of_equals_the_first_wins() -> None:
    assert knock_out([4], Known([1.0] * 4)) == [[-1, 0, 0, 2]]


def test_the_pairs_of_a_tournament() -> None:
    """What DPO and others make of it: winners and losers of the matches."""
    strengths = [1.0, 3.0, 0.0, 2.0]
    (lost,) = knock_out([4], Known(strengths))
    group = Group([1], [Response([2], columns={"lost_to": float(i)}) for i in lost])
    pairs = Batch([group]).pairs
    found = {(int(w), int(loser)) for w, loser in zip(pairs.winner_P, pairs.loser_P, strict=True)}
    assert found == {(1, 0), (3, 2), (1, 3)}


def test_round_robin_by_hand() -> None:
    """P(0 beats 1) = 0.8, P(0 beats 2) = 0.6, P(1 beats 2) = 0.3."""
    chances = {(0, 1): 0.8, (0, 2): 0.6, (1, 2): 0.3}
    found = round_robin([3, 1, 2], lambda matches: [chances[i, j] for _, i, j in matches])
    assert found[0] == pytest.approx([0.7, (0.2 + 0.3) / 2, (0.4 + 0.7) / 2])
    assert found[1] == [0.5]
    assert found[2] == pytest.approx([0.8, 0.2])


# A model


KEPT = {"separator": "x y", "max_length": None}
X, Y = (tiny.VOCABULARY.index(letter) for letter in "xy")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with random weights whose tokenizer says how pairs are written."""
    folder = tmp_path_factory.mktemp("pairwise")
    tiny.network("llama", "score").save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.init_kwargs["pairwise"] = KEPT
    tokenizer.save_pretrained(folder)
    return folder


def plainly(folder: Path, group: Group, i: int, j: int) -> float:
    """P(i better than j), by transformers alone, both orders averaged."""
    from transformers import AutoModelForSequenceClassification

    network = AutoModelForSequenceClassification.from_pretrained(folder)
    chances = []
    for first, second in ((i, j), (j, i)):
        a, b = group.responses[first].token_ids, group.responses[second].token_ids
        with torch.no_grad():
            logit = network(input_ids=torch.tensor([[*group.prompt_ids, *a, X, Y, *b]])).logits
        chances.append(float(logit.sigmoid()))
    return (chances[0] + 1 - chances[1]) / 2


def test_a_preference_is_the_average_of_both_orders(model: Path) -> None:
    groups = tiny.groups([(4, [3, 5]), (6, [2, 2])])
    groups[0].responses[0].token_ids[-1] = tiny.EOS
    scorer = PairwiseScorer(str(model), max_tokens_per_microbatch=40)
    assert isinstance(scorer, Scorer)
    scorer.score(groups)
    for group in groups:
        found = [r.columns["preference"] for r in group.responses]
        assert found[0] == pytest.approx(plainly(model, group, 0, 1), abs=1e-5)
        assert sum(found) == pytest.approx(1.0)  # type: ignore[arg-type]
        assert not any("lost_to" in r.columns for r in group.responses)
    assert not any(p.requires_grad for p in scorer.model.parameters())


def test_the_place_of_a_response_has_no_say(model: Path) -> None:
    groups = tiny.groups([(4, [3, 5, 4])] * 4)
    swapped = [g.with_responses([Response(r.token_ids) for r in g.responses[1::-1]]) for g in groups]
    straight = [g.with_responses([Response(r.token_ids) for r in g.responses[:2]]) for g in groups]
    scorer = PairwiseScorer(str(model))
    scorer.score(straight)
    scorer.score(swapped)
    for a, b in zip(straight, swapped, strict=True):
        assert a.responses[0].columns["preference"] == pytest.approx(b.responses[1].columns["preference"], abs=1e-6)
    alike = [Group([5], [Response([7, 8]), Response([7, 8])])]
    scorer.score(alike)
    assert alike[0].responses[0].columns["preference"] == pytest.approx(0.5, abs=1e-6)


def test_larger_groups_play_a_tournament(model: Path) -> None:
    groups = tiny.groups([(4, [3, 5, 2]), (3, [4]), (5, [1, 2]), (2, [])])
    PairwiseScorer(str(model)).score(groups)
    lost = [int(r.columns["lost_to"]) for r in groups[0].responses]  # type: ignore[arg-type]
    first = 0 if plainly(model, groups[0], 0, 1) >= 0.5 else 1
    last = 2 if plainly(model, groups[0], 2, first) >= 0.5 else first
    expected = [0, 0, 0]
    expected[1 - first], expected[2 if last == first else first], expected[last] = first, last, -1
    assert lost == expected
    assert groups[1].responses[0].columns == {"lost_to": -1.0}
    assert "preference" in groups[2].responses[0].columns


def test_all_against_all(model: Path) -> None:
    groups = tiny.groups([(4, [3, 5, 2]), (3, [4]), (2, [1, 2])])
    scorer = PairwiseScorer(str(model), "round_robin")
    assert scorer.fills == ("score",)
    scorer.score(groups)
    chance = {(i, j): plainly(model, groups[0], i, j) for i in range(3) for j in range(3) if i != j}
    for i, response in enumerate(groups[0].responses):
        expected = sum(chance[i, j] for j in range(3) if j != i) / 2
        assert response.columns["score"] == pytest.approx(expected, abs=1e-5)
    assert groups[1].responses[0].columns["score"] == 0.5
    assert groups[2].responses[0].columns["score"] == pytest.approx(plainly(model, groups[2], 0, 1), abs=1e-5)


def test_logits_far_out_stay_finite(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = PairwiseScorer(str(model))
    monkeypatch.setattr(scorer, "scores", lambda pairs: [900.0, -900.0] * len(pairs))
    (group,) = groups = tiny.groups([(4, [3, 5])])
    scorer.score(groups)
    assert [r.columns["preference"] for r in group.responses] == [1.0, 0.0]


def test_what_is_no_pairwise_model(saved: Callable[..., Path], model: Path) -> None:
    with pytest.raises(ConfigError, match=r"^scoring\.path=.*not a pairwise model: .*algorithm=pairwise_model"):
        PairwiseScorer(str(saved("llama", "score"))).score(tiny.groups([(4, [3, 5])]))
    with pytest.raises(ConfigError, match=r"^scoring\.how='cup': must be tournament or round_robin"):
        PairwiseScorer(str(model), "cup")  # type: ignore[arg-type]
    scorer = PairwiseScorer("/nowhere/model")
    with pytest.raises(ConfigError, match="there is no such folder"):
        scorer.score(tiny.groups([(4, [3, 5])]))


# From the command line


@pytest.mark.parametrize("adapter", [[], ["adapter=lora", "adapter.r=8"]], ids=["full", "lora"])
def test_a_pairwise_model_learns_is_saved_and_ranks(tmp_path: Path, adapter: list[str]) -> None:
    """Answers with more of the letter "a" are better: learnt from pairs, held for new ones, by transformers alone."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    runs.prepare(tmp_path)
    rng = random.Random(1)

    def answer(better: bool) -> str:
        return " ".join(rng.choices("a" if better else "bcd", k=rng.randint(2, 4)))

    lines = [{"prompt": rng.choice("efg"), "chosen": answer(True), "rejected": answer(False)} for _ in range(40)]
    (tmp_path / "preferences.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    own: list[str] = ["algorithm=pairwise_model", "data=preferences", "algorithm.separator='x y'", *adapter]
    more: list[str] = ["training.steps=40", "optimizer=adamw", "optimizer.lr=0.01", "data.validation=0.25",
                       "training.eval_every=40"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(runs.ALGORITHMS, "pairwise", own)
        runs.train(tmp_path, "pairwise", "out", *more)
    last: dict[str, Any] = {k: v for line in runs.metrics(tmp_path, "out") for k, v in line.items()}
    assert last["eval/accuracy"] > 0.9
    assert {"eval/position_bias", "eval/calibration_error", "position_bias", "calibration_error"} <= set(last)
    folder = tmp_path / "out" / "model"
    base = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base" if adapter else folder, num_labels=1, pad_token_id=tiny.PAD
    )
    network = PeftModel.from_pretrained(base, folder).eval() if adapter else base
    tokenizer = tiny.tokenizer()
    ids = {text: tokenizer(text)["input_ids"] for text in ("f", "a a", "b a", "c d b", "x y")}
    (group,) = groups = [Group(ids["f"], [Response([*ids[t], tiny.EOS]) for t in ("c d b", "a a")], "p.jsonl:1")]
    PairwiseScorer(str(folder)).score(groups)
    logits = []
    for first, second in (("c d b", "a a"), ("a a", "c d b")):
        whole = [*ids["f"], *ids[first], tiny.EOS, *ids["x y"], *ids[second], tiny.EOS]
        with torch.no_grad():
            logits.append(float(network(input_ids=torch.tensor([whole])).logits))
    chance = (1 / (1 + math.exp(-logits[0])) + 1 / (1 + math.exp(logits[1]))) / 2
    assert group.responses[0].columns["preference"] == pytest.approx(chance, abs=1e-4)
    assert chance < 0.5
