"""What the parts work on: sizes, a Llama with random weights, records of random words; and how they report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1]
REPOSITORY = HERE.parents[1]
sys.path.insert(0, str(REPOSITORY / "experiments" / "performance"))  # its counts of operations, its random words

from measuring.work import END, SPECIAL, Shape, Words, text_of  # noqa: E402

Say = Callable[..., None]
"""Reports a row of a part: `ok=False` with a `reason` where something is not as it must be."""


class Skip(Exception):
    """A part cannot be done here; its message says why."""


@dataclass(frozen=True)
class Size:
    """How much of everything.

    Attributes:
        device: "cuda" or "cpu".
        folder: where the model, the records and the runs are made.
        shape: of the model.
        groups, prompt, response: of a step of SFT (DPO: half as many groups), in tokens.
        budget: tokens in a micro-batch.
        prompts, samples, new_tokens: of sampling.
        shortage: groups of the step that there is no memory for.
        heads, variants, lengths: of FlexAttention: heads by how many share a key; (dtype, size of a head, that number);
            tokens in a row.
        modes: distributed modes that are run as one process.
    """

    device: str
    folder: Path
    shape: Shape
    groups: int
    prompt: int
    response: int
    budget: int
    prompts: int
    samples: int
    new_tokens: int
    shortage: int
    variants: tuple[tuple[str, int, int], ...]
    lengths: tuple[int, ...]
    modes: tuple[str, ...]
    heads: dict[int, int] = field(default_factory=lambda: {1: 8, 4: 8, 7: 14})

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def model(self) -> Path:
        return self.folder / "model"


def size_of(device: str, folder: Path) -> Size:
    if device == "cuda":
        every = tuple((dtype, size, n) for dtype in ("bfloat16", "float32") for n in (7, 4, 1) for size in (64, 128))
        shape = Shape(32_000, 896, 24, 14, 2, 4864)
        return Size(
            *(device, folder, shape, 32, 256, 256, 8192, 32, 8, 128, 64),
            *(every, (70, 128, 257, 1024, 4096, 8192), ("zero2", "zero3", "fsdp")),
        )
    shape = Shape(400, 128, 2, 4, 2, 256)
    some = (("float32", 64, 4), ("bfloat16", 64, 7))
    return Size(*(device, folder, shape, 8, 24, 16, 256, 4, 4, 12, 256), *(some, (70, 257, 512), ("zero2", "zero3")))


def make_model(size: Size, say: Say) -> None:
    """A Llama of Qwen2's shape with random weights in bfloat16, a tokenizer of whole words, records of random words.

    (The class of a Qwen2's tokenizer follows from the model's, and has words of its own.)
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    shape = size.shape
    words = {word: i for i, word in enumerate(SPECIAL)} | {f"t{i}": i for i in range(len(SPECIAL), shape.vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=backend, **named).save_pretrained(size.model)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=16_384,
        tie_word_embeddings=True,
        eos_token_id=END,
        pad_token_id=SPECIAL.index("<pad>"),
        dtype="bfloat16",
    )
    with torch.device(size.device):  # a GPU draws the numbers in no time
        network = LlamaForCausalLM(config).to(torch.bfloat16)
    network.save_pretrained(size.model)
    lines = Words(shape.vocabulary, seed=3)
    kinds: dict[str, list[dict[str, str]]] = {"demonstrations": [], "preferences": [], "prompts": []}
    for _ in range(6 * size.groups):
        prompt, chosen, rejected = (text_of(lines.ids(n)) for n in (size.prompt, size.response - 1, size.response - 1))
        kinds["demonstrations"].append({"prompt": prompt, "completion": chosen})
        kinds["preferences"].append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        kinds["prompts"].append({"prompt": prompt})
    for kind, records in kinds.items():
        (size.folder / f"{kind}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    say(parameters=sum(p.numel() for p in network.parameters()))


def groups(size: Size, count: int, responses: int, seed: int = 0) -> list[Any]:
    """Groups of random tokens: demonstrations, or pairs of which the first is preferred."""
    from alignlab import Group, Response

    words = Words(size.shape.vocabulary, seed)
    return [
        Group(
            words.ids(size.prompt),
            [
                Response([*words.ids(size.response - 1), END], columns={"score": 1.0 - k} if responses > 1 else {})
                for k in range(responses)
            ],
            origin=f"random:{i}",
        )
        for i in range(count)
    ]


def half_even(prompt: str, response: str, extra: dict[str, Any]) -> float:
    """A reward: the share of even words."""
    numbers = [int(word[1:]) for word in response.split() if word[1:].isdigit()]
    return sum(n % 2 == 0 for n in numbers) / max(1, len(numbers))


def command(size: Size, *words: str) -> list[str]:
    """`alignlab train` as a user gives it."""
    return [
        *(sys.executable, "-m", "alignlab", "train", f"model={size.model}", "training.progress=off"),
        *(f"training.max_tokens_per_microbatch={size.budget}", f"training.batch_size={size.groups}", *words),
    ]


def environment() -> dict[str, str]:
    paths = [
        str(HERE),
        str(REPOSITORY),
        str(REPOSITORY / "experiments" / "performance"),
        os.environ.get("PYTHONPATH", ""),
    ]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}


def run(words: list[str], died: int | None = None) -> str:
    """Run a command; what it printed, on either stream.

    Args:
        died: the signal that must end it.
    """
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    text = f"{done.stdout}\n{done.stderr}"
    print(text, file=sys.stderr)
    if done.returncode != (0 if died is None else -died):
        ended = signal.Signals(-done.returncode).name if done.returncode < 0 else f"status {done.returncode}"
        said = [line for line in text.splitlines() if line.strip()]
        raise RuntimeError(f"alignlab train ended with {ended}: {' | '.join(said[-3:])[-600:]}")
    return text


def result(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "result.json").read_text())
    return found
