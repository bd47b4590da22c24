"""The work that both sides do: random Llamas with tokenizers, and prompts and responses as token ids and as text."""

from __future__ import annotations

import json
import random
import re
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
END, PAD = SPECIAL.index("</s>"), SPECIAL.index("<pad>")
SHORTEST = 16
"""Responses have between 16 tokens and the most that is allowed, evenly distributed, the end token included."""

LORA = {"r": 16, "alpha": 32}
LEARNING_RATE = 1e-4
BETA = 0.1

Pair = dict[str, list[int]]
"""Token ids of `prompt`, `chosen` and `rejected`."""


@dataclass(frozen=True)
class Shape:
    """A Llama's: everything that decides what it costs."""

    vocabulary: int = 32_000
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    key_value_heads: int = 4
    intermediate: int = 688
    seed: int = 0

    @property
    def name(self) -> str:
        return "-".join(str(v) for v in asdict(self).values())


@dataclass(frozen=True)
class Scale:
    """How much of everything the study measures, and on what.

    Attributes:
        name: "full" or "small".
        folder: where models are made, once.
        device, dtype, threads: what both sides compute on and in; threads only count on a CPU.
        steps: measured steps in each process, after one of warm-up.
        pairs, prompts, response: preference pairs in a step, lengths of their prompts (each is measured), and the
            most tokens of a response.
        group: of a group update, (responses, prompt, most tokens of a response).
        fan: of sampling from one prompt, (samples, prompt, new tokens).
        skewed: of sampling with lengths far apart, (prompts, prompt, shortest, longest).
        ppo: of an iteration, (prompts, prompt, new tokens, epochs).
        quantized: shape of the model whose memory is measured on an NF4 base.
        widths: shapes for the share of the matmul peak.
        tokens: tokens in a row of that measurement, (groups, responses, prompt, response).
        growth: where the growth of cost starts, (groups, responses, prompt, response); each grows 16-fold.
    """

    name: str
    folder: str
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 2
    steps: int = 3
    model: Shape = field(default_factory=Shape)
    pairs: int = 8
    prompts: tuple[int, ...] = (192, 448)
    response: int = 64
    group: tuple[int, int, int] = (8, 256, 128)
    fan: tuple[int, int, int] = (16, 512, 64)
    skewed: tuple[int, int, int, int] = (64, 64, 8, 256)
    ppo: tuple[int, int, int, int] = (64, 128, 64, 4)
    quantized: Shape = field(default_factory=lambda: Shape(hidden=768, layers=6, heads=12, intermediate=2048))
    widths: tuple[Shape, ...] = (
        Shape(),
        Shape(hidden=512, layers=4, heads=8, key_value_heads=8, intermediate=1376),
        Shape(hidden=1024, layers=3, heads=16, key_value_heads=16, intermediate=2752),
    )
    tokens: tuple[int, int, int, int] = (8, 2, 192, 64)
    growth: tuple[int, int, int, int] = (1, 4, 128, 32)

    @property
    def small(self) -> bool:
        return self.name == "small"


SMALL_SHAPE = Shape(vocabulary=8_000, hidden=128, layers=2, intermediate=344)
BILLION = Shape(128_256, 2048, 16, 32, 8, 8192)


def scale(small: bool, device: str, model: str, folder: Path, threads: int, steps: int | None) -> Scale:
    """The sizes for a machine. On a GPU there is more of everything, or launching kernels would be what is measured.

    Args:
        model: "21m" or "1b"; `small` makes either tiny.
    """
    chosen: dict[str, Any] = {"device": device, "threads": threads, "folder": str(folder)}
    if steps:
        chosen["steps"] = steps
    if device == "cuda":
        chosen["dtype"] = "bfloat16"
    if model == "1b":
        chosen |= {"model": BILLION, "quantized": BILLION, "pairs": 16, "prompts": (512, 2048), "response": 256}
        chosen |= {"group": (8, 1024, 512), "fan": (16, 2048, 256), "skewed": (64, 128, 8, 512)}
        chosen |= {"ppo": (64, 256, 128, 4), "widths": (BILLION,), "tokens": (16, 2, 1024, 256)}
        chosen |= {"growth": (1, 4, 256, 64)}
    if small:
        chosen |= {"model": SMALL_SHAPE, "quantized": SMALL_SHAPE, "widths": (SMALL_SHAPE,), "pairs": 4}
        chosen |= {"prompts": (96,), "response": 32, "group": (8, 128, 32), "fan": (8, 128, 16)}
        chosen |= {"skewed": (16, 32, 4, 64), "ppo": (16, 48, 16, 2), "tokens": (4, 2, 96, 32)}
        chosen |= {"growth": (1, 2, 32, 8)}
    return Scale("small" if small else "full", **chosen)


