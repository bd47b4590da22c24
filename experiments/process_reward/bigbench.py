"""A process reward model on BIG-Bench-Mistake (Tyen et al. 2023, arXiv:2311.08516): can a tiny one find the mistake?

    python experiments/process_reward/bigbench.py data=DIR model=DIR out=runs/process_reward

Trains on 70 % of the five tasks and measures on 20 %, from a model of your choice (read with its own tokenizer) and
from a model of bytes made here, which reads every character. Thresholds are chosen on the other 10 %.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from figures import Case, at, baselines, best_threshold, cases, first, steps_right, table

from alignlab.core import Group
from alignlab.data import DataSettings, load
from alignlab.models import ModelSettings
from alignlab.models.base import load_tokenizer
from alignlab.scoring import ProcessRewardScorer

SPLIT = {"validation": 0.1, "test": 0.2}
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
POSITIONS = 1024
COMMON = [
    *("data.on_bad_record=skip", "data.validation=0.1", "data.test=0.2"),
    *("optimizer.lr=1e-3", "schedule=linear", "schedule.warmup=0.05", "training.batch_size=32"),
    *("training.progress=plain", "training.log_every=50", "training.threads=1"),
]


def alignlab(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "alignlab", "train", *words], check=True)


def byte_model(folder: Path) -> Path:
    """A Llama with random weights and a token for each byte."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if folder.exists():
        return folder
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPE,
        vocab_size=len(tokenizer),
        max_position_embeddings=POSITIONS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_solutions(data: Path, file: Path) -> None:
    """The solutions as demonstrations, for the byte model to learn the language of."""
    lines = []
    for path in sorted(data.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line) if line.strip() else None
            if record and record["steps"]:
                lines.append(json.dumps({"prompt": record["input"], "completion": "\n".join(record["steps"])}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def trained_byte_model(data: Path, out: Path) -> str:
    """The byte model after two passes over the training solutions."""
    raw = byte_model(out / "bytes_raw")
    write_solutions(data, out / "solutions.jsonl")
    alignlab(
        *("algorithm=sft", f"model={raw}", "data=demonstrations", f"data.path={out / 'solutions.jsonl'}", *COMMON),
        *("training.epochs=2", "optimizer.lr=3e-3", f"out={out / 'bytes'}"),
    )
    return str(out / "bytes/model")


def task(group: Group) -> str:
    return Path(group.origin.rpartition(":")[0]).stem


def measure(data: Path, prm: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Task (or "all") → whose → figures. A solution longer than the model reads is judged by what it sees of it."""
    tokenizer = load_tokenizer(ModelSettings(path=str(prm)))
    limit = json.loads((prm / "config.json").read_text())["max_position_embeddings"]
    settings = DataSettings(path=str(data), on_bad_record="skip", **SPLIT)  # type: ignore[arg-type]
    whole = load(settings, tokenizer)
    seen = load(settings.model_copy(update={"max_length": limit}), tokenizer)
    scorer = ProcessRewardScorer(str(prm))

    def told(name: str) -> list[Case]:
        judged = dict(zip((g.origin for g in getattr(seen, name)), cases(scorer, getattr(seen, name)), strict=True))
        groups = getattr(whole, name)
        return [(judged.get(g.origin, ([], None))[0], first(g.responses[0].columns["step_label"])) for g in groups]

    validation, test = told("validation"), told("test")
    train = [([], first(g.responses[0].columns["step_label"])) for g in whole.train]
    rows = {}
    for name in ["all", *sorted({task(g) for g in whole.test})]:

        def of(part: list[Case], groups: list[Group], name: str = name) -> list[Case]:
            return [c for c, g in zip(part, groups, strict=True) if name in ("all", task(g))]

        mine = of(test, whole.test)
        threshold = best_threshold(of(validation, whole.validation))
        rows[name] = {
            "model, threshold 1/2": at(mine, 0.5) | {"steps": steps_right(mine)},
            f"model, threshold {threshold:g} (chosen on validation)": at(mine, threshold),
            **baselines(of(train, whole.train), mine),
        }
    return rows


def main(data: Path, model: str, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in ("TinyStories-656K", "bytes"):
        base = model if name == "TinyStories-656K" else trained_byte_model(data, out)
        alignlab(
            *("algorithm=process_reward_model", f"model={base}", "data=steps", f"data.path={data}", *COMMON),
            *("training.epochs=5", "training.eval_every=48", "training.final=best", f"out={out / f'prm_{name}'}"),
        )
        rows = measure(data, out / f"prm_{name}/model")
        (out / f"bigbench_{name}.json").write_text(json.dumps(rows, indent=2) + "\n")
        for part, some in rows.items():
            print(f"\n{name}, {part}: {next(iter(some.values()))['n']} solutions\n\n{table(some)}", flush=True)


if __name__ == "__main__":
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    if not {"data", "model"} <= given.keys():
        sys.exit("usage: bigbench.py data=FOLDER model=PATH [out=DIR]; FOLDER has the files of BIG-Bench-Mistake")
    main(Path(given["data"]), given["model"], Path(given.get("out", "runs/process_reward")))
