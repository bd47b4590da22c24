"""Trunk and branches against a definition by brute force: every token of every group has an id of its own."""

from __future__ import annotations

import random

import pytest
import torch

from alignlab.core import Batch, Group, Response
from alignlab.models.packing import Layout, Rows, group_cost, lay_out, micro_batches

FILLER = 0
"""Padding; no token has this id."""

Place = tuple[int, int | None, int]
"""Where a token belongs: its group, its response (None: the prompt), its position in prompt + response."""


def numbered(rng: random.Random, count: int, masks: bool = True, most: int = 4) -> tuple[list[Group], dict[int, Place]]:
    """Random groups of 0..`most` responses in which no two tokens are alike, and where each token belongs."""
    groups: list[Group] = []
    places: dict[int, Place] = {}
    for g in range(count):
        prompt = rng.randrange(1, 8)
        group = Group([*range(len(places) + 1, len(places) + 1 + prompt)])
        places.update({t: (g, None, i) for i, t in enumerate(group.prompt_ids)})
        for k in range(rng.randrange(most + 1)):
            response = [*range(len(places) + 1, len(places) + 1 + rng.randrange(1, 6))]
            places.update({t: (g, k, prompt + i) for i, t in enumerate(response)})
            mask = [rng.random() < 0.6 for _ in response] if masks and rng.random() < 0.5 else None
            group.responses.append(Response(response, mask))
        groups.append(group)
    return groups, places


def sees(query: Place, key: Place, window: int | None) -> bool:
    """The definition: its own prompt and the earlier tokens of its own response, near enough."""
    group, response, at = query
    same = key[0] == group and (key[1] is None or key[1] == response)
    return same and key[2] <= at and (window is None or at - key[2] < window)


@pytest.mark.parametrize("layout", ["packed", "plain"])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_attention_is_its_definition(layout: Layout, window: int | None, seed: int) -> None:
    groups, places = numbered(random.Random(seed), 5)
    rows = lay_out(groups, layout, FILLER)
    allowed = rows.attention(window)
    rows_count, length = rows.input_ids_RL.shape
    assert allowed.shape == (rows_count, 1, length, length)
    checked = 0
    for row, ids in enumerate(rows.input_ids_RL.tolist()):
        for i, query in enumerate(ids):
            for j, key in enumerate(ids):
                if query == FILLER and key == FILLER:  # free, but for a softmax over something
                    expected = i == j or bool(allowed[row, 0, i, j])
                elif query == FILLER or key == FILLER:
                    expected = False
                else:
                    expected = sees(places[query], places[key], window)
                assert bool(allowed[row, 0, i, j]) == expected, (query, key)
                checked += expected
    assert checked > 50


def test_attention_of_one_group_by_hand() -> None:
    """Prompt of two tokens, responses of two and one: 1s where the row's token may look."""
    rows = lay_out([Group([7, 8], [Response([9, 10]), Response([11])])])
    assert rows.input_ids_RL.tolist() == [[7, 8, 9, 10, 11]]
    assert rows.position_RL.tolist() == [[0, 1, 2, 3, 2]]
    assert rows.attention()[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert rows.attention(window=2)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 1, 0, 0, 1],
    ]
    assert rows.predict_T.tolist() == [1, 2, 1]
    assert rows.place_T.tolist() == [2, 3, 4]
    assert rows.target_T.tolist() == [9, 10, 11]
    assert rows.last_N.tolist() == [3, 4]


@pytest.mark.parametrize("layout", ["packed", "plain"])
@pytest.mark.parametrize("seed", range(12))
def test_where_to_look(layout: Layout, seed: int) -> None:
    """`predict`, `place`, `target` and `last`, and each token at its position, once for each time it is needed."""
    rng = random.Random(seed)
    groups, places = numbered(rng, rng.randrange(1, 7))
    rows = lay_out(groups, layout, FILLER)
    length = rows.input_ids_RL.shape[1]
    flat, position = rows.input_ids_RL.flatten().tolist(), rows.position_RL.flatten().tolist()
    real = [i for i, t in enumerate(flat) if t != FILLER]
    assert all(position[i] == places[flat[i]][2] for i in real)
    repeats = {t: flat.count(t) for t in flat if t != FILLER}
    for token, (g, k, _) in places.items():
        copies = 1 if layout == "packed" or k is not None else len(groups[g].responses)
        assert repeats.get(token, 0) == copies

    assert rows.target_T.tolist() == Batch(groups).token_T.tolist()
    assert [flat[i] for i in rows.place_T.tolist()] == rows.target_T.tolist()
    before = [
        ([g.prompt_ids[-1], *r.token_ids])[i] for g in groups for r in g.responses for i in r.predicted
    ]  # what precedes each loss-bearing token
    assert [flat[i] for i in rows.predict_T.tolist()] == before
    assert [flat[i] for i in rows.last_N.tolist()] == [r.token_ids[-1] for g in groups for r in g.responses]
    for predict, place in zip(rows.predict_T.tolist(), rows.place_T.tolist(), strict=True):
        assert predict // length == place // length, "predicted in another row"


