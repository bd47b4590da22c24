"""What fills columns: log-probs, functions, noisy labels, reward models."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from alignlab.core import AlignlabError, ConfigError, Group, Response, Scorer
from alignlab.data import group_to_record, write_jsonl
from alignlab.models import ModelSettings, PackedModel, load_model
from alignlab.scoring import BradleyTerryLabels, FunctionScorer, RewardModelScorer, fill_log_probs
from tests import tiny

# Log-probs


@pytest.fixture
def model() -> PackedModel:
    return tiny.model()


def counted(model: PackedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many groups the model is asked for in each call."""
    asked: list[int] = []
    outputs = model.outputs

    def count(groups: Sequence[Group], *rest: object) -> object:
        asked.append(len(groups))
        return outputs(groups, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "outputs", count)
    return asked


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_probs_are_the_model_s(model: PackedModel, temperature: float) -> None:
    groups = tiny.some_groups()
    fill_log_probs(model, groups, "old_logp", 30, temperature)
    found = [v for g in groups for r in g.responses for v in r.columns["old_logp"]]  # type: ignore[union-attr]
    with torch.no_grad():
        expected = tiny.plain_log_probs(model.network, groups, temperature)
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=0)
    assert [len(r.columns["old_logp"]) for g in groups for r in g.responses] == [  # type: ignore[arg-type]
        r.loss_tokens for g in groups for r in g.responses
    ]


def test_a_model_is_asked_once_for_each_group(model: PackedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, groups = counted(model, monkeypatch), tiny.some_groups()
    fill_log_probs(model, groups[:2], "ref_logp", 1000)
    before = list(groups[0].responses[0].columns["ref_logp"])  # type: ignore[arg-type]
    fill_log_probs(model, groups[:2], "ref_logp", 1000)
    assert asked == [2]
    with torch.no_grad():
        model.head.weight.mul_(2)
    fill_log_probs(model, groups, "ref_logp", 1000)
    assert asked == [2, 2], "only those that lack the column"
    assert list(groups[0].responses[0].columns["ref_logp"]) == list(before)
    fill_log_probs(model, groups, "old_logp", 1000)
    assert asked == [2, 2, 4], "another column is another matter"
    assert groups[0].responses[0].columns["old_logp"] != pytest.approx(before)


def test_a_group_that_lacks_it_in_one_response_is_done_whole(
    model: PackedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, groups = counted(model, monkeypatch), tiny.some_groups()
    groups.append(Group([4, 5]))
    fill_log_probs(model, groups, "ref_logp", 1000)
    expected = list(groups[0].responses[2].columns["ref_logp"])  # type: ignore[arg-type]
    del groups[0].responses[2].columns["ref_logp"]
    fill_log_probs(model, groups, "ref_logp", 1000)
    assert asked == [4, 1]
    assert groups[0].responses[2].columns["ref_logp"] == pytest.approx(expected, abs=1e-5)


# Functions


def written(*texts: str, prompt: str = "say", **extra: object) -> Group:
    return Group([1], [Response([2], text=t) for t in texts], "data.jsonl:5", prompt, extra=extra)


def test_a_function_sees_prompt_response_and_the_record() -> None:
    scorer = FunctionScorer(lambda prompt, response, extra: len(prompt) + 10 * len(response) + extra["bonus"], "length")
    assert isinstance(scorer, Scorer)
    assert scorer.fills == ("length",)
    groups = [written("ab", "", bonus=100), written("xyz", prompt="", bonus=0.5)]
    scorer.score(groups)
    assert [r.columns for g in groups for r in g.responses] == [{"length": 123.0}, {"length": 103.0}, {"length": 30.5}]
    assert FunctionScorer(lambda *_: 1).fills == ("reward",)


def test_a_function_that_fails_names_the_record_and_itself() -> None:
    def my_rule(prompt: str, response: str, extra: dict) -> float:
        return float(extra["gold"])

    with pytest.raises(
        AlignlabError, match=r"^data\.jsonl:5: .*my_rule failed: KeyError: 'gold' \(test_scoring\.py:\d+\)$"
    ):
        FunctionScorer(my_rule).score([written("a")])
    with pytest.raises(AlignlabError, match=r"^data\.jsonl:5: .* returned 'good': is no number \(str\)"):
        FunctionScorer(lambda *_: "good").score([written("a")])  # type: ignore[arg-type, return-value]


def test_a_reward_that_is_no_number() -> None:
    with pytest.raises(AlignlabError, match=r"^data\.jsonl:5: .*<lambda> returned nan: is not finite"):
        FunctionScorer(lambda *_: math.nan).score([written("a")])


# Labels


REWARDS = {"a": 0.0, "b": 1.0, "c": 0.5, "d": -1.0}
TRUTH = FunctionScorer(lambda _, response, __: REWARDS[response])


def ranked(letters: str, count: int, seed: int = 0) -> list[Group]:
    """Labels for `count` groups of these responses."""
    groups = []
    for i in range(count):
        made = written(*letters)
        made.origin = f"data.jsonl:{i + 1}"
        groups.append(made)
    BradleyTerryLabels(TRUTH, temperature=0.5, seed=seed).score(groups)
    return groups


@pytest.mark.parametrize(("letters", "seed"), [("ab", 0), ("ab", 1), ("dc", 2), ("abcd", 3), ("bdca", 4)])
def test_labels_follow_bradley_and_terry(letters: str, seed: int) -> None:
    """Of each pair, the first wins with frequency σ((r_a − r_b)/τ), in groups of two and of four: 4 σ of 2,500."""
    count = 2500
    groups = ranked(letters, count, seed)
    for i in range(len(letters)):
        for j in range(i + 1, len(letters)):
            wins = sum(g.responses[i].columns["score"] > g.responses[j].columns["score"] for g in groups)  # type: ignore[operator]
            p = 1 / (1 + math.exp(-(REWARDS[letters[i]] - REWARDS[letters[j]]) / 0.5))
            assert wins / count == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / count))


