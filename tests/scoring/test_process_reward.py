"""Solutions scored by a process reward model: where it reads, what it says, and that plain transformers agree."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.core import AlignlabError, ConfigError, Group, NeedsPolicy, Response, Scorer
from alignlab.data.steps import Steps
from alignlab.models import FullFineTuning, LoRA, ModelSettings, load_model, save_model
from alignlab.models.base import load_tokenizer
from alignlab.scoring import ProcessRewardScorer, StepCheckScorer
from alignlab.scoring.process_reward import count_labels, solution_score, spread
from tests import tiny
from tests.data.conftest import byte_tokenizer

RIGHT = [0.9, 0.5, 0.8]


@pytest.mark.parametrize(
    ("aggregate", "score"),
    [("product", 0.36), ("minimum", 0.5), ("last", 0.8), ("mean", 2.2 / 3)],
)
def test_solution_score_by_hand(aggregate: Any, score: float) -> None:
    assert solution_score(RIGHT, aggregate) == pytest.approx(score)


def test_values_of_steps_as_a_column() -> None:
    every = Response([1, 2, 3, 4, 5])
    assert list(spread(every, [1, 4], [0.5, 0.25])) == [0.0, 0.5, 0.0, 0.0, 0.25]
    some = Response([1, 2, 3, 4, 5], [False, True, True, False, False])
    assert list(spread(some, [2, 4], [0.5, 0.25])) == [0.0, 0.75], "a step that ends in tokens which bear none"
    assert list(spread(some, [0, 2], [0.5, 0.25])) == [0.5, 0.25]


# A model: letters are tokens, "x" parts the steps.

SEPARATOR = "x"


def group(*texts: str, prompt: str = "a b") -> Group:
    tokens = tiny.tokenizer()
    return Group(
        tokens(prompt)["input_ids"],
        [Response([*tokens(t)["input_ids"], tiny.EOS], text=t, source="policy") for t in texts],
        "data.jsonl:4",
        prompt,
    )


def classifier(base: Path, folder: Path, labels: int) -> Path:
    """A token classifier on a small model, with a random head."""
    model = load_model(ModelSettings(path=str(base)), kind="step", labels=labels)
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(labels))
    save_model(model, folder)
    return folder


@pytest.fixture(scope="module")
def prm(saved: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(saved("llama"), tmp_path_factory.mktemp("prm") / "model", 2)


def plain(folder: Path, ids: list[int]) -> torch.Tensor:
    """Logits of every token, by transformers alone."""
    from transformers import AutoModelForTokenClassification

    network = AutoModelForTokenClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return network(input_ids=torch.tensor([ids])).logits[0]


def test_it_reads_at_the_ends_of_steps(prm: Path) -> None:
    scorer = ProcessRewardScorer(str(prm), "product", SEPARATOR)
    assert isinstance(scorer, Scorer)
    assert scorer.fills == ("reward", "step_reward")
    given = [group("a b x c x d", "e"), group("f x g", prompt="c")]
    expected_ends = [[2, 4, 6], [1], [1, 3]]
    scorer.score(given)
    responses = [(g, r) for g in given for r in g.responses]
    for (g, response), ends in zip(responses, expected_ends, strict=True):
        logits = plain(prm, g.prompt_ids + response.token_ids)[len(g.prompt_ids) :]
        right = logits.softmax(-1)[:, 1].tolist()
        assert response.columns["reward"] == pytest.approx(math.prod(right[e] for e in ends), rel=1e-4)
        expected = [right[i] if i in ends else 0.0 for i in range(len(response.token_ids))]
        assert response.columns["step_reward"] == pytest.approx(expected, rel=1e-4)
        assert response.loss_mask is None, "a policy still learns from every token"
    assert scorer.score([]) is None


@pytest.mark.parametrize("aggregate", ["minimum", "last", "mean"])
def test_other_scores_of_the_same_steps(prm: Path, aggregate: Any) -> None:
    given = group("a x b x c")
    scorer = ProcessRewardScorer(str(prm), aggregate, SEPARATOR)
    ((_, right),) = scorer.judge([given])[0]
    scorer.score([given])
    assert given.responses[0].columns["reward"] == solution_score(right, aggregate)
    assert len(right) == 3


def test_a_model_of_one_or_three_labels(saved: Callable[..., Path], tmp_path: Path) -> None:
    given = group("a x b")
    ids = given.prompt_ids + given.responses[0].token_ids
    one = classifier(saved("llama"), tmp_path / "one", 1)
    three = classifier(saved("llama"), tmp_path / "three", 3)
    assert [count_labels(str(folder)) for folder in (one, three)] == [1, 3]
    for folder, right in ((one, plain(one, ids).sigmoid()[:, 0]), (three, plain(three, ids).softmax(-1)[:, 2])):
        ((ends, found),) = ProcessRewardScorer(str(folder), "mean", SEPARATOR).judge([given])[0]
        assert ends == [1, 3]
        assert found == pytest.approx(right[[3, 5]].tolist(), rel=1e-4)


@pytest.mark.parametrize("adapter", ["none", "lora", "merged"])
def test_a_trained_one_reloads_everywhere(saved: Callable[..., Path], tmp_path: Path, adapter: str) -> None:
    """Trained with a head of its own, saved, read by the scorer and by plain transformers and peft alike."""
    base = saved("llama")
    settings = FullFineTuning() if adapter == "none" else LoRA()
    model = load_model(ModelSettings(path=str(base)), settings, "step", labels=2, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
                assert "score" not in name or parameter.shape[0] == 2
    given = group("a b x c x d", "e f")
    ends = [Steps(model.tokenizer, SEPARATOR).ends(r.token_ids) for r in given.responses]
    pairs = zip(given.responses, ends, strict=True)
    masked = given.with_responses([Response(r.token_ids, [i in e for i in range(len(r.token_ids))]) for r, e in pairs])
    expected = [v.softmax(-1)[:, 1].tolist() for v in model.outputs([masked], ("step",))["step"]]
    save_model(model, tmp_path / "prm", merge=adapter == "merged")
    assert count_labels(str(tmp_path / "prm")) == 2
    judged = ProcessRewardScorer(str(tmp_path / "prm"), step_separator=SEPARATOR).judge([given])[0]
    assert [e for e, _ in judged] == ends
    for (_, right), values in zip(judged, expected, strict=True):
        assert right == pytest.approx(values, rel=1e-4)
    if adapter != "lora":
        ids = given.prompt_ids + given.responses[0].token_ids
        logits = plain(tmp_path / "prm", ids)[len(given.prompt_ids) :]
        assert logits.softmax(-1)[ends[0], 1].tolist() == pytest.approx(expected[0], rel=1e-4)


def test_a_model_trained_at_a_step_token_is_shown_one(tmp_path: Path) -> None:
    """A response without the token is read with it put after each step; its values stay at the steps' own ends."""
    base = tmp_path / "base"
    tiny.network("llama", vocab_size=260, eos_token_id=257).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    folder = classifier(base, tmp_path / "prm", 2)
    scorer = ProcessRewardScorer(str(folder), "mean", "\n", "<|im_end|>")
    bare = Group([*b"q"], [Response([*b"ab\nc", 257]), Response([*b"d"])], "x:1")
    marked = Group([*b"q"], [Response([*b"ab", 259, *b"\nc", 259, 257]), Response([*b"d", 259])], "x:1")
    found, expected = scorer.judge([bare])[0], scorer.judge([marked])[0]
    assert [ends for ends, _ in found] == [[2, 4], [0]]
    assert [ends for ends, _ in expected] == [[2, 5], [1]]
    for (_, right), (_, same) in zip(found, expected, strict=True):
        assert right == pytest.approx(same, rel=1e-4)
    logits = plain(folder, [*b"qab", 259, *b"\nc", 259]).softmax(-1)[[3, 6], 1]
    assert found[0][1] == pytest.approx(logits.tolist(), rel=1e-4)


