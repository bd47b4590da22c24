"""Saving what was trained so that plain transformers and peft load it, heads included."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch

from alignlab.models.heads import save_value_head
from alignlab.models.packed_model import PackedModel


def save_model(
    model: PackedModel, folder: Path, *, merge: bool = False, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Write the model and its tokenizer to `folder`, atomically: a full model, or a PEFT adapter.

    Args:
        merge: fold the adapter into its base and write a full model.
        state: the network's weights where they are not in the model itself (sharded training).
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    network: Any = model.network
    is_adapter = hasattr(network, "peft_config")
    options: dict[str, Any] = {} if state is None else {"state_dict": state}
    if is_adapter and merge:
        _merged(network, state).save_pretrained(temporary)
    elif is_adapter:
        network.save_pretrained(temporary, selected_adapters=["default"], **options)
    else:
        network.save_pretrained(temporary, **options)
    save_value_head(model, temporary, merge)
    model.tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _merged(network: Any, state: dict[str, torch.Tensor] | None) -> Any:
    """A copy of the base with the adapter's weights added; the model being trained is left as it is."""
    network = copy.deepcopy(network)
    if state is not None:
        network.load_state_dict(state)
    return network.merge_and_unload()
