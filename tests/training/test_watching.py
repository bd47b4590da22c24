"""What a run reports and obeys: evaluation, early stopping, limits, learning rates, decay, clipping, precision."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignlab.training.checkpoints.store import Checkpoints, read_manifest
from alignlab.training.schedule import Constant, Cosine, Linear
from alignlab.training.trainer import Trainer
from tests import tiny
from tests.training import runs

RECORDS = 12
LR = 0.05


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("watching")
    runs.prepare(made, RECORDS)
    lines = [{"prompt": "a b", "completion": "c d e"}, {"prompt": "f", "completion": "g"}]
    (made / "held-out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (made / "held-out-prompts.jsonl").write_text('{"prompt": "a b"}\n{"prompt": "f"}\n')
    return made


def sft(folder: Path, out: str, *more: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A run over all records at each step unless said otherwise: its result, and its metrics without evaluations."""
    result = runs.train(folder, "sft", out, f"training.batch_size={RECORDS}", "training.progress=off", *more)
    return result, [line for line in runs.metrics(folder, out) if "loss" in line]


def sequences(path: Path) -> list[tuple[list[int], list[int]]]:
    """Prompt and response as token ids, by the definition of the format: words, then the end token."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    ids = tiny.VOCABULARY.index
    return [
        ([ids(w) for w in r["prompt"].split()], [*(ids(w) for w in r["completion"].split()), tiny.EOS]) for r in records
    ]


def nll(model: Path, records: Path) -> torch.Tensor:
    """Mean negative log-likelihood of the response tokens, by plain transformers, one sequence at a time."""
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(model)
    return mean_nll(network, records)


def mean_nll(network: Any, records: Path) -> torch.Tensor:
    total, count = torch.zeros(()), 0
    for prompt, response in sequences(records):
        logp = tiny.plain_logits(network, prompt + response).log_softmax(-1)
        for place, token in enumerate(response, start=len(prompt)):
            total = total - logp[place - 1, token]
            count += 1
    return total / count


# ------------------------------------------------------------------ metrics


def test_metrics_of_a_run(folder: Path) -> None:
    result, lines = sft(folder, "metrics", "training.steps=3")
    tokens = sum(len(response) for _, response in sequences(folder / "demonstrations.jsonl"))
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["trained_tokens"] for line in lines] == [tokens, 2 * tokens, 3 * tokens]
    assert [line["generated_tokens"] for line in lines] == [0, 0, 0]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert [line["lr"] for line in lines] == [LR] * 3
    # The loss of a step is that of the model before it.
    assert lines[0]["loss"] == pytest.approx(float(nll(folder / "base", folder / "demonstrations.jsonl")), rel=1e-5)
    assert lines[0]["nll"] == lines[0]["loss"]
    assert lines[0]["response_length"] == pytest.approx(tokens / RECORDS)
    assert all(line["tokens_per_second"] > 0 for line in lines)
    assert result["trained_tokens"] == 3 * tokens
    _, every_other = sft(folder, "metrics-2", "training.steps=5", "training.log_every=2")
    assert [line["step"] for line in every_other] == [2, 4, 5]  # and the last


def test_the_gradients_norm_is_that_of_the_mean_loss(folder: Path) -> None:
    import transformers

    _, lines = sft(folder, "norm", "training.steps=1")
    network = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    found = tiny.gradients(network, mean_nll(network, folder / "demonstrations.jsonl"))
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in found.values()))
    assert lines[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)


# ------------------------------------------------------------------ evaluation


def test_the_validation_loss_is_that_of_an_independent_calculation(folder: Path) -> None:
    held_out = f"data.validation={folder}/held-out.jsonl"
    result, _ = sft(folder, "evaluated", held_out, "training.steps=5", "training.eval_every=2")
    found = {line["step"]: line["eval/loss"] for line in runs.metrics(folder, "evaluated") if "eval/loss" in line}
    assert sorted(found) == [2, 4, 5]  # the last step too, whether due or not
    expected = float(nll(folder / "evaluated/model", folder / "held-out.jsonl"))
    assert found[5] == pytest.approx(expected, rel=1e-5)
    assert result["evaluation"]["eval/loss"] == found[5]
    sft(folder, "evaluated-2", "training.steps=2")
    expected = float(nll(folder / "evaluated-2/model", folder / "held-out.jsonl"))
    assert found[2] == pytest.approx(expected, rel=1e-5)
    assert abs(found[2] / found[5] - 1) > 0.01


def test_watching_changes_nothing(folder: Path) -> None:
    """Evaluations sample responses of their own; neither weights nor what is counted depend on them."""
    more = ["adapter=lora", "adapter.dropout=0.2", "training.progress=off"]
    plain = runs.train(folder, "rejection_sampling", "unwatched", *more)
    watch = ["training.eval_every=1", f"data.validation={folder}/held-out-prompts.jsonl"]
    watched = runs.train(folder, "rejection_sampling", "watched", *more, *watch)
    assert runs.identical(runs.weights(folder, "unwatched"), runs.weights(folder, "watched"))
    assert watched["generated_tokens"] == plain["generated_tokens"] > 0
    evaluations = [line for line in runs.metrics(folder, "watched") if "eval/loss" in line]
    assert [line["step"] for line in evaluations] == [1, 2, 3, 4, 5, 6]
    assert len({line["eval/loss"] for line in evaluations}) == 6


LOSSES = [3.0, 2.0, 2.5, 2.25, 1.0, 0.5]


@pytest.fixture
def evaluated_as(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Evaluations find LOSSES, whatever the model; the steps at which there were some."""
    steps: list[int] = []

    def evaluate(self: Trainer) -> dict[str, float]:
        steps.append(self.state.step)
        return {"eval/loss": LOSSES[self.state.step - 1], "eval/reward": -LOSSES[self.state.step - 1]}

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    return steps