def test_another_tokenizer_s_tokens_are_refused(prm: Path) -> None:
    given = Group([1], [Response([tiny.SIZE])])
    with pytest.raises(AlignlabError, match=rf"token {tiny.SIZE} is outside its vocabulary"):
        ProcessRewardScorer(str(prm)).score([given])
    with pytest.raises(ConfigError, match="there is no such folder"):
        ProcessRewardScorer(str(prm / "nowhere")).score([given])


# Programs


def checker(prompt: str, steps: list[str], extra: dict) -> list[float]:
    return [1.0 if step.strip() == prompt.split()[0] else extra.get("wrong", -1.0) for step in steps]


def bound(scorer: StepCheckScorer, folder: Path) -> StepCheckScorer:
    assert isinstance(scorer, NeedsPolicy)
    scorer.bind(None, load_tokenizer(ModelSettings(path=str(folder))))
    return scorer


def test_a_program_labels_steps(prm: Path) -> None:
    given = group("a x b x a", "a")
    given.responses[0].columns["behaviour_logp"] = [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]
    scorer = bound(StepCheckScorer(checker, step_separator=SEPARATOR), prm)
    assert isinstance(scorer, Scorer)
    assert scorer.fills == ("step_label",)
    scorer.score([given])
    first, second = given.responses
    assert tiny.listed(first) == {"step_label": [1.0, -1.0, 1.0], "behaviour_logp": [-2.0, -4.0, -6.0]}
    assert first.predicted == [1, 3, 5]
    assert (tiny.listed(second), second.predicted) == ({"step_label": [1.0]}, [1])


def test_a_program_rewards_steps(prm: Path) -> None:
    given = group("a x b x a")
    given.extra["wrong"] = -0.5
    scorer = bound(StepCheckScorer(checker, "step_reward", SEPARATOR), prm)
    assert scorer.fills == ("step_reward",)
    scorer.score([given])
    assert tiny.listed(given.responses[0]) == {"step_reward": [0.0, 1.0, 0.0, -0.5, 0.0, 1.0]}
    assert given.responses[0].loss_mask is None


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda *_: [1.0], "gave 1 labels for 2 steps"),
        (lambda *_: [1.0, 2.0], r"gave the label 2.0: must be in \[-1, 1\]"),
        (lambda *_: [1.0, math.nan], r"returned \[1\.0, nan\]: is not finite"),
        (lambda prompt, steps, extra: extra["gold"], "failed: KeyError: 'gold'"),
    ],
)
def test_a_program_that_fails_names_the_record(prm: Path, function: Any, reason: str) -> None:
    with pytest.raises(AlignlabError, match=rf"data.jsonl:4: .*{reason}"):
        bound(StepCheckScorer(function, step_separator=SEPARATOR), prm).score([group("a x b")])