def test_rankings_follow_plackett_and_luce() -> None:
    """P(b > c > a > d) is a product of choices among those left."""
    count = 2500
    weights = {k: math.exp(r / 0.5) for k, r in REWARDS.items()}
    p, left = 1.0, sum(weights.values())
    for letter in "bcad":
        p *= weights[letter] / left
        left -= weights[letter]

    def order(group: Group) -> str:
        return "".join(r.text for r in sorted(group.responses, key=lambda r: -float(r.columns["score"])))  # type: ignore[arg-type]

    frequency = sum(order(g) == "bcad" for g in ranked("abcd", count, 5)) / count
    assert frequency == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / count))


def test_a_label_depends_on_seed_and_record_alone() -> None:
    def scores(groups: list[Group]) -> list[float]:
        return [float(r.columns["score"]) for g in groups for r in g.responses]  # type: ignore[arg-type]

    assert scores(ranked("ab", 10)) == scores(ranked("ab", 10))
    assert scores(ranked("ab", 10)) == scores(ranked("ab", 20)[:10]), "not on what else there is"
    first, second = ranked("ab", 10, seed=1), ranked("ab", 10, seed=2)
    assert not set(scores(first)) & set(scores(second))
    assert len(set(scores(first))) == 20, "each record has draws of its own"


@pytest.mark.parametrize(
    ("origin", "same"),
    [
        ("runs/b/data.jsonl:3", True),
        ("data.jsonl:3", True),
        ("runs/a/data.jsonl:4", False),
        ("runs/a/other.jsonl:3", False),
    ],
)
def test_a_label_does_not_depend_on_the_folder(origin: str, same: bool) -> None:
    """Another `out=DIR` changes no label; another record of the same text has its own."""
    found = []
    for place in ("runs/a/data.jsonl:3", origin):
        made = written("a", "b")
        made.origin = place
        BradleyTerryLabels(TRUTH, 1.0).score([made])
        found.append([r.columns["score"] for r in made.responses])
    assert (found[0] == found[1]) == same


def test_rewards_stay_as_they_are() -> None:
    (group,) = ranked("ab", 1)
    assert [r.columns["reward"] for r in group.responses] == [0.0, 1.0]
    assert BradleyTerryLabels(TRUTH, 1.0).fills == ("reward", "score")
    assert BradleyTerryLabels(TRUTH, 1.0, certain=False).fills == ("reward", "preference")


def test_uncertain_labels_are_the_probability_itself() -> None:
    groups = [written("a", "b"), written("b", "d")]
    BradleyTerryLabels(TRUTH, temperature=0.5, certain=False).score(groups)
    found = [[r.columns["preference"] for r in g.responses] for g in groups]
    assert found[0] == pytest.approx([1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2))])
    assert found[1] == pytest.approx([1 / (1 + math.exp(-4)), 1 / (1 + math.exp(4))])
    assert not any("score" in r.columns for g in groups for r in g.responses)


def test_probabilities_far_apart_stay_finite() -> None:
    extreme = FunctionScorer(lambda _, response, __: 1e6 if response == "a" else -1e6)
    (group,) = groups = [written("a", "b")]
    BradleyTerryLabels(extreme, 1.0, certain=False).score(groups)
    assert [r.columns["preference"] for r in group.responses] == pytest.approx([1.0, 0.0])