WATCH = ["training.eval_every=1", "data.validation=0.3"]


@pytest.fixture
def after(folder: Path) -> Any:
    """The weights after so many steps of an unwatched run on the same records."""

    def weights(step: int) -> dict[str, torch.Tensor]:
        sft(folder, f"after-{step}", "data.validation=0.3", f"training.steps={step}")
        return runs.weights(folder, f"after-{step}")

    return weights


@pytest.mark.parametrize("metric", ["eval/loss min", "eval/reward max"])
def test_patience(folder: Path, evaluated_as: list[int], after: Any, metric: str) -> None:
    """Best at step 2, worse at 3 and 4: with a patience of two that is the end."""
    name, mode = metric.split()
    out = f"patient-{mode}"
    more = [*WATCH, f"training.metric={name}", f"training.metric_mode={mode}", "training.patience=2"]
    result, lines = sft(folder, out, *more)
    assert evaluated_as == [1, 2, 3, 4]
    assert result["step"] == 4 and [line["step"] for line in lines] == [1, 2, 3, 4]
    assert runs.identical(runs.weights(folder, out), after(4))
    # The wrong direction: step 1 is the best there is, step 3 the second evaluation without improvement.
    wrong = {"min": "max", "max": "min"}[mode]
    result, _ = sft(folder, f"{out}-wrong", *more, f"training.metric_mode={wrong}")
    assert result["step"] == 3


def test_final_best_leaves_the_best_weights(folder: Path, evaluated_as: list[int], after: Any) -> None:
    result, _ = sft(folder, "best", *WATCH, "training.final=best", "training.steps=4")
    assert result["step"] == 4
    assert runs.identical(runs.weights(folder, "best"), after(2))
    best = Checkpoints(folder / "best/checkpoints", is_main=False).best()
    assert best is not None
    manifest = read_manifest(best)
    assert (manifest["step"], manifest["metric"]) == (2, 2.0)


def test_the_best_checkpoint_is_kept_and_the_last_weights_are_left(
    folder: Path, evaluated_as: list[int], after: Any
) -> None:
    more = ["training.checkpoint_every=1", "training.keep_last=1", "training.steps=4"]
    sft(folder, "kept", *WATCH, *more)
    assert runs.identical(runs.weights(folder, "kept"), after(4))
    kept = sorted(p.name for p in (folder / "kept/checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000004"]


def test_stopped_early_stays_stopped(folder: Path, evaluated_as: list[int]) -> None:
    """The same command again finds the last checkpoint and trains no further."""
    more = [*WATCH, "training.patience=2", "training.checkpoint_every=1"]
    sft(folder, "early", *more)
    before = runs.weights(folder, "early")
    result, lines = sft(folder, "early", *more)
    assert result["step"] == 4 and [line["step"] for line in lines] == [1, 2, 3, 4]
    assert evaluated_as == [1, 2, 3, 4]
    assert runs.identical(before, runs.weights(folder, "early"))


# ------------------------------------------------------------------ limits


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        (["training.steps=3"], 3),
        (["training.steps=3", "training.epochs=100"], 3),  # the nearest ends the run
        (["training.steps=7"], 7),  # no epoch counts where another limit is given
        (["training.steps=null"], 3),  # one where none is
        (["training.steps=100", "training.epochs=1"], 3),  # 12 records by 5: batches of 5, 5 and 2
        (["training.steps=null", "training.epochs=2"], 6),
        (["training.steps=null", "training.epochs=0.5"], 2),  # 1.5 batches, rounded up
        (["training.steps=null", "training.epochs=1.5"], 5),  # 4.5
        (["training.steps=null", "training.epochs=1.5", "training.batch_size=4"], 5),  # 4.5 of three a time
        (["training.steps=null", "training.epochs=2", "training.batch_size=4"], 6),
    ],
)
def test_steps_and_epochs(folder: Path, limits: list[str], steps: int) -> None:
    result, lines = sft(folder, "limits", "training.batch_size=5", *limits, "training.resume=never")
    assert result["step"] == steps
    assert lines[-1]["epoch"] == pytest.approx(steps / 3)
    given = dict(word.removeprefix("training.").split("=") for word in limits)
    ended = f"steps={steps}" if given.get("steps") == str(steps) else f"epochs={given.get('epochs', 1)}"
    assert result["ended_by"] == f"training.{ended}"


