"""What happens to the groups of an iteration before they are trained on, and to what an algorithm remembers."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import pvariance
from typing import Any

import pytest
import torch

from alignlab.core import ConfigError, Interrupted
from alignlab.training import collect
from alignlab.training.callbacks.progress import ProgressDisplay
from tests.training import forks, runs

PROBE = ["algorithm=sft", "algorithm._target_=tests.training.probes.Probe", "data=demonstrations"]
EXACT = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("iterations")
    runs.prepare(made)
    return made


@pytest.fixture(autouse=True)
def probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(runs.ALGORITHMS, "probe", PROBE)
    online = [w for w in runs.ALGORITHMS["rejection_sampling"] if not w.startswith(("algorithm=", "data="))]
    monkeypatch.setitem(runs.ALGORITHMS, "online", [*PROBE, *online])


def lines(folder: Path, algorithm: str, out: str, *more: str) -> list[dict[str, Any]]:
    runs.train(folder, algorithm, out, *more)
    return runs.metrics(folder, out)


def stopped(folder: Path, algorithm: str, out: str, step: int, *more: str) -> list[dict[str, Any]]:
    """The same, stopped after a step and gone on with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressDisplay, "update", lambda self, s, m: runs.StopAfter(step)(s, m))
        with pytest.raises(Interrupted):
            runs.train(folder, algorithm, out, *more)
    return lines(folder, algorithm, out, *more)


WATCHED = ("step", "loss", "ratio", "value_change", "margin", "neighbours", "shift", "variance")


def watched(found: list[dict[str, Any]]) -> list[tuple]:
    return [tuple(line[name] for name in WATCHED) for line in found]


def test_every_hook_is_called(folder: Path) -> None:
    found = lines(folder, "probe", "hooks", "training.batch_size=12")
    assert [line["neighbours"] for line in found] == [12.0] * 6
    assert found[0]["shift"] == 0, "the policy is the reference"
    assert found[-1]["shift"] > 0.1, "then it likes the responses better"
    assert all(line["ratio"] == pytest.approx(1, abs=EXACT) for line in found), "a step per iteration: always fresh"
    assert all(line["value_change"] < EXACT for line in found)
    assert found[-1]["margin"] > 0.1
    assert not any(name.startswith("_") for name in found[0])
    records = [json.loads(line) for line in (folder / "demonstrations.jsonl").read_text().splitlines()]
    lengths = [len(r["completion"].split()) + 1 for r in records]
    assert found[0]["variance"] == pytest.approx(pvariance(lengths))
    assert found[0]["end"] == pytest.approx(12 / sum(lengths))