def model_folder(folder: str | Path, shape: Shape, dtype: str = "float32") -> Path:
    """A Llama with random weights and a tokenizer whose tokens are the words t4, t5, …; made where it is not there."""
    path = Path(folder) / f"{shape.name}-{dtype}"
    if (path / "made").exists():
        return path
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    size = shape.vocabulary
    words = {word: i for i, word in enumerate(SPECIAL)} | {f"t{i}": i for i in range(len(SPECIAL), size)}
    words_only = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=words_only, **names).save_pretrained(path)
    torch.manual_seed(shape.seed)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=8192,
        bos_token_id=SPECIAL.index("<s>"),
        eos_token_id=END,
        pad_token_id=PAD,
        dtype=dtype,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(path)
    (path / "made").touch()
    return path


class Words:
    """Random tokens, none of them special."""

    def __init__(self, vocabulary: int, seed: int = 0) -> None:
        self._rng, self._vocabulary = random.Random(seed), vocabulary

    def ids(self, count: int) -> list[int]:
        return [self._rng.randrange(len(SPECIAL), self._vocabulary) for _ in range(count)]

    def response(self, most: int) -> list[int]:
        """Of 16 tokens or more where as many are allowed, the end token included."""
        return [*self.ids(self._rng.randint(min(SHORTEST, most), most) - 1), END]

    def number(self, low: int, high: int) -> int:
        return self._rng.randint(low, high)


def pair_batches(scale: Scale, prompt: int) -> list[list[Pair]]:
    """Preference pairs for one step of warm-up and the measured ones."""
    words = Words(scale.model.vocabulary)
    return [
        [
            {
                "prompt": words.ids(prompt),
                "chosen": words.response(scale.response),
                "rejected": words.response(scale.response),
            }
            for _ in range(scale.pairs)
        ]
        for _ in range(1 + scale.steps)
    ]


def group_batches(scale: Scale) -> list[list[Pair]]:
    """One prompt with its responses (`r0`, `r1`, …) for each step."""
    responses, prompt, most = scale.group
    words = Words(scale.model.vocabulary, seed=1)
    return [
        [{"prompt": words.ids(prompt), **{f"r{k}": words.response(most) for k in range(responses)}}]
        for _ in range(1 + scale.steps)
    ]


def text_of(ids: list[int]) -> str:
    """Text that the tokenizer turns into exactly these ids. An end token is left out: TRL adds its own."""
    return "".join(f"t{i} " for i in ids if i != END)


def set_trained(network: Any, seed: int = 1, deviation: float = 0.1) -> None:
    """Give what is trained, adapters and score heads, the same random numbers on both sides, by the module's name.

    A new adapter changes nothing (B = 0), so that any first loss would be log 2: agreement would prove nothing.
    """
    import torch

    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                where = re.search(r"layers\.\d+\.\w+\.\w+|score|embed_tokens|lm_head", name)
                factor = re.search(r"lora_[AB]", name)
                key = f"{where[0] if where else name}.{factor[0] if factor else ''}.{seed}"
                generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
                numbers = torch.empty(parameter.shape, dtype=torch.float32)
                parameter.copy_(numbers.normal_(0.0, deviation, generator=generator))


def describe(scale: Scale) -> dict[str, Any]:
    """The scale as JSON, without the folder."""
    described = json.loads(json.dumps(asdict(scale)))
    described.pop("folder")
    return dict(described)
