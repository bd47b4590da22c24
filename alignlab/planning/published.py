"""QLoRA's published case beside the same planned here."""

from __future__ import annotations

from typing import Any

from alignlab.config import compose, resolve, section
from alignlab.planning.memory import GB
from alignlab.planning.settings import PlanSettings
from alignlab.planning.study import Study, Variant
from alignlab.training.run import check

FULL, QLORA = 780.0, 48.0
"""GB to fine-tune LLaMA 65B in 16 bits, "more than", and with QLoRA, "less than" (Dettmers et al. 2023,
arXiv:2305.14314, section 1). 780 GB are 12 bytes a parameter: 2 for the weight, 2 for its gradient, 8 for Adam."""

WORDS = [
    *("model=llama-65b", "model.dtype=bfloat16", "model.gradient_checkpointing=true", "adapter=lora", "adapter.r=64"),
    *("quantization=nf4", "quantization.compute_dtype=bfloat16", "optimizer=paged_adamw", "data=demonstrations"),
    *("training.max_tokens_per_microbatch=512", "prompt_tokens=256", "response_tokens=256"),
]
"""Their setting (appendix B): adapters of rank 64 on all linear maps, double quantisation, paged AdamW in 32 bits,
activations recomputed; one sequence of 512 tokens at a time."""


def published_case() -> dict[str, Any]:
    """Both, in GB, published and as estimated here."""
    config = resolve(compose("plan", WORDS))
    settings = section(PlanSettings, {k: config[k] for k in PlanSettings.model_fields}, "")
    study = Study(check(config), config["optimizer"], settings, on_cpu=False)
    whole = study.needs(Variant("none", "none", True)).inventory
    memory = study.memory(study.asked, "single", 1)
    return {
        "full_published_gb": FULL,
        "full_gb": (whole.trained_weights + whole.gradients + 8 * whole.trained) / GB,
        "qlora_published_gb": QLORA,
        "qlora_gb": memory.total / GB,
        "paged_gb": memory.paged / GB,
    }
