"""RRHF and SLiC-HF: what is ranked, and which response is imitated."""

from __future__ import annotations

from typing import Any

import pytest

from alignlab.algorithms.rrhf import RRHF
from alignlab.algorithms.slic import SLiC
from alignlab.core import AlignlabError, Batch, ConfigError
from tests.algorithms.common import group
from tests.algorithms.ragged import Made, found, made, run


def four() -> Made:
    """Log-probs per token −1, −0.5, −2, −0.25; rewards 2, 3, 2, 0: the worst is the likeliest."""
    return made(
        ([-1.0], {"reward": 2.0}),
        ([-0.5, -0.5, -0.5, -0.5], {"reward": 3.0}),
        ([-2.0, -2.0], {"reward": 2.0}),
        ([-0.25, -0.25], {"reward": 0.0}),
        own=1,
    )


def test_rrhf_by_hand() -> None:
    """Of the five pairs of unequal reward three are in the wrong order, all with the worst one: by 0.75, 0.25, 1.75.
    The best has log-prob −2."""
    losses, metrics = run(RRHF(), four())
    assert losses.tolist() == pytest.approx([0.75 + 0.25 + 1.75 + 2.0])
    assert metrics["rank"].tolist() == pytest.approx([2.75])
    assert metrics["nll"].tolist() == pytest.approx([2.0])
    assert sorted(metrics["margin"].tolist()) == pytest.approx(sorted([0.5, 1.5, -0.75, -0.25, -1.75]))
    assert sum(metrics["accuracy"].tolist()) == 2


def test_rrhf_with_other_length_penalties_and_weights_by_hand() -> None:
    """Undivided log-probs are −1, −2, −4, −0.5; with a square of the length −1, −0.125, −1, −0.125."""
    wrong = {"0": (-0.5 + 1) + (-0.5 + 2) + (-0.5 + 4) + (-1 + 2), "2": 0.875 + 0.0 + 0.875}
    assert found(RRHF(length_penalty=0.0, sft_weight=0.0), four()) == pytest.approx([wrong["0"]])
    assert found(RRHF(length_penalty=2.0, sft_weight=0.5), four()) == pytest.approx([wrong["2"] + 1.0])


def test_rrhf_of_several_groups_is_one_loss_for_each() -> None:
    """The authors' code takes the best response of the first group for all of them."""
    other = made(([-3.0], {"score": 0.0}), ([-4.0, -4.0], {"score": 1.0}))
    tied = made(([-1.0], {"score": 1.0}), ([-7.0], {"score": 1.0}))
    assert found(RRHF(), four(), other, tied) == pytest.approx([4.75, 1.0 + 8.0, 1.0])
    assert found(RRHF(), tied) == [1.0], "a tie is not ranked, and the first of the best is imitated"


def test_rrhf_counts_loss_bearing_tokens() -> None:
    """The authors' code counts the prompt and the padding too."""
    one = made(([-1.0, -3.0], {"score": 1.0}), ([-1.0], {"score": 0.0}))
    one.group.responses[0].token_ids += [5, 5, 5]
    one.group.responses[0].loss_mask = [True, False, False, True, False]
    assert found(RRHF(sft_weight=0.0), one) == pytest.approx([1.0])


def test_rrhf_leaves_out_a_record_s_response_that_was_not_scored() -> None:
    """Scored, it takes part; not scored, it does not."""
    sampled: list[tuple[list[float], dict[str, Any]]] = [([-1.0], {"reward": 0.0}), ([-2.0], {"reward": 1.0})]
    assert found(RRHF(), made(([-9.0], {}), *sampled, own=1)) == pytest.approx([1.0 + 2.0])
    assert found(RRHF(), made(([-9.0], {"reward": 5.0}), *sampled, own=1)) == pytest.approx([1.0 + 8.0 + 7.0 + 9.0])


def test_slic_by_hand() -> None:
    """Log-probs −2 and −2.5: the margin 0.5 is short of 1 by 0.5; the winner is imitated with weight 0.25."""
    pair = made(([-1.0, -1.0], {"score": 1.0}), ([-2.5], {"score": 0.0}))
    losses, metrics = run(SLiC(delta=1.0, sft_weight=0.25), pair)
    assert losses.tolist() == pytest.approx([0.5 + 0.25 * 2.0])
    assert metrics["calibration"].tolist() == pytest.approx([0.5])
    assert metrics["nll"].tolist() == pytest.approx([2.0])
    assert found(SLiC(delta=0.5, sft_weight=0.0), pair) == [0.0]


