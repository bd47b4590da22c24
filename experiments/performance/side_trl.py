"""TRL's side: its `DPOTrainer` with a LoRA config, run by its own `train()`."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from side import BETA, LEARNING_RATE, LORA, Gauge, main, read_batches, set_adapter
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer
from workload import text_of


class Watched(DPOTrainer):
    """Keeps the losses; times reference passes that are made before training."""

    def __init__(self, *arguments: Any, gauge: Gauge, **options: Any) -> None:
        self.gauge = gauge
        self.micro_losses: list[float] = []
        self.reference_seconds = self.reference_cpu = 0.0
        super().__init__(*arguments, **options)

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        loss = super().compute_loss(*arguments, **options)
        self.micro_losses.append(float(loss.detach()))
        return loss

    def compute_ref_log_probs(self, *arguments: Any, **options: Any) -> Any:
        self.gauge.loaded()
        start, cpu = time.perf_counter(), time.process_time()
        found = super().compute_ref_log_probs(*arguments, **options)
        self.reference_seconds += time.perf_counter() - start
        self.reference_cpu += time.process_time() - cpu
        return found


class Clock(TrainerCallback):
    """Reads the gauge at the end of each optimiser step."""

    def __init__(self, trainer: Watched) -> None:
        self.trainer = trainer

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        losses = self.trainer.micro_losses
        self.trainer.gauge.step(sum(losses) / len(losses))
        losses.clear()


def measure(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Options: `config`, fields of DPOConfig other than its defaults; `one_by_one`, accumulate gradients over pairs."""
    batches = read_batches(folder)
    size = len(batches[0])
    pairs = [pair for batch in batches for pair in batch]
    gauge = Gauge()
    config = {
        "per_device_train_batch_size": 1 if options.get("one_by_one") else size,
        "gradient_accumulation_steps": size if options.get("one_by_one") else 1,
        "bf16": False,
        "beta": BETA,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_steps": len(batches),
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    with tempfile.TemporaryDirectory() as out:
        trainer = Watched(
            str(folder / "model"),
            args=DPOConfig(output_dir=out, **(config | options.get("config", {}))),
            train_dataset=Dataset.from_list([{name: text_of(ids) for name, ids in pair.items()} for pair in pairs]),
            peft_config=LoraConfig(
                task_type="CAUSAL_LM", r=int(LORA["r"]), lora_alpha=int(LORA["alpha"]), target_modules="all-linear"
            ),
            gauge=gauge,
        )
        columns = [trainer.train_dataset[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")]
        if [list(ids) for ids in zip(*columns, strict=True)] != [list(pair.values()) for pair in pairs]:
            raise SystemExit("TRL's tokens are not the ones that were meant: the comparison would be void")
        set_adapter(trainer.model)
        gauge.loaded()
        trainer.add_callback(Clock(trainer))
        trainer.train()
    steps = len(batches)
    return gauge.result(
        reference_seconds=trainer.reference_seconds / steps, reference_cpu_seconds=trainer.reference_cpu / steps
    )


if __name__ == "__main__":
    main(measure)
