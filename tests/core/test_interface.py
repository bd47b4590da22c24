"""Groups, outputs, the exact global mean, errors people read, and files written whole."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.core import (
    Algorithm,
    AlignlabError,
    Batch,
    ConfigError,
    Group,
    Interrupted,
    Outputs,
    Response,
    aggregate,
    did_you_mean,
    require,
)
from alignlab.core.files import write_json, write_text
from alignlab.core.storage import StorageError


def test_the_loss_mask_decides_which_tokens_are_predicted() -> None:
    assert Response([4, 5, 6]).loss_tokens == 3
    assert Response([4, 5, 6]).predicted == [0, 1, 2]
    masked = Response([4, 5, 6], [False, True, True])
    assert (masked.loss_tokens, masked.predicted) == (2, [1, 2])


def test_packed_length_is_the_prompt_once_and_all_responses() -> None:
    assert Group([1, 2, 3], [Response([4]), Response([5, 6])]).packed_length == 6
    assert Group([1, 2, 3]).packed_length == 3


def test_with_responses_shares_no_columns() -> None:
    group = Group([1], [Response([2])], "a:1", "hi", {"weight": 1.0}, {"answer": "42"})
    other = group.with_responses([Response([3]), Response([4])])
    other.columns["weight"] = 5.0
    assert group.columns == {"weight": 1.0}
    assert (other.prompt_ids, other.origin, other.prompt, other.extra) == ([1], "a:1", "hi", {"answer": "42"})
    assert [r.token_ids for r in other.responses] == [[3], [4]]
    assert len(group.responses) == 1


def test_an_output_that_was_not_computed_is_refused() -> None:
    outputs = Outputs(logp_T=torch.zeros(2))
    assert outputs.logp_T.shape == (2,)
    for name in ("entropy_T", "score_N", "step_TL"):
        with pytest.raises(AlignlabError, match=f"{name} was not computed: add '{name.split('_')[0]}'.*`reads`"):
            getattr(outputs, name)


def test_an_algorithm_without_a_loss_has_defaults_for_the_rest() -> None:
    algorithm = Algorithm()
    groups = [Group([1])]
    assert algorithm.prepare(groups) == groups
    assert algorithm.check(groups[0]) is None
    with pytest.raises(NotImplementedError, match=r"Algorithm does not define loss"):
        algorithm.loss(Outputs(), Batch(groups))


@pytest.mark.parametrize(("least", "wanted"), [(1, "1 response"), (2, "2 responses"), (3, "3 responses")])
def test_a_record_with_too_few_responses_is_refused_with_both_numbers(least: int, wanted: str) -> None:
    class Ranker(Algorithm):
        min_responses = least

    enough = Group([1], [Response([2])] * least)
    assert Ranker().check(enough) is None
    reason = Ranker().check(enough.with_responses(enough.responses[1:]))
    advice = ": give records with responses, or source=rollout, which samples them" if least == 1 else ""
    assert reason == f"Ranker needs at least {wanted} to a prompt; this record has {least - 1}{advice}"


@pytest.mark.parametrize("seed", range(5))
def test_aggregate_is_the_global_mean_however_the_batch_is_split(seed: int) -> None:
    """Micro-batches are summed, processes averaged, as DDP does with gradients."""
    rng = random.Random(seed)
    values = [rng.uniform(-3, 3) for _ in range(23)]
    world = rng.randrange(1, 5)
    per_process = [0.0] * world
    rest = values
    while rest:
        size = rng.randrange(1, 6)
        part, rest = rest[:size], rest[size:]
        loss = aggregate(torch.tensor(part, dtype=torch.float64), len(values), world)
        per_process[rng.randrange(world)] += float(loss)
    assert sum(per_process) / world == pytest.approx(sum(values) / len(values))


def test_aggregate_of_nothing_is_zero() -> None:
    assert float(aggregate(torch.zeros(0), 0)) == 0.0


def test_aggregate_is_the_published_token_mean(published: dict[str, dict[str, Any]]) -> None:
    """tunix's `token-mean`: a sum over all unmasked tokens divided by how many there are."""
    fixture = published["agg_token_mean_tunix"]
    loss, mask = (torch.tensor(fixture["inputs"][k]) for k in ("loss", "mask"))
    parts = [aggregate(row[keep.bool()], int(mask.sum())) for row, keep in zip(loss, mask, strict=True)]
    assert float(sum(parts)) == pytest.approx(fixture["expected"], abs=fixture["atol"])


def test_did_you_mean_names_the_nearest_word_or_all() -> None:
    assert did_you_mean("betta", ["beta", "gamma"]) == "; did you mean 'beta'?"
    assert did_you_mean("xyz", ["gamma", "beta"]) == "; known here: beta, gamma"
    assert did_you_mean("xyz", []) == ""


def test_require_names_key_value_and_rule() -> None:
    require(True, "algorithm.beta", 1.0, "must be > 0")
    with pytest.raises(ConfigError, match=r"^algorithm\.beta=-1\.0: must be > 0$"):
        require(False, "algorithm.beta", -1.0, "must be > 0")


def test_interrupted_names_the_signal() -> None:
    error = Interrupted("SIGTERM", "saved in checkpoints/step-00000004")
    assert error.signal == "SIGTERM"
    assert str(error) == "stopped by SIGTERM; saved in checkpoints/step-00000004"


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"name": "é", "value": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "é", "value": 1}

    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(StorageError, match="disk full"):
        write_text(path, "half")
    assert json.loads(path.read_text(encoding="utf-8"))["value"] == 1
    assert list(tmp_path.iterdir()) == [path], "nothing half-written is left behind"


def test_the_place_of_a_group_is_its_origin_or_says_that_it_is_a_group() -> None:
    assert (Group([1], origin="a.jsonl:3").place, Group([1]).place) == ("a.jsonl:3", "a group")