def test_an_epoch_is_every_record_once(folder: Path) -> None:
    tokens = sum(len(response) for _, response in sequences(folder / "demonstrations.jsonl"))
    result, _ = sft(folder, "epochs", "training.batch_size=5", "training.steps=null", "training.epochs=3")
    assert result["trained_tokens"] == 3 * tokens


@pytest.mark.parametrize("limit", [1, 40, 100])
def test_trained_tokens(folder: Path, limit: int) -> None:
    """The step that reaches the limit is the last: at most one batch over."""
    more = ["training.batch_size=3", "training.steps=null", f"training.max_trained_tokens={limit}"]
    result, lines = sft(folder, f"trained-{limit}", *more)
    counts = [0, *(line["trained_tokens"] for line in lines)]
    assert counts[-2] < limit <= counts[-1] == result["trained_tokens"]


def test_generated_tokens(folder: Path) -> None:
    more = ["training.steps=null", "training.max_generated_tokens=150", "training.progress=off"]
    result = runs.train(folder, "rejection_sampling", "generated", *more)
    counts = [0, *(line["generated_tokens"] for line in runs.metrics(folder, "generated"))]
    assert len(counts) > 2
    # 5 prompts a time, three responses to each, of 1 to 6 tokens.
    assert all(15 <= b - a <= 90 for a, b in pairwise(counts))
    # The last samples, which reach the limit, are trained on as well.
    assert counts[-2] < 150 <= counts[-1] == result["generated_tokens"]


