"""`alignlab plan` against what training really takes: each case a process of its own, its peak above what it held
before the model was loaded, beside the plan's figure.

    python experiments/performance/memory/measure.py [--only NAME] [--distributed] [--out results.json]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
VOCABULARY = {"a": 8000, "b": 32000, "tiny": 300}
MODELS: dict[str, dict[str, int]] = {
    "a": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},
    "b": {
        **{"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 12},
        "num_key_value_heads": 4,
    },
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
}
"""Llamas with random weights: 33 and 84 million parameters, and one to warm a process up with."""

PROMPT, RESPONSE = 192, 64
"""Tokens of every prompt and response."""

ALGORITHMS = {
    "sft": ["algorithm=sft", "data=demonstrations", "data.path={data}/demonstrations.jsonl"],
    "dpo": ["algorithm=dpo", "data=preferences", "data.path={data}/preferences.jsonl"],
    "reward_model": ["algorithm=reward_model", "data=preferences", "data.path={data}/preferences.jsonl"],
    "ppo": [
        *("algorithm=ppo", "data=prompts", "data.path={data}/prompts.jsonl", "source=rollout", "source.group_size=2"),
        *("scoring=function", "scoring.function.path=measure.score", f"rollout.max_new_tokens={RESPONSE}"),
        *("rollout.max_batch_tokens=4096", f"rollout.min_new_tokens={RESPONSE}"),
    ],
}
LORA, NF4, CHECKPOINTING = ["adapter=lora"], ["quantization=nf4"], ["model.gradient_checkpointing=true"]
CASES: dict[str, tuple[str, str, list[str]]] = {
    "sft full": ("a", "sft", ["training.max_tokens_per_microbatch=2048", "training.batch_size=16"]),
    "sft full, 1 micro-batch": ("a", "sft", ["training.max_tokens_per_microbatch=4096", "training.batch_size=16"]),
    "sft full, checkpointing": (
        "a",
        "sft",
        [*CHECKPOINTING, "training.max_tokens_per_microbatch=4096", "training.batch_size=32"],
    ),
    "sft full, large vocabulary": ("b", "sft", ["training.max_tokens_per_microbatch=1024", "training.batch_size=8"]),
    "sft full, large, SGD": (
        "b",
        "sft",
        ["optimizer=sgd", "training.max_tokens_per_microbatch=2048", "training.batch_size=8"],
    ),
    "sft full, bfloat16": (
        "b",
        "sft",
        ["model.dtype=bfloat16", "training.max_tokens_per_microbatch=1024", "training.batch_size=8"],
    ),
    "sft LoRA": ("a", "sft", [*LORA, "training.max_tokens_per_microbatch=2048", "training.batch_size=16"]),
    "sft LoRA, checkpointing": (
        "b",
        "sft",
        [*LORA, *CHECKPOINTING, "training.max_tokens_per_microbatch=4096", "training.batch_size=16"],
    ),
    "sft QLoRA": ("b", "sft", [*LORA, *NF4, "training.max_tokens_per_microbatch=1024", "training.batch_size=8"]),
    "dpo full": ("a", "dpo", ["training.max_tokens_per_microbatch=2048", "training.batch_size=12"]),
    "dpo LoRA": ("b", "dpo", [*LORA, "training.max_tokens_per_microbatch=2048", "training.batch_size=12"]),
    "reward_model full": ("b", "reward_model", ["training.max_tokens_per_microbatch=1024", "training.batch_size=6"]),
    "reward_model LoRA": (
        "a",
        "reward_model",
        [*LORA, "training.max_tokens_per_microbatch=2560", "training.batch_size=16"],
    ),
    "ppo full": ("a", "ppo", ["training.max_tokens_per_microbatch=2048", "training.batch_size=12"]),
    "ppo full, own critic": (
        "a",
        "ppo",
        ["algorithm.critic=own", "training.max_tokens_per_microbatch=1280", "training.batch_size=8"],
    ),
    "ppo LoRA": ("a", "ppo", [*LORA, "training.max_tokens_per_microbatch=2048", "training.batch_size=12"]),
    "ppo LoRA, checkpointing": (
        "b",
        "ppo",
        [*LORA, *CHECKPOINTING, "training.max_tokens_per_microbatch=2048", "training.batch_size=12"],
    ),
}
TWO = ["training.max_tokens_per_microbatch=1024", "training.batch_size=16", "distributed.processes=2"]
DISTRIBUTED: dict[str, tuple[str, str, list[str]]] = {
    f"{algorithm} {kind}, {mode} 2": ("b", algorithm, [*words, f"distributed={mode}", *TWO])
    for mode in ("ddp", "zero1", "zero2", "zero3", "fsdp")
    for algorithm, kind, words in (("sft", "full", []), ("dpo", "LoRA", LORA))
}


def score(prompt: str, response: str, extra: dict[str, Any]) -> float:
    """A reward for PPO."""
    return float(len(response) % 7)


def prepare(folder: Path) -> None:
    """Models and data; every word is a token."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    for name, shape in MODELS.items():
        size = VOCABULARY[name]
        words = ["<pad>", "<unk>", "<s>", "</s>", *(f"w{i}" for i in range(size - 4))]
        backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder / name)
        torch.manual_seed(0)
        config = LlamaConfig(**shape, vocab_size=size, max_position_embeddings=1024, pad_token_id=0)
        LlamaForCausalLM(config).save_pretrained(folder / name)
    rng = random.Random(0)

    def text(count: int) -> str:
        return " ".join(f"w{rng.randrange(250)}" for _ in range(count))

    files: dict[str, list[dict[str, str]]] = {"demonstrations": [], "preferences": [], "prompts": []}
    for _ in range(64):
        prompt = text(PROMPT)
        files["demonstrations"].append({"prompt": prompt, "completion": text(RESPONSE - 1)})
        files["preferences"].append({"prompt": prompt, "chosen": text(RESPONSE - 1), "rejected": text(RESPONSE - 1)})
        files["prompts"].append({"prompt": prompt})
    for name, records in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def words_of(folder: Path, model: str, algorithm: str, words: list[str]) -> list[str]:
    return [f"model={folder / model}", *(w.format(data=folder) for w in ALGORITHMS[algorithm]), *words]


