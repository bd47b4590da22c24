"""QLoRA end to end: five algorithms on 4-bit and 8-bit bases, saved, and read by other tools.

    python experiments/quantized/qlora.py MODEL STORIES [out=runs/quantized] [steps=12]

MODEL is the folder of a causal language model, STORIES a file of {"text"}, one story a line. Each algorithm trains an
adapter for a few steps on the base in `nf4` and in `int8`; PPO is scored by the reward model trained the same way,
merged. Then plain transformers, peft and bitsandbytes load what was saved, in a process without alignlab, and their
log-probs (and critic's values), scores or step logits are compared with ours; and each is merged into its dequantised
base. Results go to `out/quantized.json`, a table to the terminal.
"""

from __future__ import annotations

import copy
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from alignlab.config import compose, resolve
from alignlab.core import Group
from alignlab.data import DataSettings, load
from alignlab.launch import quiet
from alignlab.models import (
    LoRA,
    ModelSettings,
    PackedModel,
    QuantizationSettings,
    add_value_head,
    load_model,
    save_model,
)
from alignlab.training.run import train

ALGORITHMS: dict[str, tuple[str, str, list[str]]] = {
    "sft": ("policy", "demonstrations", []),
    "dpo": ("policy", "preferences", []),
    "reward_model": ("score", "preferences", []),
    "process_reward_model": ("step", "steps", []),
    "ppo": (
        "policy",
        "prompts",
        ["source=rollout", "source.group_size=4", "rollout.max_new_tokens=32", "scoring=reward_model"],
    ),
}
"""Kind of model, data, and what else is said."""

HELD = ("nf4", "int8")
RECORDS, COMPARED = 128, 16
LABELS = {"policy": 1, "score": 1, "step": 2}
READS = {"policy": ["logp"], "score": ["score"], "step": ["step"]}


def write_data(stories: Path, folder: Path) -> None:
    """An opening of twelve words and the sentence that follows; as rejected or wrong, the same with its words
    shuffled."""
    rng = random.Random(0)
    kinds: dict[str, list[dict[str, Any]]] = {k: [] for k in ("demonstrations", "preferences", "prompts", "steps")}
    for line in stories.read_text(encoding="utf-8").splitlines():
        words = json.loads(line)["text"].split()
        prompt, rest = " ".join(words[:12]), " ".join(words[12:])
        sentences = re.findall(r"[^.!?]+[.!?]", rest)[:4]
        if len(sentences) < 4 or any(len(s.split()) < 4 for s in sentences):
            continue
        right = [s.strip() for s in sentences]
        wrong = [" ".join(rng.sample(s.split(), len(s.split()))) for s in right]
        kinds["demonstrations"].append({"prompt": prompt, "completion": f" {right[0]}"})
        kinds["preferences"].append({"prompt": prompt, "chosen": f" {right[0]}", "rejected": f" {wrong[0]}"})
        kinds["prompts"].append({"prompt": prompt})
        labels = [rng.choice([-1, 1]) for _ in right]
        steps = [r if label == 1 else w for r, w, label in zip(right, wrong, labels, strict=True)]
        kinds["steps"].append({"prompt": prompt, "steps": steps, "labels": labels})
        if len(kinds["steps"]) == RECORDS:
            break
    folder.mkdir(parents=True, exist_ok=True)
    for kind, records in kinds.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def run(algorithm: str, held: str, base: str, out: Path, steps: int) -> tuple[Path, list[float]]:
    """The folder of the trained adapter, and the loss of each step."""
    _, data, own = ALGORITHMS[algorithm]
    words = [
        *(f"model={base}", f"algorithm={algorithm}", f"data={data}", f"data.path={out}/data/{data}.jsonl", *own),
        *(f"quantization={held}", "adapter=lora", "optimizer=paged_adamw_8bit", "optimizer.lr=1e-3"),
        *("training.epochs=null", f"training.steps={steps}", "training.batch_size=16", "training.resume=never"),
        *("training.progress=off", f"out={out}/{algorithm}-{held}"),
    ]
    if algorithm == "ppo":
        words.append(f"scoring.path={out}/reward_model-{held}-merged")
    config = resolve(compose("train", words))
    folder = Path(config["out"])
    train(config, folder)
    return folder / "model", [json.loads(s)["loss"] for s in (folder / "metrics.jsonl").read_text().splitlines()]


