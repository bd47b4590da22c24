"""Loading, steps of training, sampling, few bits and too little memory, by the public API."""

from __future__ import annotations

import math
import resource
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from measuring.flops import matmul_peak, step_flops
from measuring.gauge import peak_mb, reset_peak, settle
from torch.utils._python_dispatch import TorchDispatchMode

import alignlab as al
from alignlab.training.settings import TrainingSettings
from checks.work import Say, Size, groups, half_even

STEPS = 6
"""Two to warm up, two that are timed, one whose waits are counted, one under the profiler."""

READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim")
"""What makes a host wait for a GPU; counted on a CPU, where nothing waits."""

EXACT = {torch.float32: 1e-4, torch.bfloat16: 0.02}
"""Mean difference of two log-probs that is rounding, in nats."""


def load(size: Size, say: Say) -> None:
    """What a model is held in and how it is laid out, for each dtype, and what is said of it."""
    for dtype in ("auto", "bfloat16", "float32"):
        for adapter in ("none", "lora"):
            settle()
            before, start = reset_peak(size.device), time.perf_counter()
            policy = al.load(size.model, adapter=adapter, device=size.device, dtype=dtype)
            model = policy.model
            seconds = time.perf_counter() - start
            wanted = "varlen"
            say(
                dtype=dtype,
                adapter=adapter,
                ok=model.layout == wanted,
                **({} if model.layout == wanted else {"reason": f"{model.layout} rows, not {wanted}"}),
                layout=model.layout,
                weights=_dtypes(p for p in model.parameters() if p.requires_grad),
                frozen=_dtypes(p for p in model.parameters() if not p.requires_grad),
                on=sorted({str(p.device) for p in model.parameters()}),
                notes=model.notes,
                seconds=round(seconds, 1),
                peak_mb=round(peak_mb(size.device) - before),
            )
            del policy, model


def train(size: Size, say: Say) -> None:
    peak = matmul_peak(size.device, "bfloat16" if size.on_gpu else "float32")[0]
    say(matmul_tflops=round(peak / 1e12, 2))
    for algorithm in ("sft", "dpo", "ppo"):
        for adapter in ("none", "lora"):
            try:
                _train(size, say, algorithm, adapter, peak)
            except Exception as error:  # the others go on
                import traceback

                traceback.print_exc()
                say(algorithm=algorithm, adapter=adapter, ok=False, reason=f"{type(error).__name__}: {error}"[:600])


