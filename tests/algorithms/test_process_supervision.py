"""Process reward models and expert iteration: hand arithmetic, finite differences, what is supervised, the figures."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from alignlab.algorithms.expert_iteration import ExpertIteration
from alignlab.algorithms.process_reward_model import ProcessRewardModel, first_error, step_loss
from alignlab.core import AlignlabError, Batch, ConfigError, Group, Outputs, Response, segments
from tests.algorithms.common import means


def solution(*labels: float, every: int = 2) -> Response:
    """A response with a step every so many tokens."""
    count = every * len(labels)
    mask = [(i + 1) % every == 0 for i in range(count)]
    return Response(list(range(count)), mask, {"step_label": list(labels)})


def groups(*solutions: Response) -> list[Group]:
    return [Group([1], [s], f"data.jsonl:{i + 1}") for i, s in enumerate(solutions)]


def odds(*right: float) -> list[list[float]]:
    """Logits that give these probabilities of being right."""
    return [[math.log(1 - p), math.log(p)] for p in right]


# The loss


def test_the_step_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0], [5.0, 8.0]])
    found = step_loss(logits, torch.tensor([1.0, 0.0, 0.25, 0.5]))
    assert found.tolist() == pytest.approx(
        [
            math.log(1 + math.exp(-2)),
            math.log(1 + math.exp(-1)),
            math.log(2),
            0.5 * math.log(1 + math.exp(-3)) + 0.5 * math.log(1 + math.exp(3)),
        ]
    )


def test_the_soft_target_is_the_optimum() -> None:
    """Cross-entropy is least where P(right) is the label's."""
    right = torch.tensor([0.2, 0.9])
    best = step_loss(torch.tensor(odds(0.2, 0.9)), right)
    for other in (odds(0.15, 0.85), odds(0.25, 0.95)):
        assert (step_loss(torch.tensor(other), right) > best).all()
    entropy = [-(p * math.log(p) + (1 - p) * math.log(1 - p)) for p in (0.2, 0.9)]
    assert best.tolist() == pytest.approx(entropy, rel=1e-5)


def test_the_gradient_is_that_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    right = torch.rand(6, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: step_loss(x, right), (logits,))


def test_the_algorithm_turns_labels_into_targets() -> None:
    """Labels -1, 0.5 and 1: P(right) is 0, 0.75 and 1."""
    batch = Batch(groups(solution(1.0, 0.5), solution(-1.0)))
    logits = [[0.0, 1.0], [0.0, 2.0], [0.0, 1.0]]
    found, _ = ProcessRewardModel().loss(Outputs(step_TL=torch.tensor(logits)), batch)
    soft = 0.75 * math.log(1 + math.exp(-2)) + 0.25 * math.log(1 + math.exp(2))
    assert found.tolist() == pytest.approx([math.log(1 + math.exp(-1)), soft, math.log(1 + math.exp(1))])


# What is supervised


@pytest.mark.parametrize(
    ("settings", "labels", "left"),
    [
        ({}, (1, 1, 1), [(1, 1.0), (3, 1.0), (5, 1.0)]),
        ({}, (1, -1, 1), [(1, 1.0), (3, -1.0)]),
        ({}, (-1, -1, 1), [(1, -1.0)]),
        ({}, (1, 0, -1, 0), [(1, 1.0), (3, 0.0), (5, -1.0)]),
        ({}, (0.5, -0.1, 0.9), [(1, 0.5), (3, -0.1), (5, 0.9)]),
        ({"supervise": "first_error"}, (0.5, -0.1, 0.9), [(1, 0.5), (3, -0.1)]),
        ({"supervise": "all"}, (1, -1, 0, 1), [(1, 1.0), (3, -1.0), (5, 0.0), (7, 1.0)]),
        ({"neutral": "right"}, (0, -1), [(1, 1.0), (3, -1.0)]),
        ({"neutral": "wrong"}, (1, 0, 1), [(1, 1.0), (3, -1.0)]),
        ({"neutral": "wrong", "supervise": "all"}, (1, 0, 1), [(1, 1.0), (3, -1.0), (5, 1.0)]),
        ({"neutral": "skip"}, (0, 1, 0, -1, 1), [(3, 1.0), (7, -1.0)]),
        ({"neutral": "skip", "supervise": "all"}, (0, 1, -1, 0, 1), [(3, 1.0), (5, -1.0), (9, 1.0)]),
    ],
)
def test_which_steps_bear_loss(settings: dict[str, Any], labels: tuple, left: list) -> None:
    given = groups(solution(*labels))
    made = ProcessRewardModel(**settings).prepare(given)
    response = made[0].responses[0]
    assert list(zip(response.predicted, response.columns["step_label"], strict=True)) == left  # type: ignore[arg-type]
    assert given[0].responses[0].columns == {"step_label": list(labels)}, "the records must not change"
    assert given[0].responses[0].loss_tokens == len(labels)
    assert made[0].origin == "data.jsonl:1"


def test_one_share_among_the_labels_says_that_all_are_shares() -> None:
    """A solution whose steps happen to succeed always or never is not cut; nor in later iterations, nor on resuming."""
    algorithm = ProcessRewardModel()
    made = algorithm.prepare(groups(solution(0.5), solution(1, -1, 1)))
    assert [r.loss_tokens for g in made for r in g.responses] == [1, 3]
    resumed = ProcessRewardModel()
    resumed.state = algorithm.state
    assert [
        g.responses[0].loss_tokens for a in (algorithm, resumed) for g in a.prepare(groups(solution(1, -1, 1)))
    ] == [3, 3]
    assert [g.responses[0].loss_tokens for g in ProcessRewardModel().prepare(groups(solution(1, -1, 1)))] == [2]


