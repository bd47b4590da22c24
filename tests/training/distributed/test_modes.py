"""Every algorithm in every mode of distribution: the weights and figures of one process, to rounding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.training import many, runs

pytestmark = pytest.mark.component

ENGINES = {
    "ddp": "DistributedDataParallel",
    "fsdp": "FSDP2",
    "zero2": "DeepSpeed ZeRO-2",
    "zero1": "DeepSpeed ZeRO-1",
    "zero3": "DeepSpeed ZeRO-3",
    "zero3_offload": "DeepSpeed ZeRO-3 with offload",
}
"""What each mode's engine says that it is."""

ROUNDING = 1e-5
"""Float32 sums in another order, through a few steps of SGD (Adam would divide rounding by small numbers)."""

STEPS = 3
"""Of 5 records each: the third begins the second pass through the 12 records, and each samples anew. PPO, which takes
four steps on its samples, takes six."""

KINDS = {
    "full": ["adapter=none"],
    "lora": ["adapter=lora"],
    "qlora": ["adapter=lora", "quantization=nf4"],
}
"""What is trained. Not every pair of algorithm and mode is tried with each: they take turns, so that each algorithm
meets each kind and so does each mode."""

EVERY = ("ddp", "fsdp", "zero2")
"""Modes that are tried with every algorithm, one of each library that divides; the others with one algorithm of each
kind. All that a mode sees of an algorithm is which modules are called, and one loss to go backward from; and what the
others add to these is where shares are: ZeRO-1 divides less than ZeRO-2, ZeRO-3 gathers weights when modules are
called, as FSDP does, offload keeps its shares elsewhere."""

PAIRS = [
    (algorithm, mode, list(KINDS)[(i + j) % len(KINDS)])
    for i, algorithm in enumerate(runs.ALGORITHMS)
    for j, mode in enumerate(ENGINES)
    if mode in EVERY or algorithm in runs.ONE_OF_EACH
]