# ------------------------------------------------------------------ learning rates


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        # At 0, 1/4, 1/2, 3/4 and the whole of the run.
        (Constant(), [1, 1, 1, 1, 1]),
        (Linear(), [1, 0.75, 0.5, 0.25, 0]),
        (Linear(min_lr=0.2), [1, 0.8, 0.6, 0.4, 0.2]),
        (Linear(warmup=0.5), [0, 0.5, 1, 0.5, 0]),
        (Constant(warmup=0.5), [0, 0.5, 1, 1, 1]),
        (Constant(warmup=1.0), [0, 0.25, 0.5, 0.75, 1]),
        # (1 + cos(pi/4)) / 2 = 0.853553, (1 + cos(3 pi/4)) / 2 = 0.146447
        (Cosine(), [1, 0.853553, 0.5, 0.146447, 0]),
        (Cosine(min_lr=0.1), [1, 0.868198, 0.55, 0.231802, 0.1]),
        (Cosine(warmup=0.5), [0, 0.5, 1, 0.5, 0]),
    ],
)
def test_schedules(schedule: Constant, factors: list[float]) -> None:
    assert [schedule(done) for done in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx(factors, abs=1e-6)


def rates(lines: list[dict[str, Any]]) -> list[float]:
    return [line["lr"] / LR for line in lines]


def test_the_rate_follows_the_nearest_limit(folder: Path) -> None:
    linear = ["schedule=linear"]
    _, lines = sft(folder, "rate-steps", *linear, "training.steps=4", "training.epochs=100")
    assert rates(lines) == pytest.approx([1, 0.75, 0.5, 0.25])
    more = ["training.batch_size=5", "training.steps=null", "training.epochs=2"]
    _, lines = sft(folder, "rate-epochs", *linear, *more)
    assert rates(lines) == pytest.approx([1 - k / 6 for k in range(6)])
    _, lines = sft(folder, "rate-tokens", *linear, *more, "training.max_trained_tokens=80", "training.epochs=null")
    before = [0, *(line["trained_tokens"] for line in lines[:-1])]
    assert len(before) > 2
    assert rates(lines) == pytest.approx([1 - tokens / 80 for tokens in before])


def test_the_rate_of_a_run_limited_by_sampling(folder: Path) -> None:
    """What was sampled counts as consumed once it has been trained on."""
    more = ["schedule=linear", "training.steps=null", "training.max_generated_tokens=300"]
    runs.train(folder, "rejection_sampling", "rate-sampled", *more, "training.progress=off")
    lines = runs.metrics(folder, "rate-sampled")
    assert len(lines) > 3
    before = [0, *(line["generated_tokens"] for line in lines[:-1])]
    assert rates(lines) == pytest.approx([1 - tokens / 300 for tokens in before])
    # Two steps to an iteration: after the first of them, half of what was sampled is consumed.
    out, more = "rate-halves", [*more, "source.rollout_batch_size=10", "training.progress=off"]
    runs.train(folder, "rejection_sampling", out, *more)
    lines = runs.metrics(folder, out)
    first = lines[0]["generated_tokens"]
    assert lines[1]["generated_tokens"] == first
    assert rates(lines[:2]) == pytest.approx([1, 1 - first / 2 / 300])


def test_the_rate_warms_up_in_a_run(folder: Path) -> None:
    _, lines = sft(folder, "warm", "training.steps=4", "schedule.warmup=0.5", "schedule=linear")
    assert rates(lines) == pytest.approx([0, 0.5, 1, 0.5])


# ------------------------------------------------------------------ the step


def update(folder: Path, out: str, *more: str) -> dict[str, torch.Tensor]:
    """What one step of plain gradient descent changes."""
    sft(folder, out, "training.steps=1", "optimizer.momentum=0", *more)
    base, new = load_file(folder / "base/model.safetensors"), runs.weights(folder, out)
    return {name: new[name] - base[name] for name in new}


def test_weight_decay_is_for_matrices_alone(folder: Path) -> None:
    """SGD: w − lr·(g + λw), so the two updates differ by lr·λ·w = 0.05 · 0.5 · w."""
    base = load_file(folder / "base/model.safetensors")
    without, with_ = update(folder, "no-decay"), update(folder, "decay", "optimizer.weight_decay=0.5")
    vectors = [name for name, w in base.items() if w.dim() == 1]
    assert any("norm" in name for name in vectors)
    for name, weight in base.items():
        expected = torch.zeros_like(weight) if weight.dim() < 2 else -0.025 * weight
        torch.testing.assert_close(with_[name] - without[name], expected, rtol=0, atol=1e-6)


def test_clipping_scales_the_gradient_to_the_limit(folder: Path) -> None:
    free = update(folder, "free", "training.max_grad_norm=null")
    norm = runs.metrics(folder, "free")[0]["grad_norm"]
    total = math.sqrt(sum(float((u.double() ** 2).sum()) for u in free.values()))
    assert total == pytest.approx(LR * norm, rel=1e-4)
    clipped = update(folder, "clipped", f"training.max_grad_norm={norm / 4}")
    assert runs.metrics(folder, "clipped")[0]["grad_norm"] == pytest.approx(norm, rel=1e-6)  # before clipping
    for name, change in free.items():
        torch.testing.assert_close(clipped[name], change / 4, rtol=1e-3, atol=1e-7)
    loose = update(folder, "loose", f"training.max_grad_norm={norm * 4}")
    assert runs.identical(loose, free)


def test_bfloat16_computes_coarsely_and_keeps_exact_weights(folder: Path) -> None:
    _, exact = sft(folder, "float32", "training.steps=2")
    _, coarse = sft(folder, "bfloat16", "training.steps=2", "training.mixed_precision=bf16")
    for a, b in zip(exact, coarse, strict=True):
        assert a["loss"] != b["loss"]
        assert b["loss"] == pytest.approx(a["loss"], rel=0.02)  # bfloat16 has 8 bits of mantissa
    weights = runs.weights(folder, "bfloat16")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    base = load_file(folder / "base/model.safetensors")
    assert any(not torch.equal(w, w.bfloat16().float()) for n, w in weights.items() if not torch.equal(w, base[n]))
    # A run after it in the same process, as in a sweep, is in its own precision again.
    _, again = sft(folder, "float32-again", "training.steps=2")
    assert [line["loss"] for line in again] == [line["loss"] for line in exact]


def test_threads_are_those_asked_for(folder: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        sft(folder, "threads", "training.steps=1", "training.threads=1")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_progress_is_shown_or_not(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sft(folder, "silent", "training.steps=2")
    assert "step" not in capfd.readouterr().err
    sft(folder, "told", "training.steps=2", "training.progress=plain")
    said = capfd.readouterr().err
    assert "step 1 (50%)" in said and "step 2 (100%)" in said
