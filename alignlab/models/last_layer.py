"""The last layer's MLP at those positions alone that are read from it: what predicts a token, not the rest of prompts.

Earlier layers need every position, since later ones attend to them; nothing attends to what the last layer puts out.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from alignlab.models.attention import PLAN
from alignlab.models.grafting import graft

PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
"""What a layer consists of that is x + attention(norm(x)), then x + MLP(norm(x)), unless the probe finds otherwise."""


class NarrowLayer(nn.Module):
    """For `graft`: a decoder layer that goes on with the positions that its attention plan wants, if it wants some."""

    def forward(self, hidden_states: Tensor, *arguments: Any, **options: Any) -> Any:
        wanted: Tensor | None = getattr(options.get(PLAN), "wanted", None)
        if wanted is None or arguments:
            return super().forward(hidden_states, *arguments, **options)
        layer: Any = self
        handle = layer.self_attn.o_proj.register_forward_pre_hook(lambda _, given: (given[0].index_select(1, wanted),))
        try:
            attended = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **options)[0]
        finally:
            handle.remove()
        hidden_states = hidden_states.index_select(1, wanted) + attended
        return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))


def narrow_last_layer(decoder: Any) -> bool:
    """Let a decoder's last layer take plans that want some positions only; False where it is of another make."""
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return False
    last = layers[-1]
    if isinstance(last, NarrowLayer):
        return True
    if {name for name, _ in last.named_children()} != PARTS or not hasattr(last.self_attn, "o_proj"):
        return False
    graft(last, NarrowLayer)
    return True