def _train(size: Size, say: Say, algorithm: str, adapter: str, peak: float) -> None:
    settle()
    held = reset_peak(size.device)
    policy = al.load(size.model, adapter=adapter, device=size.device)
    settings = TrainingSettings(max_tokens_per_microbatch=size.budget)
    made = {"sft": al.SFT, "dpo": al.DPO, "ppo": al.PPO}[algorithm]()
    trainer = al.Trainer(policy, made, lr=1e-5 if adapter == "none" else 1e-4, settings=settings)
    before = {n: p.detach().to("cpu", copy=True) for n, p in trainer.engine.trained().items()}
    sampling: list[float] = []

    def work(step: int) -> list[Any]:
        if algorithm != "ppo":
            pairs = algorithm == "dpo"
            return groups(size, size.groups // (1 + pairs), 1 + pairs, seed=step)
        start = time.perf_counter()
        prompts = groups(size, size.prompts, 0, seed=step)
        found = policy.sample(
            prompts, max(1, size.samples // 2), seed=step, max_new_tokens=size.new_tokens, progress=False
        )
        sampling.append(time.perf_counter() - start)
        al.score(found, half_even)
        return found

    seconds, losses = [], []
    watched: dict[str, Any] = {}
    for step in range(STEPS):
        batch = work(step)
        _wait(size)
        start = time.perf_counter()
        if step == STEPS - 2:
            metrics = _waits(size, lambda: trainer.step(batch), watched)  # noqa: B023
        elif step == STEPS - 1:
            metrics = _profiled(size, lambda: trainer.step(batch), watched)  # noqa: B023
        else:
            metrics = trainer.step(batch)
        _wait(size)
        seconds.append(time.perf_counter() - start)
        losses.append(metrics["loss"])
    micro_batches = len(policy.model.micro_batches(batch, trainer.budget.tokens))
    watched["waits_per_micro_batch"] = round(watched["waits"] / micro_batches, 1)
    useful = _useful(size, batch, algorithm, adapter)
    best, tokens = min(seconds[2:4]), sum(g.packed_length for g in batch)
    states = trainer.engine.optimizer.state
    changed = total = 0
    for name, parameter in trainer.engine.trained().items():
        had = states[parameter]["exp_avg_sq"].cpu() > 0  # a gradient, in any of the steps
        changed += int((parameter.detach().cpu() != before[name])[had].sum())
        total += int(had.sum())
    share = changed / max(1, total)
    wrong = [] if share > 0.99 else [f"{1 - share:.1%} of the trained weights are as they were"]
    wrong += [] if all(map(math.isfinite, losses)) else ["a loss is not finite"]
    say(
        algorithm=algorithm,
        adapter=adapter,
        ok=not wrong,
        **({"reason": "; ".join(wrong)} if wrong else {}),
        tokens=tokens,
        tokens_per_second=round(tokens / best),
        share_of_matmul_peak=round(useful / best / peak, 3),
        first_step_seconds=round(seconds[0], 2),
        step_seconds=round(best, 3),
        **({"sampling_seconds": round(min(sampling[2:4]), 3)} if sampling else {}),
        micro_batches=micro_batches,
        peak_mb=round(peak_mb(size.device) - held),
        precision=trainer.computes,
        changed=round(share, 4),
        losses=[round(x, 4) for x in losses],
        layout=policy.model.layout,
        notes=policy.model.notes,
        **watched,
    )


def _useful(size: Size, batch: list[Any], algorithm: str, adapter: str) -> float:
    """Operations that a step cannot do without. PPO: a pass for the reference, another for values and log-probs as they
    were; its critic stands on the policy's trunk."""
    lora = adapter == "lora"
    trained = step_flops(size.shape, batch, lora)
    forward = step_flops(size.shape, batch, lora, reference=True) - trained
    return trained + {"sft": 0, "dpo": 1, "ppo": 2}[algorithm] * forward


class _Reads(TorchDispatchMode):
    """Counts the operations in `READS`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name in READS
        return func(*args, **(kwargs or {}))


def _waits(size: Size, work: Callable[[], Any], found: dict[str, Any]) -> Any:
    """How often the host waits for the GPU, and where. On a CPU: how often it reads a number from a tensor."""
    if not size.on_gpu:
        with _Reads() as reads:
            out = work()
        found["waits"] = reads.count
        return out
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            out = work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in seen if "synchroniz" in str(w.message)]
    places = Counter(f"{'/'.join(Path(w.filename).parts[-3:])}:{w.lineno}" for w in waits)
    found["waits"], found["waits_at"] = len(waits), dict(places.most_common(12))
    return out


def _profiled(size: Size, work: Callable[[], Any], found: dict[str, Any]) -> Any:
    """Kernels of a step: how many, which took longest, and for what part of the time one was running."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if size.on_gpu else [])]
    with profile(activities=activities) as profiled:
        start = time.perf_counter()
        out = work()
        _wait(size)
        wall = time.perf_counter() - start
    kind = DeviceType.CUDA if size.on_gpu else DeviceType.CPU
    spent = "self_device_time_total" if size.on_gpu else "self_cpu_time_total"
    kernels = [e for e in profiled.key_averages() if e.device_type == kind and getattr(e, spent) > 0]
    kernels.sort(key=lambda e: -getattr(e, spent))
    found["kernels"] = sum(e.count for e in kernels)
    found["kernel_share_of_time"] = round(sum(getattr(e, spent) for e in kernels) / 1e6 / wall, 3)
    found["longest_kernels_ms"] = {e.key[:80]: round(getattr(e, spent) / 1e3, 2) for e in kernels[:8]}
    return out


def decode(size: Size, say: Say) -> None:
    """Sampling, and whether scoring gives the same log-probs."""
    for adapter in ("none", "lora"):
        for dtype in ("bfloat16", "float32"):
            policy = al.load(size.model, adapter=adapter, device=size.device, dtype=dtype)
            settings: dict[str, Any] = {"max_new_tokens": size.new_tokens, "progress": False}
            prompts = groups(size, size.prompts, 0)
            policy.sample(prompts[:1], 2, max_new_tokens=2, progress=False)
            _wait(size)
            start = time.perf_counter()
            found = policy.sample(prompts, size.samples, seed=1, **settings)
            _wait(size)
            seconds = time.perf_counter() - start
            drawn = torch.cat([torch.tensor(r.columns["behaviour_logp"]) for g in found for r in g.responses])
            scored = torch.cat([x for each in policy.log_probs(found) for x in each]).cpu()
            difference = (drawn - scored).abs()
            limit = EXACT[policy.model.dtype]
            good = float(difference.mean()) <= limit
            say(
                adapter=adapter,
                dtype=dtype,
                ok=good,
                **({} if good else {"reason": "sampled and scored log-probs differ by more than rounding"}),
                tokens=len(drawn),
                tokens_per_second=round(len(drawn) / seconds),
                difference_mean=float(f"{float(difference.mean()):.2e}"),
                difference_max=float(f"{float(difference.max()):.2e}"),
                limit_of_mean=limit,
                computes=str(policy.model.dtype).removeprefix("torch."),
            )
            del policy


def quantized(size: Size, say: Say) -> None:
    """A step of DPO with LoRA on a base in 4 and in 8 bits."""
    for kind in ("nf4", "int8"):
        settle()
        before = reset_peak(size.device)
        policy = al.load(size.model, adapter="lora", quantization=kind, device=size.device)
        held = peak_mb(size.device) - before
        trainer = al.Trainer(
            policy, al.DPO(), lr=1e-4, settings=TrainingSettings(max_tokens_per_microbatch=size.budget)
        )
        start = time.perf_counter()
        metrics = trainer.step(groups(size, max(2, size.groups // 2), 2))
        _wait(size)
        start_loss = abs(metrics["loss"] - math.log(2)) < 1e-6  # the reference is the policy, bit by bit
        say(
            quantization=kind,
            ok=start_loss,
            **({} if start_loss else {"reason": f"the first loss is {metrics['loss']}, not log 2"}),
            loss=metrics["loss"],
            grad_norm=metrics["grad_norm"],
            step_seconds=round(time.perf_counter() - start, 2),
            loading_mb=round(held),
            peak_mb=round(peak_mb(size.device) - before),
            dtypes=dict(Counter(str(p.dtype).removeprefix("torch.") for p in policy.model.parameters())),
            precision=trainer.computes,
            layout=policy.model.layout,
            notes=policy.model.notes,
        )
        del policy, trainer


def shortage(size: Size, say: Say) -> None:
    """A step whose micro-batch there is no memory for: it is done in smaller ones, with the same loss."""
    batch = groups(size, size.shortage, 1)
    each = batch[0].packed_length
    plenty = _losses(size, batch, 2 * each, None)
    asked = each * len(batch)
    little = _losses(size, batch, asked, plenty["most"])
    good = little["budget"] < asked and abs(little["loss"] - plenty["loss"]) < 1e-3
    say(
        ok=good,
        **({} if good else {"reason": "the budget was not halved, or the loss is another"}),
        budget_asked=asked,
        budget_found=little["budget"],
        loss=little["loss"],
        loss_with_enough=plenty["loss"],
        step_seconds=little["seconds"],
    )


def _losses(size: Size, batch: list[Any], budget: int, most: float | None) -> dict[str, Any]:
    """Two steps; the loss of the second, the budget afterwards, and how many bytes were needed.

    Args:
        most: bytes that another run needed; half as many more are there.
    """
    settle()
    held = reset_peak(size.device)
    policy = al.load(size.model, adapter="lora", device=size.device)
    settings = TrainingSettings(max_tokens_per_microbatch=budget)
    trainer = al.Trainer(policy, al.SFT(), lr=1e-4, settings=settings)
    start = time.perf_counter()
    with _limit(size, most):
        for _ in range(2):
            metrics = trainer.step(batch)
    _wait(size)
    needed = torch.cuda.max_memory_reserved() if size.on_gpu else (peak_mb("cpu") - held) * 1e6
    return {
        "loss": metrics["loss"],
        "budget": trainer.budget.tokens,
        "most": needed,
        "seconds": round(time.perf_counter() - start, 2),
    }


@contextmanager
def _limit(size: Size, most: float | None) -> Iterator[None]:
    """No more memory inside than half as much again as `most`; on a CPU, than a little."""
    if most is None:
        yield
    elif size.on_gpu:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 1.5 * most / total))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    else:
        status = Path("/proc/self/status").read_text()
        used = int(status.split("VmData:")[1].split()[0]) << 10
        before = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (used + int(32e6), before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, before)


def _wait(size: Size) -> None:
    if size.on_gpu:
        torch.cuda.synchronize()


def _dtypes(parameters: Any) -> list[str]:
    return sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
