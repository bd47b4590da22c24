"""The loop, for every algorithm: the same result however the work is split, stopped or spread."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from alignlab.core import AlignlabError, ConfigError, Interrupted, NonFiniteError
from alignlab.models import attention, packed_model
from alignlab.models.attention import AttentionPlan
from alignlab.models.packing import Rows
from alignlab.training.callbacks.progress import ProgressDisplay
from tests import tiny
from tests.training import runs

every_algorithm = pytest.mark.parametrize("algorithm", runs.ALGORITHMS)
one_of_each_kind = pytest.mark.parametrize("algorithm", runs.ONE_OF_EACH)
"""For what the loop, the layout or the saving of a model does, whatever the loss."""

NOT_OF_THE_MODEL = ("time", "seconds", "tokens_per_second", "grad_norm")
"""Metrics that depend on the machine, or on which weights are trained."""

ROUNDING = 1e-5
"""Float32 sums in another order, through six steps of SGD (Adam would divide rounding by small numbers)."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("runs")
    runs.prepare(made)
    return made


@pytest.fixture
def straight(folder: Path, algorithm: str) -> dict:
    """The weights of an undisturbed run."""
    out = f"{algorithm}-straight"
    if not (folder / out / "result.json").exists():
        runs.train(folder, algorithm, out)
    return runs.weights(folder, out)


@every_algorithm
def test_learns_something(folder: Path, algorithm: str, straight: dict) -> None:
    """The guard of the tests below: six steps change the weights far more than rounding does."""
    from safetensors.torch import load_file

    base = load_file(folder / "base/model.safetensors")
    shared = {n for n in straight if n in base}
    assert runs.difference({n: base[n] for n in shared}, {n: straight[n] for n in shared}) > 100 * ROUNDING


@every_algorithm
def test_micro_batches_do_not_matter(folder: Path, algorithm: str, straight: dict) -> None:
    runs.train(folder, algorithm, f"{algorithm}-budget", "training.max_tokens_per_microbatch=20")
    assert runs.difference(straight, runs.weights(folder, f"{algorithm}-budget")) < ROUNDING


@every_algorithm
def test_packing_does_not_matter(folder: Path, algorithm: str, straight: dict) -> None:
    runs.train(folder, algorithm, f"{algorithm}-plain", "model.layout=plain")
    assert runs.difference(straight, runs.weights(folder, f"{algorithm}-plain")) < ROUNDING


