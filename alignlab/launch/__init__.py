"""Processes: what starts them, and what libraries may say in them."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path


def quiet() -> None:
    """Keep libraries from talking about what is no news. Nothing that a user has set is changed."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/kfd").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it looked and found nothing
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Of functions that DeepSpeed, PEFT, Accelerate and PyTorch itself call, or that older versions need.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    for name in ("is_gradient_checkpointing", "gradient_checkpointing_enable", "broadcast_buffers"):
        warnings.filterwarnings("ignore", f"`{name}` is deprecated", FutureWarning)
    # Nobody changes a model's outputs in place here.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor", UserWarning)
