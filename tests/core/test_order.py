"""Which response is better: the columns that say so, in their order of precedence."""

from __future__ import annotations

import pytest
import torch

from alignlab.core import AlignlabError, Batch, Group, Response
from alignlab.core.order import net_wins


def group(*columns: dict[str, float], sources: tuple[str, ...] = ()) -> Group:
    names = sources or ("data",) * len(columns)
    made = [Response([2], columns=dict(c), source=s) for c, s in zip(columns, names, strict=True)]
    return Group([1], made, "data.jsonl:3")  # type: ignore[arg-type]


def pairs(*groups: Group) -> list[tuple[int, int]]:
    found = Batch(groups).pairs
    return list(zip(found.winner_P.tolist(), found.loser_P.tolist(), strict=True))


def test_a_tournament_has_one_pair_for_each_loser() -> None:
    """0 beat 1, 3 beat 2, 3 beat 0: the pairs are those that met, not all six."""
    four = group(*({"lost_to": to, "reward": 0.0} for to in (3, 0, 3, -1)))
    assert set(pairs(four)) == {(3, 0), (0, 1), (3, 2)}
    assert Batch([four]).best_G.tolist() == [3]
    before = group({"score": 1.0}, {"score": 2.0})
    assert set(pairs(before, four)) == {(1, 0), (5, 2), (2, 3), (5, 4)}
    assert Batch([before, four]).best_G.tolist() == [1, 5]


def test_the_first_column_in_order_of_precedence_decides() -> None:
    both = {"score": 1.0, "reward": 0.0}, {"score": 0.0, "reward": 1.0}
    assert pairs(group(*both)) == [(0, 1)]
    assert pairs(group(*({"reward": c["reward"]} for c in both))) == [(1, 0)]
    likes = group({"preference": 0.25, **both[0]}, {"preference": 0.75, **both[1]})
    assert pairs(likes) == [(1, 0)]
    assert Batch([likes]).pairs.probability_P.tolist() == [0.75]
    assert pairs(group({"lost_to": -1.0, "preference": 0.25}, {"lost_to": 0.0, "preference": 0.75})) == [(0, 1)]


def test_margins_are_in_units_of_what_decides() -> None:
    assert Batch([group({"reward": 3.0}, {"reward": 0.5})]).pairs.margin_P.tolist() == [2.5]
    assert Batch(
        [group({"preference": 0.9, "score": 4.0}, {"preference": 0.1, "score": 1.0})]
    ).pairs.margin_P.tolist() == [3]


def test_a_record_s_own_response_need_not_be_compared() -> None:
    mixed = group({}, {"lost_to": -1.0}, {"lost_to": 1.0}, sources=("data", "policy", "policy"))
    assert pairs(mixed) == [(1, 2)]
    assert Batch([mixed]).best_G.tolist() == [1]
    for sources in (("policy", "policy", "policy"), ("policy", "data", "policy")):
        with pytest.raises(AlignlabError, match=r"data\.jsonl:3: preference pairs need a 'score'"):
            pairs(group({}, {"reward": 1.0}, {"reward": 0.0}, sources=sources))


def test_the_first_wins_a_tie_and_a_single_one_always() -> None:
    assert Batch([group({"reward": 1.0}, {"reward": 2.0}, {"reward": 2.0}), group({})]).best_G.tolist() == [1, 3]


@pytest.mark.parametrize("to", [2.0, 0.0])
def test_lost_to_must_be_the_index_of_another_response(to: float) -> None:
    with pytest.raises(AlignlabError, match=r"data\.jsonl:3: 'lost_to' of response 0 is .*index of another"):
        pairs(group({"lost_to": to}, {"lost_to": -1.0}))


def test_filled_columns_are_read_back_and_replace_the_old() -> None:
    groups = [group({"reward": 1.0}), group({"reward": 2.0}, {"reward": 3.0})]
    groups[0].responses[0].token_ids = [5, 6]
    groups[0].responses[0].loss_mask = [False, True]
    batch = Batch(groups)
    assert batch["reward_N"].tolist() == [1, 2, 3]
    batch.fill("reward_N", torch.tensor([4.0, 5.0, 6.0]))
    batch.fill("advantage_T", torch.tensor([7.0, 8.0, 9.0]))
    batch.fill("weight_G", torch.tensor([0.5, 0.25]))
    assert batch["reward_N"].tolist() == [4, 5, 6]
    assert Batch(groups)["advantage_T"].tolist() == [7, 8, 9]
    assert [r.columns["advantage"] for g in groups for r in g.responses] == [[7.0], [8.0], [9.0]]
    assert [g.columns for g in groups] == [{"weight": 0.5}, {"weight": 0.25}]


def test_net_wins_are_pairs_won_minus_pairs_lost() -> None:
    assert net_wins(group({"score": 3.0}, {"score": 1.0}, {"score": 3.0})) == [1, -2, 1]
    assert net_wins(group({"preference": 0.5}, {"preference": 0.5})) == [0, 0]
    assert net_wins(group({"lost_to": -1.0}, {"lost_to": 0.0}, {"lost_to": 0.0})) == [2, -1, -1]