@one_of_each_kind
def test_rows_without_padding_do_not_matter(
    folder: Path, algorithm: str, straight: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention by pieces; groups as small as these go through a mask otherwise."""
    planned: list[Rows] = []

    def plan_of(rows: Rows) -> AttentionPlan:
        planned.append(rows)
        return attention.plan_of(rows)

    monkeypatch.setattr(packed_model, "worthwhile", lambda groups, device: True)
    monkeypatch.setattr(packed_model, "plan_of", plan_of)
    runs.train(folder, algorithm, f"{algorithm}-flat")
    assert planned
    assert runs.difference(straight, runs.weights(folder, f"{algorithm}-flat")) < ROUNDING


@pytest.mark.parametrize(
    ("algorithm", "adapter"), [*((a, "none") for a in runs.ALGORITHMS), *((a, "lora") for a in runs.ONE_OF_EACH)]
)
def test_resumed_run_is_bit_identical(
    folder: Path, algorithm: str, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the middle of an iteration with several minibatches and passes; dropout uses the random state."""
    more = [
        f"adapter={adapter}",
        "optimizer=adamw",
        "training.batch_size=2",
        "++source.rollout_batch_size=5",
        "++source.ppo_epochs=2",
    ]
    more += ["adapter.dropout=0.2"] if adapter == "lora" else []
    runs.train(folder, algorithm, f"{algorithm}-{adapter}-whole", *more)
    out = f"{algorithm}-{adapter}-parts"
    with monkeypatch.context() as patch:
        patch.setattr(ProgressDisplay, "update", lambda self, step, m: runs.StopAfter(2)(step, m))
        with pytest.raises(Interrupted, match=r"SIGTERM; checkpoint of step 2"):
            runs.train(folder, algorithm, out, *more)
    assert not (folder / out / "model").exists()
    runs.train(folder, algorithm, out, *more)
    whole = runs.weights(folder, f"{algorithm}-{adapter}-whole")
    assert runs.identical(whole, runs.weights(folder, out))
    mine, theirs = runs.metrics(folder, f"{algorithm}-{adapter}-whole"), runs.metrics(folder, out)
    assert [(m["step"], m["loss"], m["trained_tokens"]) for m in mine] == [
        (m["step"], m["loss"], m["trained_tokens"]) for m in theirs
    ]


@one_of_each_kind
def test_same_command_twice_changes_nothing(folder: Path, algorithm: str, straight: dict) -> None:
    """The first run left no checkpoint: the second starts anew and ends in the same place."""
    runs.train(folder, algorithm, f"{algorithm}-straight")
    assert runs.identical(straight, runs.weights(folder, f"{algorithm}-straight"))


@one_of_each_kind
def test_another_config_in_the_same_folder_is_refused(folder: Path, algorithm: str, straight: dict) -> None:
    with pytest.raises(ConfigError, match=r"holds a run with another optimizer\.lr"):
        runs.train(folder, algorithm, f"{algorithm}-straight", "optimizer.lr=0.5")


@one_of_each_kind
def test_losses_that_are_not_finite_name_the_record(
    folder: Path, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One record's log-probs or score become NaN; the message names its file and line and no other."""
    from alignlab.models import PackedModel

    forward = PackedModel.forward

    def spoilt(self, rows, reads=("logp",), temperature=1.0):  # type: ignore[no-untyped-def]
        values = forward(self, rows, reads, temperature)
        if self.training:
            for name, value in values.items():
                poison = value.new_zeros(len(value), *[1] * (value.dim() - 1))
                poison[0] = float("nan")
                values[name] = value + poison
        return values

    monkeypatch.setattr(PackedModel, "forward", spoilt)
    with pytest.raises(NonFiniteError, match=r"not finite for 1 record\(s\): \S+\.jsonl:\d+\. Look at"):
        runs.train(folder, algorithm, f"{algorithm}-nan", "training.max_tokens_per_microbatch=100000")
    assert not (folder / f"{algorithm}-nan/model").exists()


@one_of_each_kind
def test_signals_are_obeyed(folder: Path, algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProgressDisplay, "update", lambda self, s, m: runs.StopAfter(1, signal.SIGUSR1)(s, m))
    with pytest.raises(Interrupted, match="SIGUSR1"):
        runs.train(folder, algorithm, f"{algorithm}-usr1")
    kept = list((folder / f"{algorithm}-usr1/checkpoints").glob("step-*"))
    assert [k.name for k in kept] == ["step-00000001"]


@one_of_each_kind
def test_nothing_to_learn_is_said_not_reported_as_zero(
    folder: Path, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignlab.core import Algorithm
    from alignlab.training import loop

    monkeypatch.setattr(loop, "EMPTY_ITERATIONS", 3)
    target = runs.ALGORITHMS[algorithm][0].removeprefix("algorithm=")
    from alignlab.config import compose
    from alignlab.training.run_config import build_algorithm

    kind = type(build_algorithm(dict(compose("train", [f"algorithm={target}"])["algorithm"])))
    assert issubclass(kind, Algorithm)
    monkeypatch.setattr(kind, "prepare", lambda self, groups: [])
    with pytest.raises(AlignlabError, match="3 iterations in a row left nothing to train on"):
        runs.train(folder, algorithm, f"{algorithm}-empty")


@every_algorithm
def test_order_of_records_does_not_matter(folder: Path, algorithm: str, tmp_path: Path) -> None:
    """The same records in another order: the same batch, the same weights. Samples belong to a record by its line, so
    algorithms that sample are given samples, in one order and the other."""
    kind = next(w.removeprefix("data=") for w in runs.ALGORITHMS[algorithm] if w.startswith("data="))
    more = ["training.batch_size=12", "training.steps=3"]
    source = folder / f"{kind}.jsonl"
    if kind == "prompts":
        source = runs.scored_samples(folder)
        more += ["source.kind=data", "data=groups"]
    lines = source.read_text().splitlines(keepends=True)
    for name, ordered in (("one", lines), ("other", [*lines[5:], *lines[4::-1]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(ordered))
        runs.train(folder, algorithm, f"{algorithm}-order-{name}", *more, f"data.path={tmp_path}/{name}.jsonl")
    one, other = (runs.weights(folder, f"{algorithm}-order-{name}") for name in ("one", "other"))
    assert runs.difference(one, other) < ROUNDING


@every_algorithm
def test_padding_does_not_matter(folder: Path, algorithm: str, tmp_path: Path) -> None:
    """A tokenizer that pads on the other side, with another token; in rows that need padding and rows that do not.

    Neither token may be sampled: Llama's embedding does not learn the row of its padding token.
    """
    shutil.copytree(folder / "base", tmp_path / "padded")
    settings = json.loads((tmp_path / "padded/tokenizer_config.json").read_text())
    settings |= {"padding_side": "left", "truncation_side": "left", "pad_token": "<unk>"}
    (tmp_path / "padded/tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((tmp_path / "padded/config.json").read_text())
    (tmp_path / "padded/config.json").write_text(json.dumps({**config, "pad_token_id": tiny.UNK}))
    more = ["model.layout=plain", f"rollout.suppress_tokens=[{tiny.PAD},{tiny.UNK}]", "training.steps=4"]
    runs.train(folder, algorithm, f"{algorithm}-unpadded", *more, "training.max_tokens_per_microbatch=1")
    wide = f"model.path={tmp_path}/padded", "training.max_tokens_per_microbatch=100000"
    runs.train(folder, algorithm, f"{algorithm}-padded", *more, *wide)
    one, other = (runs.weights(folder, f"{algorithm}-{how}") for how in ("unpadded", "padded"))
    assert runs.difference(one, other) < ROUNDING


@every_algorithm
def test_merged_or_not_the_adapter_is_the_same_model(folder: Path, algorithm: str) -> None:
    """Training goes on from an adapter on its base and from the two folded into one: the first losses are the same,
    and the value head of a critic comes along."""
    own = ["algorithm.lm_weight=0"] if algorithm == "reward_model" else []  # a merged one has no language head
    more = ["adapter=lora", "optimizer=adamw", "optimizer.lr=1e-2", "training.steps=3", *own]
    for how in ("adapter", "merged"):
        runs.train(folder, algorithm, f"{algorithm}-{how}", *more, f"training.save_model={how}")
    found = []
    for how, adapter in (("adapter", "lora"), ("merged", "none")):
        out, start = f"{algorithm}-from-{how}", folder / f"{algorithm}-{how}/model"
        runs.train(folder, algorithm, out, f"model.path={start}", f"adapter={adapter}", "training.steps=1", *own)
        found.append(runs.metrics(folder, out)[0])
    first, second = ({k: v for k, v in m.items() if k not in NOT_OF_THE_MODEL} for m in found)
    assert first == pytest.approx(second, rel=1e-3, abs=1e-4)
    start = runs.metrics(folder, f"{algorithm}-{how}")[-1]
    assert any(abs(start[k] - v) > 1e-3 for k, v in first.items()), "the guard: three steps had changed something"
