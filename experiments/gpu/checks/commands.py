"""Runs as commands: DeepSpeed and FSDP over NCCL, a kill, vLLM beside the trainer, and the plan of a run."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from measuring.gauge import peak_mb, reset_peak, settle
from safetensors.torch import load_file

from checks.work import Say, Size, Skip, command, environment, result, run


def processes(size: Size, say: Say) -> None:
    """One process under our launcher, in each mode."""
    for mode in size.modes:
        out, seen = size.folder / mode, size.folder / f"{mode}.backend"
        try:
            run(
                command(
                    size,
                    *("algorithm=dpo", "data=preferences", f"data.path={size.folder}/preferences.jsonl"),
                    *("training.steps=2", f"training.batch_size={size.groups // 2}", f"distributed={mode}"),
                    *("distributed.processes=1", "callbacks.backend._target_=checks.callbacks.Backend"),
                    *(f"callbacks.backend.file={seen}", f"out={out}", "training.checkpoint_every=null"),
                )
            )
        except RuntimeError as error:
            say(mode=mode, ok=False, reason=str(error))
            continue
        found = result(out)
        backend = seen.read_text()
        good = not size.on_gpu or "nccl" in backend
        say(
            mode=mode,
            ok=good,
            **({} if good else {"reason": "gradients do not go over NCCL"}),
            backend=backend,
            **{key: found[key] for key in ("engine", "processes", "precision", "step", "seconds", "peak_memory_mb")},
        )


def resume(size: Size, say: Say) -> None:
    """A run that is killed and goes on, and one that is not."""
    died = size.folder / "died"
    words = [
        *("algorithm=sft", "data=demonstrations", f"data.path={size.folder}/demonstrations.jsonl", "adapter=lora"),
        *("training.steps=6", "training.checkpoint_every=2", "adapter.dropout=0.1"),
    ]
    dies = ["callbacks.dies._target_=checks.callbacks.Dies", "callbacks.dies.step=5", f"callbacks.dies.file={died}"]
    with ThreadPoolExecutor() as both:
        first = both.submit(run, command(size, *words, f"out={size.folder}/whole"))
        run(command(size, *words, *dies, f"out={size.folder}/killed"), died=signal.SIGKILL)
        first.result()
    run(command(size, *words, *dies, f"out={size.folder}/killed"))
    whole, killed = (
        load_file(size.folder / name / "model" / "adapter_model.safetensors") for name in ("whole", "killed")
    )
    same = all(torch.equal(whole[n], killed[n]) for n in whole)
    apart = max(float((whole[n].float() - killed[n].float()).abs().max()) for n in whole)
    steps = result(size.folder / "killed")["step"]
    good = steps == 6 and apart < 1e-3
    say(
        ok=good,
        **({} if good else {"reason": f"{steps} steps, weights {apart} apart"}),
        killed_after=5,
        went_on_from=4,
        bit_identical=same,
        largest_difference=apart,
        largest_weight=max(float(w.abs().max()) for w in whole.values()),
    )


def vllm(size: Size, say: Say) -> None:
    """Sampling by vLLM, in an environment of its own or this one."""
    python = os.environ.get("ALIGNLAB_VLLM_PYTHON")
    if python is None and importlib.util.find_spec("vllm") is None:
        raise Skip("vLLM is not installed here, and ALIGNLAB_VLLM_PYTHON names no other Python that has it")
    out = size.folder / "vllm"
    run(
        command(
            size,
            *("algorithm=grpo", "data=prompts", f"data.path={size.folder}/prompts.jsonl", "source=rollout"),
            *("source.group_size=4", f"rollout.max_new_tokens={size.new_tokens}", "rollout=vllm", "scoring=function"),
            *("scoring.function.path=checks.work.half_even", "training.steps=3", f"out={out}", "adapter=lora"),
            f"training.batch_size={size.prompts}",
        )
    )
    lines = (out / "metrics.jsonl").read_text().splitlines()
    say(last_metrics=lines[-1], **{k: result(out)[k] for k in ("seconds", "generated_tokens", "peak_memory_mb")})


def plan(size: Size, say: Say) -> None:
    """The figure of `alignlab plan` beside the memory that the run took. On a CPU, what was held before the model was
    loaded is taken off: Python and its libraries, which the plan does not count."""
    words = [
        *(f"model={size.model}", "algorithm=sft", "data=demonstrations", "training.progress=off"),
        *(f"data.path={size.folder}/demonstrations.jsonl", f"training.batch_size={size.groups}"),
        *(f"training.max_tokens_per_microbatch={size.budget}", "training.steps=3", "training.checkpoint_every=null"),
    ]
    for adapter in ("none", "lora"):
        program = [sys.executable, __file__, str(size.folder), size.device, str(size.prompt), str(size.response)]
        done = subprocess.run(
            [*program, *words, f"adapter={adapter}", f"out={size.folder}/plan-{adapter}"],
            env=environment(),
            capture_output=True,
            text=True,
        )
        print(done.stderr, file=sys.stderr)
        if done.returncode:
            say(adapter=adapter, ok=False, reason=done.stderr.strip().splitlines()[-1][:600])
            continue
        planned, measured = map(float, done.stdout.splitlines()[-1].split())
        say(adapter=adapter, planned_mb=round(planned), measured_mb=round(measured), ratio=round(planned / measured, 2))


def _planned(device: str, prompt: str, response: str, words: list[str]) -> str:
    """MB that the plan of a run says, and that it takes; in a process of its own, whose peak is that of one run."""
    from alignlab.config import compose, resolve
    from alignlab.planning import plan as planned
    from alignlab.training.run import train

    config = resolve(compose("train", words))
    gpu = ["gpu=cpu"] if device == "cpu" else []
    lengths = [f"prompt_tokens={prompt}", f"response_tokens={response}"]
    found: dict[str, Any] = planned(resolve(compose("plan", [*words, *lengths, *gpu])), table=False)["memory"]
    settle()
    before = reset_peak(device)
    train(config, Path(config["out"]))
    return f"{(found['total'] - found['overhead']) * 1e3} {peak_mb(device) - before}"


if __name__ == "__main__":
    print(_planned(sys.argv[2], sys.argv[3], sys.argv[4], sys.argv[5:]))
