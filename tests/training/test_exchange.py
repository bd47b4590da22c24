"""What one process sends of its groups is what the others get."""

from __future__ import annotations

import copy
import pickle

import numpy as np

from alignlab.core import Group, Response
from alignlab.training.exchange import Parcel, pack, unpack


def records() -> list[Group]:
    return [Group([1, 2], [], f"prompts.jsonl:{i}", "a prompt", extra={"answer": str(i)}) for i in range(4)]


def sampled(records: list[Group]) -> list[Group]:
    """Of all kinds: none, one and two responses; a mask; columns that only some have; ids beyond 16 bits; a group that
    an environment has given another prompt."""
    logp = np.array([-0.1, -2.0], np.float32)
    first = Response([70_000, 3], None, {"reward": 0.1, "logp": logp}, False, "ä", "policy")
    second = Response(
        [4, 5, 6], [True, False, True], {"logp": np.array([0.1, 1 / 3]), "score": 1.0}, True, "", "policy"
    )
    third = Response([7], columns={"steps": [0.5], "label": np.float32(0.5)}, source="data")
    found = [
        records[0].with_responses([first, second]),
        records[1].with_responses([]),
        records[2].with_responses([third]),
    ]
    found[2].columns["weight"] = 2.0
    return [*found, Group([8, 9], [Response([1])], "prompts.jsonl:3", "another")]


def sent(groups: list[Group], known: list[Group]) -> Parcel:
    made: Parcel = pickle.loads(pickle.dumps(pack(groups, known)))
    return made


def test_groups_arrive_as_they_were() -> None:
    known = records()
    groups = sampled(known)
    before = copy.deepcopy(groups)
    found = unpack(sent(groups, known), known)
    same = found == before, groups == before  # pytest cannot show how arrays differ
    assert same == (True, True), "all of it arrived, and packing changed nothing"
    assert [[*r.columns] for g in found for r in g.responses] == [[*r.columns] for g in before for r in g.responses]
    assert all(type(i) is int for g in found for r in g.responses for i in r.token_ids)
    assert found[0].responses[1].loss_mask == [True, False, True]
    assert found[3].prompt_ids == [8, 9] and found[0].prompt_ids is known[0].prompt_ids


def test_nothing_arrives_as_nothing() -> None:
    assert unpack(sent([], []), []) == []


def test_what_is_known_of_tokens_goes_as_few_numbers() -> None:
    """A prompt that everyone has is not sent; a column that is another's very arrays is sent once."""
    known = [Group([*range(5000)], [], "prompts.jsonl:1", "p" * 5000)]
    logp = [np.zeros(1000, np.float32) for _ in range(4)]
    drawn = [Response([*range(60_000, 61_000)], columns={"behaviour_logp": a, "old_logp": a}) for a in logp]
    size = len(pickle.dumps(pack([known[0].with_responses(drawn)], known)))
    assert 6 * 4000 < size < 6.5 * 4000, "2 bytes for an id below 65,536, and 4 for the log-prob"
