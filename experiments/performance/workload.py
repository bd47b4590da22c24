"""The work that both sides do: a random Llama with its tokenizer, and preference pairs as token ids and as text."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
END = SPECIAL.index("</s>")
SHORTEST = 16
"""Responses have between 16 and `response` tokens, the end token included."""


def make(folder: Path, shape: dict[str, Any]) -> None:
    """Write the model, its tokenizer and the pairs to `folder`, and what was made, for the report, to `work.json`.

    Args:
        shape: vocabulary, hidden, layers, heads, intermediate, seed (the model); prompt, response, pairs, batches
            (the data: `batches` lists of `pairs` pairs, one for each optimiser step).
    """
    parameters = _make_model(folder / "model", shape)
    batches = _make_batches(shape)
    (folder / "pairs.json").write_text(json.dumps(batches))
    responses = [len(ids) for batch in batches for pair in batch for ids in (pair["chosen"], pair["rejected"])]
    made = {"parameters": parameters, "mean_response": sum(responses) / len(responses)}
    (folder / "work.json").write_text(json.dumps(made))


def text_of(ids: list[int]) -> str:
    """Text that the tokenizer turns into exactly these ids. An end token is left out: TRL adds its own."""
    return "".join(f"t{i} " for i in ids if i != END)


def _make_model(folder: Path, shape: dict[str, Any]) -> int:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    size = shape["vocabulary"]
    words = {word: i for i, word in enumerate(SPECIAL)} | {f"t{i}": i for i in range(len(SPECIAL), size)}
    words_only = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=words_only, **names).save_pretrained(folder)

    torch.manual_seed(shape["seed"])
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        max_position_embeddings=2048,
        bos_token_id=SPECIAL.index("<s>"),
        eos_token_id=END,
        pad_token_id=SPECIAL.index("<pad>"),
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def _make_batches(shape: dict[str, Any]) -> list[list[dict[str, list[int]]]]:
    rng = random.Random(shape["seed"])

    def ids(count: int) -> list[int]:
        return [rng.randrange(len(SPECIAL), shape["vocabulary"]) for _ in range(count)]

    def response() -> list[int]:
        return [*ids(rng.randint(min(SHORTEST, shape["response"]), shape["response"]) - 1), END]

    return [
        [{"prompt": ids(shape["prompt"]), "chosen": response(), "rejected": response()} for _ in range(shape["pairs"])]
        for _ in range(shape["batches"])
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("shape", type=json.loads)
    arguments = parser.parse_args()
    make(arguments.folder, arguments.shape)