def test_a_solution_without_a_step_to_learn_from_is_left_out() -> None:
    both = Group([1], [solution(0, 0), solution(0, 1)], "x:1")
    made = ProcessRewardModel(neutral="skip").prepare([*groups(solution(0)), both])
    assert [[list(r.columns["step_label"]) for r in g.responses] for g in made] == [[[1.0]]]


def test_records_without_labels_are_refused() -> None:
    algorithm = ProcessRewardModel()
    assert algorithm.check(groups(solution(1, -1))[0]) is None
    reason = algorithm.check(Group([1], [solution(1), Response([2])]))
    assert reason and "`step_label` for each step" in reason
    assert algorithm.check(Group([1])) is not None


# Figures


def test_first_error_by_brute_force() -> None:
    rng = random.Random(0)
    for _ in range(100):
        lengths = [rng.randrange(1, 6) for _ in range(rng.randrange(1, 6))]
        wrong = [[rng.random() < 0.4 for _ in range(n)] for n in lengths]
        expected = [row.index(True) if True in row else len(row) for row in wrong]
        flat = torch.tensor([w for row in wrong for w in row])
        assert first_error(flat, segments(lengths), len(lengths)).tolist() == expected


def test_metrics_by_hand() -> None:
    """ProcessBench's: four right solutions of which three have no step predicted wrong; four wrong ones of which one's
    first error is found: the others are found too early, too late and not at all."""
    told = [
        ((1, 1), (0.9, 0.6)),
        ((1,), (0.51,)),
        ((1, 1, 1), (0.9, 0.9, 0.9)),
        ((1, 1), (0.9, 0.4)),
        ((1, -1), (0.9, 0.1)),
        ((1, -1), (0.2, 0.1)),
        ((-1, -1), (0.7, 0.1)),
        ((1, -1), (0.9, 0.9)),
    ]
    given = groups(*(solution(*labels) for labels, _ in told))
    step_TL = odds(*(p for _, right in told for p in right))
    algorithm = ProcessRewardModel(supervise="all")
    found = means(algorithm, algorithm.prepare(given), [8], step_TL=step_TL)  # type: ignore[arg-type]
    assert found["accuracy_right"] == pytest.approx(3 / 4)
    assert found["accuracy_wrong"] == pytest.approx(1 / 4)
    assert found["f1"] == pytest.approx(2 * 0.75 * 0.25 / 1.0)
    assert found["accuracy"] == pytest.approx(12 / 16)
    assert found["predicted_right"] == pytest.approx(11 / 16)


def test_metrics_do_not_depend_on_the_split() -> None:
    rng = random.Random(1)
    given = groups(*(solution(*rng.choices([1, 1, -1], k=rng.randrange(1, 5))) for _ in range(12)))
    algorithm = ProcessRewardModel()
    made = algorithm.prepare(given)
    step_TL = odds(*(rng.random() for _ in range(Batch(made).T)))
    whole = means(algorithm, made, [12], step_TL=step_TL)  # type: ignore[arg-type]
    for splits in ([1] * 12, [5, 7], [2, 9, 1]):
        assert means(algorithm, made, splits, step_TL=step_TL) == pytest.approx(whole)  # type: ignore[arg-type]


def test_a_neutral_step_is_neither_right_nor_wrong() -> None:
    given = groups(solution(0, 1, 0), solution(0, -1))
    found = means(ProcessRewardModel(), given, [2], step_TL=odds(0.9, 0.9, 0.9, 0.9, 0.1))  # type: ignore[arg-type]
    assert (found["accuracy"], found["accuracy_right"], found["accuracy_wrong"], found["f1"]) == (1.0, 1.0, 1.0, 1.0)


def test_f1_needs_both_kinds_of_solution() -> None:
    found = means(ProcessRewardModel(), groups(solution(1)), [1], step_TL=odds(0.9))  # type: ignore[arg-type]
    assert "f1" not in found
    assert "accuracy_wrong" not in found
    both = groups(solution(1), solution(-1))
    assert means(ProcessRewardModel(), both, [2], step_TL=odds(0.1, 0.9))["f1"] == 0.0  # type: ignore[arg-type]


# Expert iteration


def rewarded(*rewards: float) -> Group:
    return Group([1], [Response([i + 2], columns={"reward": r}) for i, r in enumerate(rewards)], "x:1")


def kept(algorithm: ExpertIteration, *given: Group) -> list[list[int]]:
    return [[r.token_ids[0] for r in g.responses] for g in algorithm.prepare(given)]


def test_expert_iteration_learns_from_the_best_that_reach_the_minimum() -> None:
    given = rewarded(0.1, 0.9, 0.5), rewarded(0.4, 0.3), rewarded(0.6, 0.6)
    assert kept(ExpertIteration(), *given) == [[3], [2], [2]]
    algorithm = ExpertIteration(minimum=0.5)
    assert kept(algorithm, *given) == [[3], [2]]
    assert algorithm.report == {"good_enough": pytest.approx(2 / 3)}
    assert kept(ExpertIteration(keep=2, minimum=0.5), *given) == [[3, 4], [2, 3]]
    assert kept(ExpertIteration(keep=2, minimum=0.95), *given) == []
    with pytest.raises(ConfigError, match=r"algorithm.keep"):
        ExpertIteration(keep=0)
    with pytest.raises(AlignlabError, match="reward"):
        ExpertIteration().prepare([Group([1], [Response([2])])])
