"""Saving what was trained so that plain transformers and peft load it, heads included."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from alignlab.core import Group
from alignlab.core.files import replacing, write_json
from alignlab.models.heads import save_value_head
from alignlab.models.packed_model import PackedModel
from alignlab.models.precision import as_loaded
from alignlab.models.private_api import spare_deepspeed
from alignlab.models.probe import random_groups
from alignlab.models.quantization import name_of, plain_copy, quantization_of, save_quantization

MERGE = "merge.json"
"""In the folder of a model that was merged into a dequantised base, or one in half precision: how far it is from the
one that was trained."""

ROUNDED = (
    ": {dtype} rounds away most of a small adapter; save the adapter (training.save_model=adapter, merge=false), or "
    "load the base with model.dtype=float32, to keep all of it"
)

WIDENED = (
    "saved in {now}, though the model it was trained from is in {before}: model.dtype=auto is float32 on a CPU; "
    "model.dtype={before} keeps it"
)

READS = {"policy": "logp", "score": "score", "step": "step"}


def save_model(
    model: PackedModel,
    folder: Path,
    *,
    merge: bool = False,
    texts: Sequence[Group] = (),
) -> list[str]:
    """Write the model and its tokenizer to `folder`, whole or not at all: a full model, or a PEFT adapter; weights in
    what they were loaded in, new ones in float32.

    Args:
        merge: fold the adapter into its base, dequantised where it is quantised, and write a full model.
        texts: what a model merged into a dequantised base, or one in half precision, is compared on with the one that
            was trained; random tokens where there are none.

    Returns:
        What the log should say of it.

    Raises:
        StorageError: the disk is full, over quota, read-only…; what was there before is unchanged.
    """
    network: Any = model.network
    is_adapter = hasattr(network, "peft_config")
    notes: list[str] = []
    with replacing(folder) as temporary, as_loaded(model):
        before, now = str(getattr(model.base.config, "dtype", None)).removeprefix("torch."), model.base.dtype
        if before in ("bfloat16", "float16") and now.itemsize > 2 and (merge or not is_adapter):
            notes.append(WIDENED.format(now=str(now).removeprefix("torch."), before=before))
        if is_adapter and merge:
            merged = plain_copy(network).merge_and_unload()  # the model being trained is left as it is
            with spare_deepspeed():
                merged.save_pretrained(temporary)
            quantization = quantization_of(network)
            half = merged.dtype.itemsize < 4
            if quantization is not None or half:
                held = "none" if quantization is None else name_of(quantization)
                dtype = str(merged.dtype).removeprefix("torch.")
                report = {"quantization": held, "dtype": dtype, **_difference(model, merged, texts)}
                write_json(temporary / MERGE, report)
                notes.append(
                    f"merged into the {dtype if quantization is None else f'dequantised {held}'} base: "
                    f"{report['compared']} differ by {report['mean_difference']:.2g} on average, "
                    f"{report['max_difference']:.2g} at most{ROUNDED.format(dtype=dtype) if half else ''}"
                )
        elif is_adapter:
            network.save_pretrained(temporary, selected_adapters=["default"])
            save_quantization(network, temporary)
        else:
            with spare_deepspeed():
                network.save_pretrained(temporary)
        save_value_head(model, temporary, merge)
        model.tokenizer.save_pretrained(temporary)
    return notes


def _difference(model: PackedModel, merged: Any, texts: Sequence[Group]) -> dict[str, Any]:
    """How far what the merged model says is from what the trained one does, on the same texts.

    They differ where the trained one computes products with its quantised base in a lower precision, or quantises
    their inputs too: the merged one does neither.
    """
    groups = list(texts) or random_groups(int(model.config.vocab_size), model.max_length)
    read = READS[model.kind]

    def says(network: Any) -> torch.Tensor:
        beside = PackedModel(network, model.tokenizer, model.kind)
        beside.compute_dtype = model.compute_dtype
        beside.layout, beside.whole_logits = model.layout, model.whole_logits
        return torch.cat([v.flatten() for v in beside.outputs(groups, (read,))[read]])

    difference = (says(model.network) - says(merged)).abs()
    return {
        "compared": {"logp": "log-probs", "score": "scores", "step": "step logits"}[read],
        "numbers": len(difference),
        "texts": sum(len(g.responses) for g in groups),
        "mean_difference": float(difference.mean()),
        "max_difference": float(difference.max()),
    }
