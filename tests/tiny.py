"""Small models of many architectures with random weights, a small tokenizer, and random groups."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from alignlab.core import Group, Response
from alignlab.models import PackedModel, attention

PAD, UNK, BOS, EOS = 0, 1, 2, 3
WORDS = [*"abcdefghijklmnopqrstuvwxyz"]
VOCABULARY = ["<pad>", "<unk>", "<s>", "</s>", *WORDS]
SIZE = len(VOCABULARY)
WINDOW = 5
"""Of the sliding-window models: shorter than nearly all prompts here."""

_COMMON: dict[str, Any] = {"vocab_size": SIZE, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}

QUANTIZABLE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
"""Sizes for 4 bits: bitsandbytes gets rows wrong on CPUs that are no multiple of its blocks of 64."""

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _GROUPED),
    "qwen2": ("Qwen2", _GROUPED),
    "qwen3": ("Qwen3", {**_GROUPED, "head_dim": 8}),
    "mistral": ("Mistral", {**_GROUPED, "sliding_window": WINDOW}),
    "gemma": ("Gemma", {**_GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2", {**_GROUPED, "head_dim": 8, "sliding_window": WINDOW, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3Text", {**_GROUPED, "head_dim": 8, "sliding_window": WINDOW, "sliding_window_pattern": 2}),
    "gpt2": ("GPT2", _GPT2),
    "gpt_neox": ("GPTNeoX", _SIZES),
    "phi": ("Phi", _SIZES),
    "opt": ("OPT", {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "cohere": ("Cohere", _GROUPED),
    "granite": (
        "Granite",
        {**_GROUPED, "logits_scaling": 4.0, "attention_multiplier": 0.3, "embedding_multiplier": 2.0},
    ),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mamba": ("Mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "openai_gpt": ("OpenAIGPT", _GPT2),
}
PACKABLE = [n for n in ARCHITECTURES if n not in ("bloom", "mamba", "openai_gpt")]
"""Those whose positions and mask can be given: exact as trunk and branches."""

AUTO = {
    "policy": "AutoModelForCausalLM",
    "score": "AutoModelForSequenceClassification",
    "step": "AutoModelForTokenClassification",
}


def network(
    name: str = "llama",
    kind: str = "policy",
    *,
    std: float = 0.3,
    seed: int = 0,
    attention: str | None = None,
    **changes: Any,
) -> Any:
    """A transformers model with random weights large enough that the context matters; norms and biases random too."""
    import transformers

    family, sizes = ARCHITECTURES[name]
    config = getattr(transformers, f"{family}Config")(**{**_COMMON, **sizes, **changes})
    if kind != "policy":
        config.num_labels = {"score": 1, "step": 3}[kind]
    made = getattr(transformers, AUTO[kind]).from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(std * noise)
            elif name != "mamba":  # the recurrence's own parameters are not for shaking
                parameter.add_(0.1 * noise)
    return made.eval()


def tokenizer(**special: str | None) -> Any:
    """A word-level tokenizer: one token for each letter, parted by spaces. `eos_token=None` and the like change it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in names.items() if v is not None})


def invented_stories(count: int = 200) -> list[str]:
    """Short texts of few words, every time the same."""
    rng = random.Random(3)
    names, verbs = (
        ["Tom", "Lily", "We", "They", "the big dog", "a cat"],
        ["was", "saw", "made", "ran to", "jumped over"],
    )
    things, links = ["the park", "2 games", "a box of six quilts", "3 cakes", "one day"], [". ", ".\n", ", and ", ": "]

    def sentence() -> str:
        return f"{rng.choice(names)} {rng.choice(verbs)} {rng.choice(things)}{rng.choice(links)}"

    return [f"Once upon a time {''.join(sentence() for _ in range(4))}So it ends." for _ in range(count)]