def test_what_labels_cannot_be_made_of() -> None:
    with pytest.raises(AlignlabError, match=r"^data\.jsonl:5: probabilities are for pairs, not 3 responses"):
        BradleyTerryLabels(TRUTH, 1.0, certain=False).score([written("a", "b", "c")])
    with pytest.raises(ConfigError, match=r"^scoring\.temperature=0\.0: must be > 0"):
        BradleyTerryLabels(TRUTH, 0.0)


# Reward models


def test_a_reward_model_s_scores_are_transformers_own(saved: Callable[..., Path]) -> None:
    from transformers import AutoModelForSequenceClassification

    groups = tiny.some_groups()
    groups[1].responses[0].token_ids[-1] = tiny.EOS
    scorer = RewardModelScorer(str(saved("llama", "score")), max_tokens_per_microbatch=40)
    assert isinstance(scorer, Scorer)
    scorer.score(groups)
    network = AutoModelForSequenceClassification.from_pretrained(saved("llama", "score"))
    for group in groups:
        for response in group.responses:
            with torch.no_grad():
                expected = network(input_ids=torch.tensor([group.prompt_ids + response.token_ids])).logits.item()
            assert response.columns["reward"] == pytest.approx(expected, abs=1e-5)
    assert not any(p.requires_grad for p in scorer.model.parameters())


def test_a_model_that_cannot_be_loaded_is_found_before_anything_is_sampled() -> None:
    with pytest.raises(ConfigError, match=r"^scoring\.path='/nowhere/model': there is no such folder"):
        RewardModelScorer("/nowhere/model").bind(None, None)


def test_a_reward_model_is_loaded_when_needed_and_once(saved: Callable[..., Path]) -> None:
    scorer = RewardModelScorer("/nowhere/model")
    with pytest.raises(ConfigError, match="there is no such folder"):
        scorer.score(tiny.some_groups())
    scorer = RewardModelScorer(str(saved("llama", "score")))
    assert scorer.model is scorer.model


@pytest.mark.parametrize("kind", ["mean", "std"])
def test_scores_are_normalised_by_those_of_given_responses(
    kind: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    """By hand from the plain scores of the same responses; the scores of others go through the same line."""
    given, groups = tiny.some_groups(), tiny.some_groups(seed=5)
    write_jsonl(tmp_path / "samples.jsonl", [group_to_record(g) for g in given])
    plain = RewardModelScorer(str(saved("llama", "score")))
    plain.score(given)
    base = [r.columns["reward"] for g in given for r in g.responses]
    plain.score(groups)
    expected = [r.columns["reward"] for g in groups for r in g.responses]
    spread = statistics.pstdev(base) if kind == "std" else 1.0
    expected = [(x - statistics.fmean(base)) / spread for x in expected]

    data = {"path": str(tmp_path / "samples.jsonl"), "parser": "groups"}
    scorer = RewardModelScorer(str(saved("llama", "score")), normalize=kind, normalize_data=data)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs the policy's tokenizer"):
        scorer.score(groups)
    scorer.bind(None, tiny.tokenizer())
    scorer.score(groups)
    assert [r.columns["reward"] for g in groups for r in g.responses] == pytest.approx(expected, abs=1e-5)
    assert scorer.report["reward_gain"] == pytest.approx(1 / spread)


def test_what_scores_cannot_be_normalised_by(saved: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^scoring\.normalize=std: name the responses "):
        RewardModelScorer("r", normalize="std")
    with pytest.raises(ConfigError, match=r"^scoring\.normalize_data: say what for"):
        RewardModelScorer("r", normalize_data={"path": "x"})
    one = Group([5], [Response([6])])
    write_jsonl(tmp_path / "one.jsonl", [group_to_record(one)])
    data = {"path": str(tmp_path / "one.jsonl"), "parser": "groups"}
    scorer = RewardModelScorer(str(saved("llama", "score")), normalize="std", normalize_data=data)
    scorer.bind(None, tiny.tokenizer())
    with pytest.raises(ConfigError, match=r"its 1 responses have equal scores: there is no scale in them"):
        scorer.score([one])


def test_a_reward_model_with_fewer_tokens(saved: Callable[..., Path]) -> None:
    scorer = RewardModelScorer(str(saved("llama", "score")))
    group = Group([5, tiny.SIZE], [Response([6])])
    with pytest.raises(
        AlignlabError, match=rf"^scoring\.path=.*token {tiny.SIZE} is outside .*vocabulary of {tiny.SIZE}:"
    ):
        scorer.score([group])


def test_a_policy_without_a_score_head_is_no_reward_model(saved: Callable[..., Path]) -> None:
    """Its scores would be those of a random head."""
    with pytest.raises(ConfigError, match=r"not a score model: it has no weights for score\.weight"):
        RewardModelScorer(str(saved())).score(tiny.some_groups())
    assert load_model(ModelSettings(path=str(saved())), kind="score").kind == "score", "to be trained, it gets one"