def status(key: str) -> float:
    """A line of /proc/self/status, in bytes."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): VmHWM starts again from what is held now


def child(folder: Path, model: str, algorithm: str, words: list[str]) -> None:
    """One process: a run of a tiny model, so that every library has what it keeps; then the case. The peak leaves out
    loading, which reads a file through memory that is mapped, and saving."""
    sys.path.insert(0, str(HERE))
    import torch

    from alignlab.config import compose, resolve
    from alignlab.models import load as loading
    from alignlab.training import run

    torch.set_num_threads(1)
    loading.keep_freed_memory = lambda: None  # else the C library keeps what is freed, which counts as held
    rest = ["training.steps=2", "training.progress=off", "training.threads=1", "training.log_every=1"]
    peak: dict[str, float] = {}
    load, save = run.load_model, run.save_model

    def loaded(*arguments: Any, **options: Any) -> Any:
        found = load(*arguments, **options)
        for tensor in [*found.parameters(), *found.buffers()]:
            # A model's file stays mapped while any tensor is a view of it, with weights that are no longer needed
            # (those that a quantised base was made of): pages that the system can drop, and counts all the same.
            tensor.data = tensor.data.clone()
        if not peak:
            reset_peak()
        return found

    def saved(*arguments: Any, **options: Any) -> Any:
        peak.setdefault("training", status("VmHWM"))
        return save(*arguments, **options)

    with tempfile.TemporaryDirectory() as out:
        tiny = words_of(folder, "tiny", algorithm, words)
        run.train(resolve(compose("train", [*tiny, *rest])), Path(out) / "tiny")
        run.load_model, run.save_model = loaded, saved
        before = status("VmRSS")
        run.train(resolve(compose("train", [*words_of(folder, model, algorithm, words), *rest])), Path(out) / "case")
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({"measured": peak["training"] - before}))


def predict(folder: Path, model: str, algorithm: str, words: list[str]) -> dict[str, Any]:
    from alignlab.config import compose, resolve
    from alignlab.planning import plan

    lengths = [f"prompt_tokens={PROMPT}", f"response_tokens={RESPONSE}", "gpu=cpu"]
    return plan(resolve(compose("plan", [*words_of(folder, model, algorithm, words), *lengths])), table=False)


def measure(folder: Path, name: str, case: tuple[str, str, list[str]]) -> dict[str, Any]:
    model, algorithm, words = case
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        # What is freed goes back to the system at once, so that the process holds what torch holds.
        **{"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    }
    several = any(w.startswith("distributed=") for w in words)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if several else []
    command = [*(start or [sys.executable]), __file__, "--child", str(folder), model, algorithm, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    line = next((s for s in reversed(done.stdout.splitlines()) if s.startswith('{"measured"')), None)
    if line is None:
        return {"case": name, "failed": (done.stderr or done.stdout).strip().splitlines()[-3:]}
    measured = json.loads(line)["measured"]
    plan = predict(folder, model, algorithm, words)["memory"]
    return {
        "case": name,
        "predicted_mb": round(plan["total"] * 1e3, 1),
        "measured_mb": round(measured / 1e6, 1),
        "ratio": round(plan["total"] * 1e9 / measured, 3),
        "peak": plan["peak"],
        "model": model,
        "words": words,
    }


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose names hold this")
    parser.add_argument("--distributed", action="store_true", help="the modes of distribution, two processes each")
    parser.add_argument("--out", type=Path, default=None)
    asked = parser.parse_args()
    cases = DISTRIBUTED if asked.distributed else CASES
    results = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for name, case in cases.items():
            if asked.only in name:
                results.append(measure(Path(folder), name, case))
                print(json.dumps(results[-1]), flush=True)
    if asked.out:
        asked.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