@pytest.mark.parametrize("layout", ["packed", "plain"])
@pytest.mark.parametrize("seed", range(8))
def test_last_is_where_transformers_classifiers_look(layout: Layout, seed: int) -> None:
    """The last token of prompt + response that is not the pad token, as in `last_non_pad_token` of transformers;
    with responses, and prompts, that end in pad tokens or are nothing else."""
    rng, skip = random.Random(seed), 1000
    groups, _ = numbered(rng, 5)
    for group in groups:
        for ids in (group.prompt_ids, *(r.token_ids for r in group.responses)):
            for i in range(len(ids) - rng.randrange(len(ids) + 1), len(ids)):
                ids[i] = skip
    rows = lay_out(groups, layout, FILLER, score_skips=skip)
    found = iter(rows.last_N.tolist())
    for group in groups:
        for response in group.responses:
            sequence = group.prompt_ids + response.token_ids
            expected = max((i for i, t in enumerate(sequence) if t != skip), default=0)
            flat = next(found)
            assert rows.input_ids_RL.flatten()[flat] == sequence[expected]
            assert rows.position_RL.flatten()[flat] == expected
            if expected < len(group.prompt_ids):  # the trunk of its own group
                assert rows.branch_RL.flatten()[flat] == 0
                first = rows.place_T.tolist()
                assert not first or rows.group_RL.flatten()[flat] in rows.group_RL.flatten()[rows.last_N]


def test_skipping_nothing_else_keeps_the_last_token() -> None:
    group = Group([5, 9], [Response([6, 9]), Response([9, 9])])
    assert lay_out([group], score_skips=None).last_N.tolist() == [3, 5]
    assert lay_out([group], score_skips=9).last_N.tolist() == [2, 0]


@pytest.mark.parametrize("seed", range(10))
def test_a_packed_group_costs_its_prompt_once(seed: int) -> None:
    groups, _ = numbered(random.Random(seed), 6)
    prompts = [len(g.prompt_ids) for g in groups]
    responses = [[len(r.token_ids) for r in g.responses] for g in groups]
    assert lay_out(groups, "packed").tokens == sum(prompts) + sum(map(sum, responses))
    assert lay_out(groups, "plain").tokens == sum(len(r) * p + sum(r) for p, r in zip(prompts, responses, strict=True))
    for group, p, r in zip(groups, prompts, responses, strict=True):
        assert group_cost(group, "packed") == p + sum(r)
        assert group_cost(group, "plain") == p + max(r, default=0)


@pytest.mark.parametrize("layout", ["packed", "plain"])
@pytest.mark.parametrize("budget", [1, 20, 64, 1000])
@pytest.mark.parametrize("seed", range(6))
def test_micro_batches_hold_every_group_once_within_the_budget(layout: Layout, budget: int, seed: int) -> None:
    groups, _ = numbered(random.Random(seed), 15)
    batches = micro_batches(groups, budget, layout)
    assert sorted(i for b in batches for i in b) == list(range(15))
    for batch in batches:
        size = lay_out([groups[i] for i in batch], layout).input_ids_RL.numel()
        assert size <= budget or len(batch) == 1, "padding counts, and only a group too long for it goes over"
    if budget == 1000:
        assert len(batches) == 1


def test_rows_are_filled_up() -> None:
    """Lengths 10, 6, 4, 5, 5 fill three rows of ten."""
    groups = [Group([1], [Response([2] * (n - 1))]) for n in (10, 6, 4, 5, 5)]
    rows = lay_out(groups)
    assert rows.input_ids_RL.shape == (3, 10)
    assert rows.tokens == 30
    assert micro_batches(groups, 30) == [[0, 1, 3, 4, 2]]
    assert micro_batches(groups, 29) == [[0, 1], [3, 4, 2]]


def test_no_groups() -> None:
    assert micro_batches([], 10) == []
    for layout in ("packed", "plain"):
        rows = lay_out([], layout)
        assert (rows.tokens, len(rows.predict_T), len(rows.last_N)) == (0, 0, 0)


def test_rows_move_whole() -> None:
    rows = lay_out([Group([1, 2], [Response([3])])], "plain", 7, None)
    moved = rows.to("meta")
    assert isinstance(moved, Rows)
    assert moved.layout == "plain"
    assert all(v.device == torch.device("meta") for v in vars(moved).values() if isinstance(v, torch.Tensor))