def reload(folder: Path, algorithm: str, held: str, groups: list[Group]) -> tuple[torch.Tensor, dict]:
    """What the saved adapter says, by alignlab; and the report of merging it, to `…-merged` beside its run."""
    kind = ALGORITHMS[algorithm][0]
    lora, quantization = LoRA(), QuantizationSettings(kind=held)
    model = load_model(ModelSettings(path=str(folder)), lora, kind, labels=LABELS[kind], quantization=quantization)
    reads = list(READS[kind])
    if (folder / "value_head.safetensors").exists():
        add_value_head(model)
        reads.append("value")
    said = model.outputs(groups, reads)
    merged = folder.parent.with_name(f"{folder.parent.name}-merged")
    save_model(model, merged, merge=True, texts=groups)
    report = json.loads((merged / "merge.json").read_text())

    def off(other: PackedModel) -> float:
        """Mean difference of another way to use the adapter."""
        name = READS[kind][0]
        theirs = other.outputs(groups, [name])[name]
        return float((torch.cat([(a - b).flatten() for a, b in zip(said[name], theirs, strict=True)])).abs().mean())

    report["peft_merge"] = off(PackedModel(copy.deepcopy(model.network).merge_and_unload(), model.tokenizer, kind))
    report["whole_base"] = off(load_model(ModelSettings(path=str(folder)), lora, kind, labels=LABELS[kind]))
    numbers = [torch.cat([said[name][i].flatten() for name in reads]) for i in range(len(said[reads[0]]))]
    return torch.cat(numbers), report


def compared(data: str, out: Path, base: str) -> list[Group]:
    """The texts on which models are compared. Every token of their responses is read, whether or not it bears loss."""
    kind = "preferences" if data == "prompts" else data
    tokenizer = load_model(ModelSettings(path=base, layout="plain"), trainable=False).tokenizer
    settings = DataSettings(path=f"{out}/data/{kind}.jsonl", parser=kind, max_records=COMPARED)
    groups = load(settings, tokenizer).train
    for response in (r for g in groups for r in g.responses):
        response.loss_mask = None
    return groups


def largest(a: torch.Tensor, b: list[float]) -> float:
    return float((a - torch.tensor(b)).abs().max())


def main() -> None:
    base, stories = str(Path(sys.argv[1]).resolve()), Path(sys.argv[2])
    options = dict(word.split("=", 1) for word in sys.argv[3:])
    out, steps = Path(options.get("out", "runs/quantized")).resolve(), int(options.get("steps", 12))
    quiet()
    torch.set_num_threads(1)
    write_data(stories, out / "data")
    rows, ours, requests = [], {}, {}
    for held in HELD:
        for algorithm, (kind, data, _) in ALGORITHMS.items():
            name = f"{algorithm}-{held}"
            folder, losses = run(algorithm, held, base, out, steps)
            groups = compared(data, out, base)
            ours[name], merge = reload(folder, algorithm, held, groups)
            texts = [(g, r) for g in groups for r in g.responses]
            requests[name] = {
                **{"folder": str(folder), "base": base, "kind": kind, "labels": LABELS[kind]},
                **{"sequences": [g.prompt_ids + r.token_ids for g, r in texts]},
                **{"starts": [len(g.prompt_ids) for g, _ in texts]},
            }
            rows.append({"algorithm": algorithm, "held": held, "losses": losses, "numbers": len(ours[name])} | merge)
    (out / "requests.json").write_text(json.dumps(requests))
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("plain.py"))]
    subprocess.run([*command, str(out / "requests.json"), str(out / "answers.json")], check=True)
    answers = json.loads((out / "answers.json").read_text())
    for row in rows:
        name = f"{row['algorithm']}-{row['held']}"
        row |= {f"plain_{mode}": largest(ours[name], said) for mode, said in answers[name].items()}
    (out / "quantized.json").write_text(json.dumps(rows, indent=1))
    print(
        "| algorithm | base | loss, first → last step | numbers compared | plain, as in training | plain, evaluating |"
    )
    print("|:--|:--|:--|--:|--:|--:|")
    for row in rows:
        shown = f"{row['losses'][0]:.3f} → {row['losses'][-1]:.3f}"
        differences = f"{row['plain_training']:.1e} | {row['plain_evaluation']:.1e}"
        print(f"| {row['algorithm']} | {row['held']} | {shown} | {row['numbers']} | {differences} |")
    print("\n| algorithm | base | merged: mean | largest | PEFT's merge: mean | adapter on the whole base: mean |")
    print("|:--|:--|--:|--:|--:|--:|")
    for row in rows:
        keys = ("mean_difference", "max_difference", "peft_merge", "whole_base")
        print(f"| {row['algorithm']} | {row['held']} | " + " | ".join(f"{row[k]:.1e}" for k in keys) + " |")


if __name__ == "__main__":
    main()
