"""`model.generate` with the study's policy: a PEFT model with the adapter of the other side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

from measuring.gauge import own_weights
from measuring.work import END, LORA, PAD, Scale, model_folder, set_trained


def policy(scale: Scale, merged: bool = False) -> Any:
    """With its adapter beside the base, as a trainer holds it, or merged into it."""
    network = AutoModelForCausalLM.from_pretrained(
        str(model_folder(scale.folder, scale.model, scale.dtype)), dtype=scale.dtype
    ).to(scale.device)
    config = LoraConfig(task_type="CAUSAL_LM", r=LORA["r"], lora_alpha=LORA["alpha"], target_modules="all-linear")
    network = get_peft_model(network, config).eval()
    set_trained(network)
    network = network.merge_and_unload() if merged else network
    own_weights(network)
    return network


class Ends(LogitsProcessor):
    """Row i ends with token number `lengths[i]`, and not before."""

    def __init__(self, prompt: int, lengths: Sequence[int], device: str) -> None:
        self.prompt = prompt
        self.lengths = torch.tensor(list(lengths), device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ends = self.lengths == input_ids.shape[1] - self.prompt + 1
        scores[:, END] = -torch.inf
        if ends.any():
            scores[ends] = -torch.inf
            scores[ends, END] = 0.0
        return scores


@torch.no_grad()
def sample(
    network: Any, prompts: Sequence[Sequence[int]], new: int, ends: Sequence[int] | None = None, **options: Any
) -> list[list[int]]:
    """New tokens for prompts of equal length, at temperature 1 without filters; exactly `new`, or as `ends` says."""
    ids = torch.tensor([list(p) for p in prompts], device=network.device)
    length = ids.shape[1]
    processors = LogitsProcessorList([Ends(length, ends, network.device)] if ends is not None else [])
    drawn = network.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new,
        eos_token_id=END if ends is not None else None,
        pad_token_id=PAD,
        logits_processor=processors,
        **options,
    )[:, length:].tolist()
    if ends is None:
        return [list(row) for row in drawn]
    return [row[: row.index(END) + 1] for row in drawn]
