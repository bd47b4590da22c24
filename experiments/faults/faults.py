"""Provoke every fault in real runs of two processes; a row of the table in README.md for each, as it is done.

    python experiments/faults/faults.py FOLDER [NAME …]

FOLDER is for the runs. Disk faults need root on Linux: they mount small file systems below FOLDER.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STEPS = 6


@dataclass
class Fault:
    """One of the table's rows.

    Attributes:
        words: `MOMENT RANK ACT` for saboteur.py.
        mount: options of the tmpfs that the run's folder is on, if it is on one.
        damage: what is done to the checkpoints after a run of four steps, instead of a fault in a run.
        more: overrides.
    """

    how: str
    mode: str
    words: str = ""
    launcher: str = "own"
    mount: str | None = None
    damage: Callable[[Path], None] | None = None
    more: tuple[str, ...] = ()


def truncate(name: str) -> Callable[[Path], None]:
    def act(checkpoints: Path) -> None:
        path = checkpoints / "step-00000004" / name
        os.truncate(path, path.stat().st_size - 1)

    return act


def flip(name: str) -> Callable[[Path], None]:
    def act(checkpoints: Path) -> None:
        path = checkpoints / "step-00000004" / name
        contents = bytearray(path.read_bytes())
        contents[len(contents) // 2] ^= 1
        path.write_bytes(contents)

    return act


SKIP = ("training.non_finite=skip",)
SHARD = "trained-00002-of-00002.safetensors"
FAULTS = {
    "term-parent": Fault("SIGTERM to the starter, in a step", "zero3", "step 1 parent:SIGTERM"),
    "usr1-rank": Fault("SIGUSR1 to rank 1 alone, in a step", "zero2", "step 1 SIGUSR1"),
    "int-parent": Fault("Ctrl-C (SIGINT to the starter), in a rollout", "ddp", "rollout 0 parent:SIGINT"),
    "term-rank": Fault("SIGTERM to rank 0 alone, in a step", "fsdp", "step 0 SIGTERM"),
    "kill-step": Fault("`kill -9` of rank 1, between forward and backward", "zero3", "step 1 SIGKILL"),
    "kill-rollout": Fault("`kill -9` of rank 0, in a rollout", "ddp", "rollout 0 SIGKILL"),
    "kill-checkpoint": Fault("`kill -9` of rank 1, half of its shard written", "fsdp", "checkpoint 1 SIGKILL"),
    "kill-torchrun": Fault("`kill -9` of rank 1, in a step", "zero2", "step 1 SIGKILL", "torchrun"),
    "segv": Fault("SIGSEGV in rank 1, in a step", "ddp", "step 1 SIGSEGV"),
    "bug": Fault("an unforeseen exception in rank 1, in a step", "zero2", "step 1 bug"),
    "hang": Fault("rank 1's scorer sleeps for ever", "ddp", "rollout 1 sleep", more=("distributed.timeout=8",)),
    "hang-torchrun": Fault(
        "rank 1 sleeps for ever in a step", "zero2", "step 1 sleep", "torchrun", more=("distributed.timeout=8",)
    ),
    "full": Fault("disk full: a tmpfs, filled up before rank 1's shard", "ddp", "before 1 fill", mount="size=6m"),
    "readonly": Fault(
        "read-only: `checkpoints/` remounted so before rank 1's shard", "zero2", "before 1 readonly", mount="size=60m"
    ),
    "shard-bit": Fault("a bit flipped in rank 1's shard", "fsdp", damage=flip(SHARD)),
    "state-short": Fault("`state.pt` a byte too short", "zero2", damage=truncate("state.pt")),
    "manifest-bit": Fault("a bit flipped in `manifest.json`", "zero3", damage=flip("manifest.json")),
    "memory-ddp": Fault("the allocator refuses rank 1, in a step", "ddp", "step 1 memory"),
    "memory-zero3": Fault("the allocator refuses rank 1, in a step", "zero3", "step 1 memory"),
    "nan-stop": Fault("a NaN loss on rank 1, `non_finite=stop`", "zero2", "step 1 nan"),
    "nan-skip": Fault("a NaN loss on rank 1, `non_finite=skip`", "zero3", "step 1 nan", more=SKIP),
}


def command(folder: Path, out: Path, mode: str, launcher: str, *more: str) -> list[str]:
    words = [
        *("train", f"model={folder}/base", "algorithm=rejection_sampling", "data=prompts", "adapter=lora"),
        *(f"data.path={folder}/prompts.jsonl", "source=rollout", "source.group_size=3", "rollout.max_new_tokens=6"),
        *("scoring=function", "scoring.function.path=saboteur.rule", "adapter.dropout=0.2", "training.batch_size=4"),
        *("source.rollout_batch_size=8", "source.ppo_epochs=2", "training.epochs=null", f"training.steps={STEPS}"),
        *("training.checkpoint_every=2", "training.progress=off", f"distributed={mode}", f"out={out}", *more),
    ]
    if launcher == "torchrun":
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "alignlab"]
        return [sys.executable, *start, *words]
    return [sys.executable, "-m", "alignlab", *words, "distributed.processes=2"]


def run(words: list[str], **environment: str) -> tuple[int, float, str]:
    """Status, when it ended, and standard error."""
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300, start_new_session=True)
    return done.returncode, time.time(), done.stderr


def told(stderr: str) -> list[str]:
    """What a user is told, without what libraries say."""
    ours = r"alignlab: |SIG\w+: |damaged checkpoint|out of memory|step \d+ left out"
    return [line for line in stderr.splitlines() if re.match(ours, line)]


def weights(out: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(out / "model/adapter_model.safetensors")


def compare(folder: Path, fault: Fault, out: Path) -> str:
    """The weights of the run that went on beside those of an undisturbed one."""
    whole = folder / f"whole-{fault.mode}"
    if not (whole / "result.json").exists():
        status, _, said = run(command(folder, whole, fault.mode, "own"))
        assert status == 0, said
    a, b = weights(whole), weights(out)
    if all((a[n] == b[n]).all() for n in a):
        return "the same weights, bit for bit"
    return f"weights differ by {max(float((a[n] - b[n]).abs().max() / a[n].abs().max()) for n in a):.0e}"


def provoke(folder: Path, name: str, fault: Fault) -> dict[str, Any]:
    out, marker = folder / name / "run", folder / f"{name}.marker"
    (folder / name).mkdir()
    if fault.mount:
        subprocess.run(["mount", "-t", "tmpfs", "-o", fault.mount, "tmpfs", folder / name], check=True)
    words = command(folder, out, fault.mode, fault.launcher, *fault.more)
    row: dict[str, Any] = {"name": name, "how": fault.how, "mode": fault.mode, "launcher": fault.launcher}
    if fault.damage is not None:
        status, _, said = run([*words, "training.steps=4"])
        assert status == 0, said
        config = out / "config.yaml"
        config.write_text(config.read_text().replace("steps: 4", f"steps: {STEPS}"))
        fault.damage(out / "checkpoints")
        status, ended, said = run(words)
    else:
        hidden = {"FAULT": fault.words, "FAULT_MARKER": str(marker), "FAULT_MOUNT": str(folder / name)}
        status, ended, said = run(words, **hidden)
        row["seconds"] = round(ended - float(marker.read_text()), 1)
    kept = sorted(p.name for p in (out / "checkpoints").glob("step-*"))
    row |= {"status": status, "said": told(said), "traceback": "Traceback" in said, "kept": kept}
    if fault.mount:
        subprocess.run(["umount", out / "checkpoints"], check=False, stderr=subprocess.DEVNULL)
        (folder / name / "ballast").unlink(missing_ok=True)
    if not (out / "result.json").exists():
        status, _, said = run(words)
        row["went_on"] = status
        assert status == 0, said
    row["result"] = compare(folder, fault, out) if not fault.more or "timeout" in fault.more[0] else ""
    if fault.mount:
        subprocess.run(["umount", folder / name], check=False)
    return row


def make(folder: Path) -> None:
    """A tiny Llama that knows words w0…w19, and prompts."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "<pad>", *(f"w{i}" for i in range(20))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    rng = random.Random(0)
    lines = [{"prompt": " ".join(f"w{rng.randrange(20)}" for _ in range(rng.randint(2, 8)))} for _ in range(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").exists():
        make(folder)
    for name in sys.argv[2:] or FAULTS:
        try:
            row = provoke(folder, name, FAULTS[name])
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            row = {"name": name, "failed": str(error)[-2000:]}
        with (folder / "faults.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row, indent=1), flush=True)


if __name__ == "__main__":
    main()
