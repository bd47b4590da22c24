"""What makes the one forward pass fast; each can be turned off, and none changes a result beyond rounding."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Features:
    """Ways of computing the same numbers.

    Attributes:
        segments: attention goes over the segments of a row without padding, instead of through a mask of all pairs.
        eager_grad: the gradient of log-probs with respect to hidden states is made in the forward pass, while the
            logits are there, instead of from logits computed anew.
        fused_lora: a LoRA layer multiplies by base and adapter at once.
        narrow_last: the last layer's MLP is computed only where it is read; on where the probe finds it exact.
        fused_norms: an RMSNorm layer is one function with a gradient of its own, in float32 on CPUs.
    """

    segments: bool = True
    eager_grad: bool = True
    fused_lora: bool = True
    narrow_last: bool = False
    fused_norms: bool = True