def stories_tokenizer() -> Any:
    """As Llama's tokenizers are: a space before each text, BOS added, tokens that may be several words long.

    It knows the characters of `invented_stories` and no bytes: others are unknown to it.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"unk_token": "<unk>", "bos_token": "<|start_story|>", "eos_token": "<|end_story|>"}
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=250, max_token_length=10, special_tokens=[*special.values()], show_progress=False
    )
    backend.train_from_iterator(invented_stories(), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<|start_story|> $A", special_tokens=[("<|start_story|>", 1)]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<unk>", **special)


def model(name: str = "llama", kind: str = "policy", **changes: Any) -> PackedModel:
    """A `PackedModel` in the packed layout, not probed."""
    return PackedModel(network(name, kind, **changes), tokenizer(), kind).eval()  # type: ignore[arg-type]


def save(
    folder: Path, name: str = "llama", kind: str = "policy", *, special: dict | None = None, **changes: Any
) -> Path:
    """A folder as `load_model` expects it: weights, config and tokenizer."""
    network(name, kind, **changes).save_pretrained(folder)
    tokenizer(**(special or {})).save_pretrained(folder)
    return folder


def ids(generator: random.Random, count: int) -> list[int]:
    """Ordinary tokens, no special ones."""
    return [generator.randrange(len(VOCABULARY) - len(WORDS), SIZE) for _ in range(count)]


def groups(shapes: Sequence[tuple[int, Sequence[int]]], seed: int = 0) -> list[Group]:
    """Random groups of these shapes: (length of the prompt, lengths of the responses)."""
    rng = random.Random(seed)
    return [
        Group(ids(rng, p), [Response(ids(rng, c)) for c in lengths], origin=f"data.jsonl:{i + 1}")
        for i, (p, lengths) in enumerate(shapes)
    ]


SHAPES = [(9, [4, 7, 1]), (3, [5]), (17, [2, 12, 6]), (1, [1, 3])]
"""Prompts shorter and longer than the window, up to three responses, one token to twelve."""


def some_groups(seed: int = 0) -> list[Group]:
    """Groups of `SHAPES`; some tokens of one response bear no loss, another ends with EOS."""
    made = groups(SHAPES, seed)
    made[0].responses[1].loss_mask = [False, True, True, False, False, True, True]
    made[2].responses[0].token_ids[-1] = EOS
    return made


def plain_logits(net: Any, tokens: Sequence[int]) -> Tensor:
    """Logits (L, V) of one sequence by the network's own forward: no padding, no cache, no mask."""
    return net(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]


def plain_log_probs(net: Any, data: Sequence[Group], temperature: float = 1.0) -> Tensor:
    """Log-probs of all loss-bearing tokens, one response at a time, by the network's own forward; with gradient."""
    found: list[Tensor] = []
    for group in data:
        for response in group.responses:
            start = len(group.prompt_ids)
            logits = plain_logits(net, group.prompt_ids + response.token_ids) / temperature
            every = logits[start - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(response.token_ids)[:, None])[:, 0]
            found.append(every[torch.tensor(response.loss_mask)] if response.loss_mask else every)
    return torch.cat(found)


def gradients(module: nn.Module, value: Tensor) -> dict[str, Tensor]:
    """Gradient of a number in every parameter that has one."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(value, [p for _, p in named], allow_unused=True)
    return {n: g for (n, _), g in zip(named, found, strict=True) if g is not None}


def listed(response: Response) -> dict[str, Any]:
    """Its columns, with lists for arrays."""
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in response.columns.items()}


@contextmanager
def flex_on_cpu(backend: Any = "eager") -> Iterator[None]:
    """CPUs compute attention as GPUs do. With "inductor" FlexAttention is compiled as it is there; "eager" compiles
    nothing and computes the same, and "aot_eager" has its gradients too, which PyTorch refuses on CPUs."""
    attention.compiled.cache_clear()
    with ExitStack() as changed:
        changed.callback(attention.compiled.cache_clear)
        changed.enter_context(patch.object(attention, "ON_CPU", "flex"))
        changed.enter_context(patch.object(torch, "compile", partial(torch.compile, backend=backend)))
        if backend == "aot_eager":
            changed.enter_context(patch("torch.nn.attention.flex_attention._validate_device", lambda *_: None))
        yield