def test_slic_does_not_normalise() -> None:
    """Twice as many tokens with the same log-probs each are twice the margin."""
    long = made(([-1.0] * 4, {"score": 0.0}), ([-0.5] * 4, {"score": 1.0}))
    assert found(SLiC(delta=3.0, sft_weight=0.0), long) == pytest.approx([3.0 - 2.0])


def tournament(target: bool = True) -> Made:
    """A record's own response (−8), and three of the policy (−1, −3, −2): 2 beat 1, then 3 beat 2."""
    sampled: list[tuple[list[float], dict[str, Any]]] = [
        ([-1.0], {"lost_to": 2.0 if target else 1.0}),
        ([-3.0], {"lost_to": 3.0 if target else 2.0}),
        ([-2.0], {"lost_to": -1.0}),
    ]
    return made(*([([-4.0, -4.0], {})] if target else []), *sampled, own=int(target), prompt=1)


def test_slic_of_a_tournament_has_the_pairs_that_met() -> None:
    """(2, 1) has margin −2, (3, 2) has 1. What the two best have to do with the first is not in the loss."""
    assert found(SLiC(delta=1.5, sft_weight=0.0), tournament()) == pytest.approx([3.5, 0.5])
    assert Batch([tournament().group]).count("pair") == 2


def test_slic_imitates_the_response_that_target_names() -> None:
    """The champion (−2), or the record's own response (−8), which no one compared with the others."""
    best, own = SLiC(1.5, 0.5, "best"), SLiC(1.5, 0.5, "data")
    assert found(best, tournament()) == pytest.approx([3.5 + 1.0, 0.5 + 1.0])
    assert found(own, tournament()) == pytest.approx([3.5 + 4.0, 0.5 + 4.0])
    both = made(([-1.0], {"score": 1.0}), ([-3.0], {"score": 0.0}))
    assert found(own, tournament(), both) == pytest.approx([7.5, 4.5, 0.5 * 1.0]), "pairs of data: the winner"


def test_slic_imitates_a_target_that_data_give_beside_their_pairs() -> None:
    """Of a record's own responses the one without a score is the target; of several with scores, the best."""
    target = made(([-1.0], {"score": 1.0}), ([-3.0], {"score": 0.0}), ([-6.0], {}))
    assert found(SLiC(1.0, 0.5, "data"), target) == pytest.approx([0.5 * 6.0])
    assert found(SLiC(1.0, 0.5, "best"), target) == pytest.approx([0.5 * 1.0])
    ranking = made(([-3.0], {"reward": 0.5}), ([-5.0], {"reward": 1.0}), ([-1.0], {"reward": 2.0}), own=2)
    losses = found(SLiC(0.0, 1.0, "data"), ranking)
    assert losses == pytest.approx([5.0 + 2.0, 5.0, 5.0]), "the better of the record's two, not the sampled one"


def test_slic_names_a_missing_response_of_the_record() -> None:
    sampled = tournament(target=False)
    for response in sampled.group.responses:
        response.source = "policy"
    with pytest.raises(AlignlabError, match=r"^data\.jsonl:3: algorithm\.target=data .*source\.keep=true"):
        found(SLiC(target="data"), sampled)
    assert found(SLiC(1.5, 0.5), sampled) == pytest.approx([4.5, 1.5])


def test_a_prompt_without_pairs_has_no_slic_loss() -> None:
    tied = made(([-1.0], {"score": 1.0}), ([-3.0], {"score": 1.0}))
    pair = made(([-1.0], {"score": 1.0}), ([-3.0], {"score": 0.0}))
    assert found(SLiC(sft_weight=1.0), tied, pair) == [1.0]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(RRHF, {"length_penalty": -1.0}), (RRHF, {"sft_weight": -1.0}), (SLiC, {"delta": -0.5}),
     (SLiC, {"sft_weight": -0.5}), (SLiC, {"target": "winner"})],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(kind: Any, settings: dict[str, Any]) -> None:
    (key,) = settings
    with pytest.raises(ConfigError, match=rf"^algorithm\.{key}="):
        kind(**settings)


def test_rrhf_refuses_a_single_response() -> None:
    assert (RRHF.unit, SLiC.unit) == ("group", "pair")
    assert "at least 2 responses" in str(RRHF().check(group({})))
    assert RRHF().check(group({}, {})) is None