def words(algorithm: str, kind: str) -> list[str]:
    return [*KINDS[kind], *([] if algorithm == "ppo" else [f"training.steps={STEPS}"])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("modes")
    runs.prepare(made, **tiny.QUANTIZABLE)
    return made


@pytest.fixture(scope="module")
def distributed(folder: Path) -> Path:
    """All the pairs, run by two processes that go through all modes, those that change PyTorch last."""
    pairs = sorted(PAIRS, key=lambda pair: list(ENGINES).index(pair[1]))
    jobs = [{"algorithm": a, "out": f"{a}-{m}-{k}", "words": [*words(a, k), f"distributed={m}"]} for a, m, k in pairs]
    many.together(folder, jobs)
    return folder


@pytest.mark.parametrize(("algorithm", "mode", "kind"), PAIRS)
def test_two_processes_equal_one(distributed: Path, algorithm: str, mode: str, kind: str) -> None:
    folder, straight, two = distributed, f"{algorithm}-{kind}", f"{algorithm}-{mode}-{kind}"
    if not (folder / straight / "result.json").exists():
        runs.train(folder, algorithm, straight, *words(algorithm, kind))
    result = json.loads((folder / two / "result.json").read_text())
    assert (result["processes"], result["engine"]) == (2, ENGINES[mode])
    assert runs.difference(runs.weights(folder, straight), runs.weights(folder, two)) < ROUNDING
    for a, b in zip(runs.metrics(folder, straight), runs.metrics(folder, two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert [a[n] for n in ("trained_tokens", "generated_tokens", "lr")] == [
            b[n] for n in ("trained_tokens", "generated_tokens", "lr")
        ], "a record or a sample was lost or doubled"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algorithm", runs.ALGORITHMS)
def test_learns_something(folder: Path, algorithm: str, kind: str) -> None:
    """The guard of the test above: these steps change the weights far more than rounding does."""
    straight = f"{algorithm}-{kind}"
    if not (folder / straight / "result.json").exists():
        runs.train(folder, algorithm, straight, *words(algorithm, kind))
    weights = runs.weights(folder, straight)
    if kind == "full":
        base = runs.weights_of(folder / "base")
        shared = {n for n in weights if n in base}
        assert runs.difference({n: base[n] for n in shared}, {n: weights[n] for n in shared}) > 100 * ROUNDING
    else:  # an adapter's second factors start at zero
        assert max(float(w.abs().max()) for n, w in weights.items() if "lora_B" in n) > 100 * ROUNDING


UNEQUAL = {
    "chunks": ["adapter=lora"],
    "micro-batches": ["adapter=lora", "training.max_tokens_per_microbatch=25", "model.gradient_checkpointing=true"],
    "refreshed": ["adapter=none", "source.ref_update_interval=2", "source.ref_update_tau=0.5"],
    "merged": ["adapter=lora", "quantization=nf4", "training.save_model=merged"],
    "flat": ["adapter=lora"],
    "flat-full": ["adapter=none", "training.max_tokens_per_microbatch=60"],
}
"""What makes processes call modules unequally often, changes weights outside the optimiser, or the model at the end.
"flat" gives rows without padding to groups that are too small for them otherwise, as in the single process."""


@pytest.fixture(scope="module")
def unequal(folder: Path) -> Path:
    def job(mode: str, name: str) -> dict:
        words = [f"distributed={mode}", *UNEQUAL[name], f"training.steps={STEPS}"]
        more = {"chunk": 200} if name == "chunks" else {}  # six tokens at a time
        flat = name.startswith("flat")
        return {"algorithm": "rloo", "out": f"rloo-{mode}-{name}", "words": words, "flat": flat, **more}

    for name, words in UNEQUAL.items():
        runs.train(folder, "rloo", f"rloo-single-{name}", *words, f"training.steps={STEPS}")
    many.together(folder, [job(mode, name) for mode in ("zero2", "fsdp", "zero3") for name in UNEQUAL])
    return folder


@pytest.mark.parametrize("mode", ["zero2", "fsdp", "zero3"])
@pytest.mark.parametrize("name", UNEQUAL)
def test_processes_that_have_unequally_much_to_do_do_not_part(unequal: Path, mode: str, name: str) -> None:
    single, two = (runs.weights(unequal, f"rloo-{m}-{name}") for m in ("single", mode))
    assert runs.difference(single, two) < 2 * ROUNDING  # a soft refresh adds some


def test_what_the_policy_was_is_computed_in_the_precision_of_training(folder: Path) -> None:
    """PPO's first ratios are 1 under bfloat16 too: the old log-probs come from the same autocast passes, whether or not
    an engine puts autocast into the model."""
    words = ["training.mixed_precision=bf16", "source.ppo_epochs=1", "source.rollout_batch_size=5", "training.steps=1"]
    modes = ("ddp", "zero2", "fsdp", "zero3")
    jobs = [{"algorithm": "ppo", "out": f"ppo-bf16-{m}", "words": [*words, f"distributed={m}"]} for m in modes]
    many.together(folder, jobs)
    for mode in modes:
        assert runs.metrics(folder, f"ppo-bf16-{mode}")[0]["approx_kl"] == 0.0, mode


# ---------------------------------------------------------------------- checkpoints

ADAM = ["optimizer=adamw", "optimizer.lr=1e-3", "training.checkpoint_every=3", "training.keep_last=9"]
MODES = ["single", *ENGINES]
MOVING = ["source.ref_update_interval=1", "source.ref_update_tau=0.3", "source.rollout_batch_size=5"]
TRAINED = {"dpo": ["adapter=lora"], "ppo": ["adapter=none", *MOVING]}
"""One on data with an adapter, one on samples with a critic, the whole model and a reference that has been refreshed
once by the third step."""
RESUMED = [(a, m) for a in TRAINED for m in ENGINES if a == "ppo" or m not in ("zero1", "zero3_offload")]
"""An adapter's shares are written as in ZeRO-2 by ZeRO-1, and as in ZeRO-3 by that with offload."""


def stopped_at_three(folder: Path, out: str, copy: str) -> None:
    """A copy of a finished run as it was after step 3."""
    (folder / copy / "checkpoints").mkdir(parents=True)
    shutil.copy(folder / out / "config.yaml", folder / copy)
    shutil.copytree(folder / out / "checkpoints/step-00000003", folder / copy / "checkpoints/step-00000003")


@pytest.fixture(scope="module")
def resumed(folder: Path) -> Path:
    """Runs of six steps with a checkpoint after three in every mode; and gone on with from there: in the same mode,
    from that into one process, and from one process into it."""
    for algorithm, more in TRAINED.items():
        runs.train(folder, algorithm, f"{algorithm}-single", *more, *ADAM)
    pairs = sorted(RESUMED, key=lambda pair: list(ENGINES).index(pair[1]))
    words = {(a, m): [*TRAINED[a], *ADAM, f"distributed={m}"] for a, m in pairs}
    many.together(folder, [{"algorithm": a, "out": f"{a}-{m}", "words": w} for (a, m), w in words.items()])
    jobs = []
    for (algorithm, mode), own in words.items():
        for name, start in (("same", mode), ("from-single", "single")):
            out = f"{algorithm}-{mode}-{name}"
            stopped_at_three(folder, f"{algorithm}-{start}", out)
            jobs.append({"algorithm": algorithm, "out": out, "words": own})
    many.together(folder, jobs)
    for algorithm, mode in words:
        stopped_at_three(folder, f"{algorithm}-{mode}", f"{algorithm}-{mode}-to-single")
        runs.train(folder, algorithm, f"{algorithm}-{mode}-to-single", *TRAINED[algorithm], *ADAM)
    return folder


@pytest.mark.parametrize(("algorithm", "mode"), RESUMED)
def test_resumed_in_the_same_mode_is_bit_identical(resumed: Path, algorithm: str, mode: str) -> None:
    whole, parts = f"{algorithm}-{mode}", f"{algorithm}-{mode}-same"
    assert runs.identical(runs.weights(resumed, whole), runs.weights(resumed, parts))
    assert [m["loss"] for m in runs.metrics(resumed, whole)][3:] == [m["loss"] for m in runs.metrics(resumed, parts)]


@pytest.mark.parametrize("way", ["to-single", "from-single"])
@pytest.mark.parametrize(("algorithm", "mode"), RESUMED)
def test_resumed_in_another_mode_goes_on_alike(resumed: Path, algorithm: str, mode: str, way: str) -> None:
    """Losses to rounding, which Adam magnifies in weights that start at zero."""
    whole = [m["loss"] for m in runs.metrics(resumed, f"{algorithm}-single")][3:]
    parts = [m["loss"] for m in runs.metrics(resumed, f"{algorithm}-{mode}-{way}")]
    assert parts == pytest.approx(whole, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("algorithm", TRAINED)
def test_a_checkpoint_without_the_optimizers_state_would_be_noticed(resumed: Path, algorithm: str) -> None:
    """The guard of the tests above: Adam's running means matter by far more than the tolerance."""
    from safetensors.torch import load_file, save_file

    from alignlab.training.checkpoints.store import _write_manifest

    out = f"{algorithm}-forgetful"
    stopped_at_three(resumed, f"{algorithm}-single", out)
    step = resumed / out / "checkpoints/step-00000003"
    for path in step.glob("trained-*"):
        save_file({n: torch.zeros_like(t) if n.startswith("exp_") else t for n, t in load_file(path).items()}, path)
    (step / "manifest.json").unlink()
    _write_manifest(step, 3, None)
    runs.train(resumed, algorithm, out, *TRAINED[algorithm], *ADAM)
    whole = [m["loss"] for m in runs.metrics(resumed, f"{algorithm}-single")][3:]
    assert [m["loss"] for m in runs.metrics(resumed, out)] != pytest.approx(whole, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("mode", ENGINES)
def test_every_process_writes_its_share(resumed: Path, mode: str) -> None:
    sizes = [p.stat().st_size for p in sorted((resumed / f"ppo-{mode}/checkpoints/step-00000006").glob("trained-*"))]
    assert len(sizes) == 2 and min(sizes) > 0.4 * sum(sizes)
