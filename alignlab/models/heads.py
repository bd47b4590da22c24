"""Heads beside the model's own: the critic's values on a policy, the language head on a score model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from alignlab.core import ConfigError
from alignlab.models.adapters import copy_adapter
from alignlab.models.files import WEIGHTS, check_fit, loading
from alignlab.models.packed_model import CRITIC, PackedModel
from alignlab.models.quantization import plain_copy

VALUE_HEAD = "value_head.safetensors"
"""In a model's folder: `weight` (1, D) and `bias` (1,) of the value head. A critic of its own is beside it, in
`critic/`: an adapter, or the decoder that the head stands on."""


def add_value_head(model: PackedModel, critic: Literal["shared", "own"] = "shared", seed: int = 0) -> None:
    """Give a policy a value head: a linear map from the hidden state that predicts a token to what is to come.

    Weights are drawn with standard deviation 1/√(D+1), the bias is 0 (Stiennon et al. 2020; Huang et al. 2024,
    arXiv:2403.17031, detail 6), unless the model comes from a folder with a trained head.

    Args:
        critic: "shared": the head reads the policy's own hidden states, and its gradient goes into the trunk that
            both share; "own": the trunk with an adapter of the critic's own, where the policy has an adapter, else a
            copy of the decoder.
    """
    if model.kind != "policy":
        raise ConfigError(f"a value head stands on a language model, this is a {model.kind} model")
    if critic == "own" and hasattr(model.network, "peft_config"):
        if any(getattr(m, "gradient_checkpointing", False) for m in model.base.modules()):
            raise ConfigError(
                "model.gradient_checkpointing: recomputing would use the policy's adapter for the critic: "
                "use algorithm.critic=shared with it"
            )
        copy_adapter(model.network, CRITIC, trained=True)
    elif critic == "own":
        model.critic_decoder = copy.deepcopy(model.decoder)
    size = int(model.config.hidden_size)
    head = nn.Linear(size, 1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(torch.randn((1, size), generator=generator) / (size + 1) ** 0.5)
        head.bias.zero_()
    model.value_head = head.to(model.device)
    model.critic = critic
    _load_value_head(model, Path(str(model.source)))


def save_value_head(model: PackedModel, folder: Path, merge: bool = False) -> None:
    """Write the value head, and a critic of its own, to a model's folder; folded into its base too where the policy
    is, whose own base it then no longer stands on."""
    if model.value_head is None:
        return
    save_file({n: p.detach().cpu().contiguous() for n, p in model.value_head.named_parameters()}, folder / VALUE_HEAD)
    if model.critic_decoder is not None:
        model.critic_decoder.save_pretrained(folder / CRITIC)
    elif model.critic == "own" and merge:
        network = plain_copy(model.network)
        network.set_adapter(CRITIC)
        network.merge_and_unload(adapter_names=[CRITIC]).get_decoder().save_pretrained(folder / CRITIC)
    elif model.critic == "own":
        model.network.save_pretrained(folder, selected_adapters=[CRITIC])


def _load_value_head(model: PackedModel, folder: Path) -> None:
    """Go on with the critic that a run of ours left in `folder`, where it is of the same make."""
    if not (folder / VALUE_HEAD).exists() or (model.critic == "own") != (folder / CRITIC).is_dir():
        return
    head = model.value_head
    with loading(str(folder), f"its {VALUE_HEAD} cannot be read"):
        found = load_file(folder / VALUE_HEAD)
    shapes = {n: t.shape for n, t in found.items()}
    if head is None or shapes != {n: p.shape for n, p in head.named_parameters()}:
        raise ConfigError(f"model.path={str(folder)!r}: its {VALUE_HEAD} is not of this model's size")
    if model.critic == "own" and (folder / CRITIC / "adapter_config.json").exists() == (
        model.critic_decoder is not None
    ):
        found_as, wanted = ("a decoder", "none") if model.critic_decoder is None else ("an adapter", "lora")
        raise ConfigError(
            f"model.path={str(folder)!r}: its critic is {found_as}: train it further with adapter={wanted}"
        )
    head.load_state_dict(found)
    with loading(str(folder), "its critic cannot be loaded"):
        if model.critic_decoder is not None:
            model.critic_decoder.load_state_dict(load_file(folder / CRITIC / WEIGHTS))
        elif model.critic == "own":
            from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

            weights = load_peft_weights(str(folder / CRITIC))
            ours = get_peft_model_state_dict(model.network, adapter_name=CRITIC)
            check_fit(
                str(folder), "a critic for this model", ours.keys() - weights.keys(), weights.keys() - ours.keys()
            )
            set_peft_model_state_dict(model.network, weights, adapter_name=CRITIC)


def add_language_head(model: PackedModel, causal: Any) -> None:
    """Keep the language head of `causal`, the language model that a score model was made from, beside its score head.

    It is held fixed and not saved: what it says of the trunk is a term of the loss (`reads` "logp").
    """
    head = copy.deepcopy(causal.get_output_embeddings()).requires_grad_(False)
    model.language_head = head.to(model.device)
