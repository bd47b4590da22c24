"""TRL's side: its trainers with a LoRA config, run by their own `train()`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)

from measuring.gauge import Gauge, own_weights
from measuring.ours import reward
from measuring.work import (
    BETA,
    LEARNING_RATE,
    LORA,
    Pair,
    Scale,
    group_batches,
    model_folder,
    pair_batches,
    set_trained,
    text_of,
)

Options = Mapping[str, Any]
"""`config`: fields of the trainer's config other than its defaults; `one_by_one`: gradients accumulated over examples
that are read one at a time."""


class Clock(TrainerCallback):
    """Reads the gauge at the end of each optimiser step; the loss is the mean over its micro-batches."""

    def __init__(self, gauge: Gauge, losses: list[float]) -> None:
        self.gauge, self.losses = gauge, losses

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        self.gauge.step(sum(self.losses) / len(self.losses))
        self.losses.clear()


def watched(trainer: type[Any]) -> type[Any]:
    """The trainer, keeping the losses of its micro-batches; passes of a reference before training are timed."""

    class Watched(trainer):  # type: ignore[misc]
        losses: list[float]
        reference_seconds = 0.0
        reference_cpu = 0.0
        gauge: Gauge

        def __init__(self, *arguments: Any, gauge: Gauge, **options: Any) -> None:
            self.losses, self.gauge = [], gauge
            super().__init__(*arguments, **options)

        def compute_loss(self, *arguments: Any, **options: Any) -> Any:
            found = super().compute_loss(*arguments, **options)
            loss = found[0] if isinstance(found, tuple) else found
            self.losses.append(float(loss.detach()))
            return found

        def compute_ref_log_probs(self, *arguments: Any, **options: Any) -> Any:
            self.gauge.loaded()
            start, cpu = time.perf_counter(), time.process_time()
            found = super().compute_ref_log_probs(*arguments, **options)
            self.reference_seconds += time.perf_counter() - start
            self.reference_cpu += time.process_time() - cpu
            return found

    return Watched


def config(scale: Scale, steps: int, size: int, options: Options) -> dict[str, Any]:
    """What all of TRL's configs have in common here."""
    one = bool(options.get("one_by_one"))
    return {
        "per_device_train_batch_size": 1 if one else size,
        "gradient_accumulation_steps": size if one else 1,
        "bf16": scale.dtype == "bfloat16",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_steps": steps,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": scale.device == "cpu",
    } | dict(options.get("config", {}))


def adapter(task: str = "CAUSAL_LM") -> LoraConfig:
    return LoraConfig(
        task_type=task,
        r=LORA["r"],
        lora_alpha=LORA["alpha"],
        target_modules="all-linear",
        exclude_modules=None if task == "CAUSAL_LM" else ["score"],
    )


def network(scale: Scale, classifier: bool = False) -> Any:
    folder = str(model_folder(scale.folder, scale.model, scale.dtype))
    if classifier:
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=scale.dtype)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=scale.dtype)


def tokenizer(scale: Scale) -> Any:
    return AutoTokenizer.from_pretrained(str(model_folder(scale.folder, scale.model, scale.dtype)))


def run(trainer: Any, gauge: Gauge, steps: int) -> dict[str, Any]:
    """Train, and what was measured; a reference's passes before training are spread over the steps."""
    set_trained(trainer.model)
    own_weights(trainer.model)
    gauge.loaded()
    trainer.add_callback(Clock(gauge, trainer.losses))
    trainer.train()
    found = gauge.result()
    for name, extra in (("seconds", trainer.reference_seconds), ("cpu_seconds", trainer.reference_cpu)):
        found[name] = [value + extra / steps for value in found[name]]
    return found


def texts(pairs: Sequence[Pair], names: Mapping[str, str]) -> Dataset:
    return Dataset.from_list([{theirs: text_of(pair[ours]) for ours, theirs in names.items()} for pair in pairs])


def check_ids(found: Sequence[Sequence[int]], meant: Sequence[Sequence[int]]) -> None:
    if [list(ids) for ids in found] != [list(ids) for ids in meant]:
        raise SystemExit("TRL's tokens are not the ones that were meant: the comparison would be void")


