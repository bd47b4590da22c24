"""Batches: axes, columns by name, preference pairs, counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignlab.core import AlignlabError, Batch, Group, Response


def scored(*scores: float, origin: str = "data.jsonl:7") -> Group:
    """A group whose responses have these scores."""
    return Group([1], [Response([2], columns={"score": s}) for s in scores], origin)


def preferred(*preferences: float, **more: list[float]) -> Group:
    columns = [{"preference": p, **{k: v[i] for k, v in more.items()}} for i, p in enumerate(preferences)]
    return Group([1], [Response([2], columns=c) for c in columns], "data.jsonl:7")  # type: ignore[arg-type]


def pairs(*groups: Group) -> list[tuple[int, int, float, float]]:
    found = Batch(groups).pairs
    columns = (found.winner_P, found.loser_P, found.probability_P, found.margin_P)
    assert all(len(found) == len(c) for c in columns)
    return list(zip(*(c.tolist() for c in columns), strict=True))


@pytest.fixture
def batch() -> Batch:
    """Two groups of two and one response; the second response has a user's turn in it that bears no loss."""
    first = Response([5, 6], columns={"reward": 1.5, "ref_logp": [-1.0, -2.0]}, finished=False)
    second = Response([7, 8, 9], [True, False, True], columns={"reward": -1.0, "ref_logp": [-3.0, -4.0]})
    third = Response([10], columns={"reward": 0.0, "ref_logp": [-5.0]})
    return Batch(
        [
            Group([1, 2], [first, second], "a.jsonl:1", columns={"weight": 2.0}),
            Group([3], [third], "a.jsonl:2", columns={"weight": 3.0}),
        ]
    )


def test_a_batch_is_flat_and_each_item_knows_its_owner(batch: Batch) -> None:
    assert (batch.G, batch.N, batch.T) == (2, 3, 5)
    assert batch.length_N.tolist() == [2, 2, 1]
    assert batch.response_T.tolist() == [0, 0, 1, 1, 2]
    assert batch.group_N.tolist() == [0, 0, 1]
    assert batch.token_T.tolist() == [5, 6, 7, 9, 10]
    assert batch.finished_N.tolist() == [False, True, True]
    assert {t.dtype for t in (batch.response_T, batch.group_N, batch.length_N, batch.token_T)} == {torch.int64}


def test_columns_are_read_on_each_axis(batch: Batch) -> None:
    assert batch["reward_N"].tolist() == [1.5, -1.0, 0.0]
    assert batch["ref_logp_T"].tolist() == [-1.0, -2.0, -3.0, -4.0, -5.0]
    assert batch["weight_G"].tolist() == [2.0, 3.0]
    assert {batch[c].dtype for c in ("reward_N", "ref_logp_T", "weight_G")} == {torch.float32}
    assert batch["reward_N"] is batch["reward_N"]


def test_a_column_is_in_a_batch_only_if_all_have_it(batch: Batch) -> None:
    assert all(c in batch for c in ("reward_N", "ref_logp_T", "weight_G"))
    assert not any(c in batch for c in ("value_T", "weight_N", "reward_G"))
    del batch.responses[2].columns["reward"]
    assert "reward_N" not in batch, "a column that one response lacks is not there"
    assert "reward_N" not in Batch([])


def test_a_missing_column_is_named_with_its_record_and_those_there(batch: Batch) -> None:
    del batch.responses[2].columns["ref_logp"]
    with pytest.raises(AlignlabError, match=r"^a\.jsonl:2: no column 'ref_logp' \(there are: reward\).*scorer"):
        batch["ref_logp_T"]
    with pytest.raises(AlignlabError, match=r"^a\.jsonl:1: no column 'gold' \(there are: weight\)"):
        batch["gold_G"]


def test_a_column_on_the_wrong_axis_is_refused(batch: Batch) -> None:
    with pytest.raises(
        AlignlabError, match=r"^a\.jsonl:1: column 'reward' is a number for each response; 'reward_T' needs a list"
    ):
        batch["reward_T"]
    with pytest.raises(
        AlignlabError, match=r"^a\.jsonl:1: column 'ref_logp' is a list for each response; 'ref_logp_N' needs a number"
    ):
        batch["ref_logp_N"]


@pytest.mark.parametrize("name", ["reward", "reward_X", "_N", "N"])
def test_a_name_without_axis_is_refused(batch: Batch, name: str) -> None:
    with pytest.raises(AlignlabError, match=f"^'{name}': a column is read by name and axis"):
        batch[name]


def test_a_column_has_a_value_for_each_loss_bearing_token(batch: Batch) -> None:
    batch.responses[1].columns["ref_logp"] = [-3.0, -4.0, -5.0]
    with pytest.raises(AlignlabError, match=r"^a\.jsonl:1: column 'ref_logp' has 3 values for 2 loss-bearing tokens"):
        batch["ref_logp_T"]