def test_nothing_depends_on_how_the_work_is_split(folder: Path) -> None:
    straight = watched(lines(folder, "probe", "straight"))
    for out, more in {"split": "training.max_tokens_per_microbatch=20", "plain": "model.layout=plain"}.items():
        for a, b in zip(straight, watched(lines(folder, "probe", out, more)), strict=True):
            assert a == pytest.approx(b, abs=1e-4)
    forks.train(folder, "probe", "two")
    for a, b in zip(straight, watched(runs.metrics(folder, "two")), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.parametrize("critic", ["shared", "own"])
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_critic_report_and_state_survive_an_interruption(folder: Path, adapter: str, critic: str) -> None:
    more = [f"adapter={adapter}", f"+algorithm.critic={critic}", "source=rollout", "source.rollout_batch_size=6"]
    more += [
        "source.group_size=2",
        "source.ppo_epochs=2",
        "training.batch_size=2",
        "optimizer=adamw",
        "optimizer.lr=1e-2",
    ]
    more += ["training.steps=8"]
    whole = lines(folder, "online", f"{adapter}-{critic}-whole", *more)
    parts = stopped(folder, "online", f"{adapter}-{critic}-parts", 3, *more)
    assert watched(whole) == watched(parts)
    assert whole[1]["ratio"] != pytest.approx(1, abs=EXACT), "the second minibatch comes after an update"
    assert [whole[i]["ratio"] for i in (0, 6)] == pytest.approx([1, 1], abs=EXACT), "six steps an iteration"
    assert runs.identical(
        runs.weights(folder, f"{adapter}-{critic}-whole"), runs.weights(folder, f"{adapter}-{critic}-parts")
    )
    heads = [folder / f"{adapter}-{critic}-{o}/model/value_head.safetensors" for o in ("whole", "parts")]
    assert heads[0].read_bytes() == heads[1].read_bytes()


def test_state_is_the_one_of_the_checkpoint(folder: Path) -> None:
    stopped(folder, "probe", "state", 4, "training.checkpoint_every=3", "training.keep_last=5")
    for step in (3, 6):
        saved = torch.load(folder / f"state/checkpoints/step-{step:08}/state.pt", weights_only=True)
        assert saved["algorithm"] == {"iterations": float(step)}


def test_enough_is_enough(folder: Path) -> None:
    """Three minibatches and two passes make six steps an iteration; after two it goes on to the next one."""
    more = [
        "source.rollout_batch_size=6",
        "source.group_size=2",
        "source.ppo_epochs=2",
        "training.batch_size=2",
        "training.steps=5",
    ]
    found = lines(folder, "online", "enough", *more, "+algorithm.limit=2")
    fresh = [line["ratio"] == pytest.approx(1, abs=EXACT) for line in found]
    assert fresh == [True, False, True, False, True]


def test_watching_does_not_steer(folder: Path) -> None:
    more = ["data.validation=0.3", "training.batch_size=3"]
    plain = lines(folder, "probe", "unwatched", *more)
    seen = [line for line in lines(folder, "probe", "watched", *more, "training.eval_every=1") if "loss" in line]
    assert watched(plain) == watched(seen)
    saved = lines(folder, "probe", "watched-state", *more, "training.eval_every=1", "training.checkpoint_every=6")
    assert saved
    state = torch.load(folder / "watched-state/checkpoints/step-00000006/state.pt", weights_only=True)
    assert state["algorithm"] == {"iterations": 6.0}


# ---------------------------------------------------------------------- sources


def test_records_own_responses_are_kept_beside_the_sampled_ones(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[collect.Collected] = []
    collected = collect.Collector.collect

    def spy(self, *groups, **more):  # type: ignore[no-untyped-def]
        seen.append(collected(self, *groups, **more))
        return seen[-1]

    monkeypatch.setattr(collect.Collector, "collect", spy)
    runs.train(folder, "online", "kept", "source.keep=true", "training.steps=2", "source.group_size=3")
    tokens = 0
    for found in seen:
        rewards = []
        for group in found.sampled:
            assert [r.source for r in group.responses] == ["data", "policy", "policy", "policy"]
            assert all("reward" in r.columns for r in group.responses), "all of them are scored"
            tokens += sum(len(r.token_ids) for r in group.responses[1:])
            rewards += [r.columns["reward"] for r in group.responses[1:]]
        assert found.reward == pytest.approx(sum(rewards) / len(rewards))
    assert runs.metrics(folder, "kept")[-1]["generated_tokens"] == tokens


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_the_reference_is_refreshed(folder: Path, adapter: str) -> None:
    """Every second iteration the policy is its own reference again, whatever was known of the records before."""
    more = [f"adapter={adapter}", "source.ref_update_interval=2", "training.batch_size=12", "optimizer.lr=0.5"]
    found = lines(folder, "dpo", f"refresh-{adapter}", *more)
    at_reference = [line["margin"] == pytest.approx(0, abs=EXACT) for line in found]
    assert at_reference == [True, False, True, False, True, False]
    parts = stopped(folder, "dpo", f"refresh-{adapter}-parts", 3, *more)
    assert [line["loss"] for line in found] == [line["loss"] for line in parts]


def test_the_reference_is_refreshed_in_two_processes(folder: Path) -> None:
    more = ["source.ref_update_interval=2", "training.batch_size=5"]
    runs.train(folder, "dpo", "refresh-one", *more)
    forks.train(folder, "dpo", "refresh-two", *more)
    assert runs.difference(runs.weights(folder, "refresh-one"), runs.weights(folder, "refresh-two")) < EXACT


def test_refreshing_what_is_not_used_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"source\.ref_update_interval: SFT uses no reference policy"):
        runs.train(folder, "sft", "refused", "source.ref_update_interval=2")


def test_preferences_come_from_any_reward(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DPO on its own samples, ordered by a rule: online DPO, with nothing but the source changed."""
    online = [w for w in runs.ALGORITHMS["rejection_sampling"] if not w.startswith("algorithm=")]
    monkeypatch.setitem(runs.ALGORITHMS, "online_dpo", ["algorithm=dpo", *online])
    found = lines(folder, "online_dpo", "online-dpo", "training.steps=12", "optimizer=adamw", "optimizer.lr=1e-2")
    assert found[-1]["reward"] > found[0]["reward"]


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_ppo_starts_from_where_it_is(folder: Path, adapter: str) -> None:
    """Step 1: the ratio is exactly 1 and the KL to the reference exactly 0, and all of it happens again."""
    more = [f"adapter={adapter}", "source.rollout_batch_size=12", "training.batch_size=12", "training.steps=3"]
    first, second = (lines(folder, "ppo", f"ppo-{adapter}-{i}", *more) for i in (1, 2))
    assert (first[0]["ratio"], first[0]["approx_kl"], first[0]["clip_fraction"], first[0]["kl"]) == (1, 0, 0, 0)
    assert first[2]["kl"] != 0, "the second iteration's policy has moved"
    figures = ("loss", "reward", "ratio", "kl", "entropy", "explained_variance", "value_loss")
    assert [[line[f] for f in figures] for line in first] == [[line[f] for f in figures] for line in second]