def dpo(scale: Scale, prompt: int, options: Options) -> dict[str, Any]:
    from trl import DPOConfig, DPOTrainer

    batches = pair_batches(scale, prompt)
    pairs = [pair for batch in batches for pair in batch]
    gauge = Gauge(scale.device)
    with tempfile.TemporaryDirectory() as out:
        settings = config(scale, len(batches), scale.pairs, options)
        trainer = watched(DPOTrainer)(
            network(scale),
            args=DPOConfig(output_dir=out, beta=BETA, max_length=None, **settings),
            train_dataset=texts(pairs, {name: name for name in ("prompt", "chosen", "rejected")}),
            processing_class=tokenizer(scale),
            peft_config=adapter(),
            gauge=gauge,
        )
        for name in ("prompt", "chosen", "rejected"):
            check_ids(trainer.train_dataset[f"{name}_ids"], [pair[name] for pair in pairs])
        return run(trainer, gauge, len(batches))


def reward_model(scale: Scale, prompt: int, options: Options) -> dict[str, Any]:
    from trl import RewardConfig, RewardTrainer

    batches = pair_batches(scale, prompt)
    pairs = [pair for batch in batches for pair in batch]
    gauge = Gauge(scale.device)
    with tempfile.TemporaryDirectory() as out:
        settings = config(scale, len(batches), scale.pairs, options)
        trainer = watched(RewardTrainer)(
            network(scale, classifier=True),
            args=RewardConfig(output_dir=out, max_length=None, **settings),
            train_dataset=texts(pairs, {name: name for name in ("prompt", "chosen", "rejected")}),
            processing_class=tokenizer(scale),
            peft_config=adapter("SEQ_CLS"),
            gauge=gauge,
        )
        for name in ("chosen", "rejected"):
            check_ids(trainer.train_dataset[f"{name}_ids"], [pair["prompt"] + pair[name] for pair in pairs])
        return run(trainer, gauge, len(batches))


def sft(scale: Scale, prompt: int, options: Options) -> dict[str, Any]:
    from trl import SFTConfig, SFTTrainer

    batches = pair_batches(scale, prompt)
    pairs = [pair for batch in batches for pair in batch]
    gauge = Gauge(scale.device)
    with tempfile.TemporaryDirectory() as out:
        settings = config(scale, len(batches), scale.pairs, options)
        trainer = watched(SFTTrainer)(
            network(scale),
            args=SFTConfig(output_dir=out, completion_only_loss=True, **({"max_length": None} | settings)),
            train_dataset=texts(pairs, {"prompt": "prompt", "chosen": "completion"}),
            processing_class=tokenizer(scale),
            peft_config=adapter(),
            gauge=gauge,
        )
        if not settings.get("packing"):
            check_ids(trainer.train_dataset["input_ids"], [pair["prompt"] + pair["chosen"] for pair in pairs])
        return run(trainer, gauge, len(batches))


def grpo(scale: Scale, options: Options, kl_coef: float) -> dict[str, Any]:
    """The update alone: the completions are given, where TRL would sample them."""
    from trl import GRPOConfig, GRPOTrainer

    batches = group_batches(scale)
    entries = [entry for batch in batches for entry in batch]
    by_prompt = {text_of(e["prompt"]): [ids for name, ids in e.items() if name != "prompt"] for e in entries}
    rewards = {
        text_of(ids).strip(): reward(k)
        for entry in entries
        for k, ids in enumerate(ids for name, ids in entry.items() if name != "prompt")
    }
    responses, words = scale.group[0], tokenizer(scale)
    gauge = Gauge(scale.device)
    drawn: dict[str, int] = {}

    def given(prompts: list[str], trainer: Any) -> dict[str, Any]:
        """The k-th time that a prompt is asked for, its k-th response."""
        ids = []
        for prompt in prompts:
            ids.append(by_prompt[prompt][drawn.get(prompt, 0) % responses])
            drawn[prompt] = drawn.get(prompt, 0) + 1
        return {
            "prompt_ids": [words(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": ids,
            "logprobs": None,
        }

    def score(completions: list[str], **columns: Any) -> list[float]:
        return [rewards[text.strip()] for text in completions]

    with tempfile.TemporaryDirectory() as out:
        settings = config(scale, len(batches), responses, options)
        trainer = watched(GRPOTrainer)(
            model=network(scale),
            reward_funcs=score,
            rollout_func=given,
            args=GRPOConfig(
                output_dir=out,
                num_generations=responses,
                max_completion_length=scale.group[2],
                beta=kl_coef,
                loss_type="grpo",
                epsilon=0.2,
                temperature=1.0,
                shuffle_dataset=False,
                **{k: v for k, v in settings.items() if k != "train_sampling_strategy"},
            ),
            train_dataset=Dataset.from_list([{"prompt": text_of(entry["prompt"])} for entry in entries]),
            processing_class=tokenizer(scale),
            peft_config=adapter(),
            gauge=gauge,
        )
        return run(trainer, gauge, len(batches))