def test_an_empty_batch_has_no_items() -> None:
    batch = Batch([])
    assert (batch.G, batch.N, batch.T, len(batch.pairs)) == (0, 0, 0, 0)
    assert batch["reward_N"].shape == batch.token_T.shape == (0,)


def test_pairs_of_a_ranking_with_a_tie_and_of_a_second_group() -> None:
    assert pairs(scored(1.0, 3.0, 1.0, 0.5), scored(0.0, -2.0)) == [
        (1, 0, 1.0, 2.0),
        (0, 3, 1.0, 0.5),
        (1, 2, 1.0, 2.0),
        (1, 3, 1.0, 2.5),
        (2, 3, 1.0, 0.5),
        (4, 5, 1.0, 2.0),
    ]


@pytest.mark.parametrize("k", [2, 3, 5, 9])
def test_k_different_scores_make_k_times_k_minus_1_over_2_pairs(k: int) -> None:
    assert len(pairs(scored(*range(k)))) == k * (k - 1) // 2
    assert pairs(scored(*[1.0] * k)) == []


def test_pairs_from_preferences() -> None:
    assert pairs(preferred(0.25, 0.75), preferred(1.0, 0.0)) == [(1, 0, 0.75, 0.5), (2, 3, 1.0, 1.0)]


def test_an_even_preference_is_a_pair_whose_margin_should_be_zero() -> None:
    assert pairs(preferred(0.5, 0.5)) == [(0, 1, 0.5, 0.0)]


def test_preference_gives_order_and_certainty_score_the_margin() -> None:
    assert pairs(preferred(0.25, 0.75, score=[1.0, 4.0])) == [(1, 0, 0.75, 3.0)]


def test_responses_without_a_partner_make_no_pairs() -> None:
    assert pairs(scored(1.0), Group([1], [], "data.jsonl:8")) == []


def test_contradictory_or_missing_columns_are_refused() -> None:
    with pytest.raises(AlignlabError, match=r"^data\.jsonl:7: the preferences of a pair must sum to 1, got 0\.6"):
        pairs(preferred(0.6, 0.6))
    with pytest.raises(AlignlabError, match=r"^data\.jsonl:7: 'preference' is for groups of two.*'score'"):
        pairs(preferred(0.5, 0.2, 0.3))
    group = scored(1.0, 2.0)
    del group.responses[1].columns["score"]
    with pytest.raises(AlignlabError, match=r"^data\.jsonl:7: preference pairs need a 'score'"):
        pairs(group)


def test_count_is_the_number_of_units(batch: Batch) -> None:
    assert [batch.count(u) for u in ("token", "response", "group")] == [5, 3, 2]
    assert Batch([scored(1.0, 3.0, 1.0), scored(0.0, 0.0)]).count("pair") == 2


def test_sum_and_mean_are_over_the_loss_bearing_tokens_of_each_response(batch: Batch) -> None:
    x_T = torch.tensor([1.0, 2.0, 10.0, 20.0, 7.0])
    assert batch.sum(x_T).tolist() == [3.0, 30.0, 7.0]
    assert batch.mean(x_T).tolist() == [1.5, 15.0, 7.0]


def test_difference_is_winner_minus_loser_for_each_pair() -> None:
    found = Batch([scored(1.0, 3.0), scored(0.0, -2.0)]).pairs
    assert (found.winner_P.tolist(), found.loser_P.tolist()) == ([1, 2], [0, 3])
    assert found.difference(torch.tensor([10.0, 11.5, 20.0, 24.0])).tolist() == [1.5, -4.0]


def test_each_pair_knows_its_group() -> None:
    found = Batch([scored(1.0), scored(1.0, 3.0, 2.0), scored(0.0, -2.0)]).pairs
    assert found.group_P.tolist() == [1, 1, 1, 2]
    assert found.group_P.dtype == torch.int64


def test_one_each_gives_indices_on_the_axis_of_responses() -> None:
    batch = Batch([scored(1.0, 3.0), scored(5.0), scored(0.0, -2.0, 4.0)])
    assert batch.best_G.tolist() == [1, 2, 5]
    assert batch.one_each(lambda group: len(group.responses) - 1).tolist() == [1, 2, 5]
    assert batch.one_each(lambda group: 0).tolist() == [0, 2, 3]


@pytest.mark.parametrize("name", ["reward_N", "reward_T", "reward_G"])
def test_a_column_that_is_no_number_is_named_with_its_record(name: str) -> None:
    value: Any = ["hi"] if name == "reward_T" else None
    group = Group([1], [Response([2], columns={"reward": value})], "data.jsonl:3", columns={"reward": value})
    with pytest.raises(AlignlabError, match=r"^data\.jsonl:3: the column 'reward' is .*: a number is wanted$"):
        Batch([group])[name]
