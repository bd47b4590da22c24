"""Labels of steps from completions: exact shares with a policy whose completions are known, and a real one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from alignlab.core import AlignlabError, ConfigError, Group, NeedsPolicy, NeedsSampler, Response, Scorer
from alignlab.rollout import LocalRollout, MonteCarloLabels
from tests.rollout.tiny import EOS, ids, model, prompts, tokenizer
from tests.tiny import listed


class Scripted:
    """A policy whose completions of a text are written down, by what the text ends with."""

    def __init__(self, completions: dict[str, list[str]]) -> None:
        self.completions, self.asked = completions, []

    def sample(self, groups: Sequence[Group], n: int, seed: int) -> list[Group]:
        found = []
        for group in groups:
            begun = tokenizer().decode(group.prompt_ids)
            self.asked.append((group.origin, begun, n, seed))
            texts = next(v for k, v in self.completions.items() if begun.endswith(k))
            assert len(texts) == n
            found.append(group.with_responses([Response([*ids(t), EOS], text=t.replace("|", "")) for t in texts]))
        return found


def right(prompt: str, response: str, extra: dict) -> bool:
    """The answer is the text after the last newline."""
    return response.rpartition("\n")[2] == extra["gold"]


def solution(*written: str, gold: str = "l") -> Group:
    def text(w: str) -> str:
        return tokenizer().decode(ids(w), skip_special_tokens=True)

    responses = [Response(ids(w), text=text(w)) for w in written]
    return Group(ids("a|b"), responses, "prompts.jsonl:7", "ab", extra={"gold": gold})


@pytest.mark.parametrize(
    ("estimate", "labels"),
    [("soft", [2 * 0.75 - 1, 2 * 0.25 - 1, 1.0]), ("hard", [1.0, 1.0, 1.0])],
)
def test_exact_shares(estimate: Any, labels: list[float]) -> None:
    """Of the completions of the first step 3 of 4 are right, of the second 1 of 4; the solution itself is."""
    group = solution("c|\n|d|\n|l|<eos>")
    policy = Scripted({"c\n": ["l", "d|\n|l", "e", "\n|l"], "d\n": ["e", "l", "k|l", "l|\n|e"]})
    scorer = MonteCarloLabels(right, 4, estimate, seed=5)
    assert isinstance(scorer, Scorer)
    assert scorer.fills == ("step_label",)
    attach(scorer, policy, tokenizer())
    scorer.score([group])
    response = group.responses[0]
    assert listed(response) == {"step_label": labels}
    assert response.predicted == [1, 3, 5]
    assert [(begun, n, seed) for _, begun, n, seed in policy.asked] == [("abc\n", 4, 5), ("abc\nd\n", 4, 5)]


def attach(scorer: MonteCarloLabels, sampler: Any, tokenizer: Any) -> None:
    assert isinstance(scorer, NeedsPolicy) and isinstance(scorer, NeedsSampler)
    scorer.bind(None, tokenizer)
    scorer.bind_sampler(sampler)


def test_no_completion_is_right() -> None:
    group = solution("c|\n|d|<eos>")
    for estimate in ("soft", "hard"):
        scorer = MonteCarloLabels(right, 2, estimate)  # type: ignore[arg-type]
        attach(scorer, Scripted({"c\n": ["d", "e"]}), tokenizer())
        scorer.score([group])
        assert list(group.responses[0].columns["step_label"]) == [-1.0, -1.0]


def test_each_solution_is_completed_for_itself() -> None:
    """Equal beginnings of two solutions of one prompt have samples of their own; a solution of one step none."""
    policy = Scripted({"c\n": ["l", "e"]})
    scorer = MonteCarloLabels(right, 2, "soft")
    attach(scorer, policy, tokenizer())
    groups = [solution("c|\n|l|<eos>", "c|\n|e|<eos>", "l|<eos>"), solution("e|<eos>")]
    scorer.score(groups)
    found = [[list(r.columns["step_label"]) for r in g.responses] for g in groups]
    assert found == [[[0.0, 1.0], [0.0, -1.0], [1.0]], [[-1.0]]]
    assert len({origin for origin, *_ in policy.asked}) == 2


def test_what_a_stop_string_cut_off_is_no_part_of_the_answer() -> None:
    class Stopped(Scripted):
        def sample(self, groups: Sequence[Group], n: int, seed: int) -> list[Group]:
            return [g.with_responses([Response(ids("l|k"), text="l")] * n) for g in groups]

    scorer = MonteCarloLabels(right, 1, "soft")
    attach(scorer, Stopped({}), tokenizer())
    group = solution("c|\n|d|<eos>")
    scorer.score([group])
    assert list(group.responses[0].columns["step_label"]) == [1.0, -1.0]


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="use `alignlab sample`"):
        MonteCarloLabels(right).score([solution("c")])
    with pytest.raises(ConfigError, match=r"scoring\.completions=0"):
        MonteCarloLabels(right, 0)
    scorer = MonteCarloLabels(lambda prompt, response, extra: extra["answer"])
    attach(scorer, Scripted({}), tokenizer())
    with pytest.raises(AlignlabError, match=r"prompts.jsonl:7: .*failed: KeyError: 'answer'"):
        scorer.score([solution("c")])


def test_a_real_policy_s_shares_are_those_of_its_samples() -> None:
    """Whether the token after a beginning is below 8: the share is near the model's own probability of that."""
    packed = model("llama")
    packed.network.lm_head.weight.data *= 5  # far from uniform

    def low(prompt: str, response: str, extra: dict) -> bool:
        return any(response.endswith(piece) for piece in ("a", "b", "c", "ab", "ca"))

    engine = LocalRollout(max_new_tokens=1).sampler(packed)
    scorer = MonteCarloLabels(low, 400, "soft")
    attach(scorer, engine, packed.tokenizer)
    group = prompts(4)[0].with_responses([Response([*ids("d|\n|e|\n|f"), EOS], text="d\ne\nf")])
    scorer.score([group])
    labels = group.responses[0].columns["step_label"]
    assert isinstance(labels, np.ndarray)
    assert len(labels) == 3
    for label, end in zip(labels, (2, 4), strict=False):
        begun = [*group.prompt_ids, *group.responses[0].token_ids[:end]]
        with torch.no_grad():
            p = packed.network(input_ids=torch.tensor([begun])).logits[0, -1].softmax(-1)
        expected = float(p[[3, 4, 5, 6, 7]].sum())  # also where an end token follows nothing: that text ends in "\n"
        assert (label + 1) / 2 == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 400) ** 0.5 + 1e-9)
    assert engine.generated_tokens == 800
