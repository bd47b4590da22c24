"""TRL's PPO, for the environment that `make peers-ppo` makes: the last release that has it.

    python -m measuring.trl_ppo WORK RESULT

WORK is JSON with the fields of a `Scale` and `gradient_checkpointing`. Policy and value model have a LoRA each and a
base each, as `PPOTrainer` wants it; the reference is the policy without its adapter; the reward is that of the last
token. No response ends early, so that both sides sample and train on equally many tokens.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

from measuring.gauge import Gauge, own_weights
from measuring.work import LEARNING_RATE, LORA, PAD, Shape, Words, model_folder, set_trained


class LastToken(nn.Module):
    """A reward model that gives the last token's number, as a part of the vocabulary's size."""

    base_model_prefix = "backbone"

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    def backbone(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(hidden_states=[input_ids.float().unsqueeze(-1) / self.vocabulary])

    def score(self, hidden: Tensor) -> Tensor:
        return hidden


class Clock(TrainerCallback):
    """Reads the gauge at the end of each iteration."""

    def __init__(self, gauge: Gauge) -> None:
        self.gauge = gauge

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        self.gauge.step()


def measure(work: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(work["threads"])
    shape, device, dtype = Shape(**work["model"]), work["device"], work["dtype"]
    prompts, prompt, new, epochs = work["ppo"]
    folder = str(model_folder(work["folder"], shape, dtype))
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    value = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=dtype)
    value.model.requires_grad_(False)
    lora: dict[str, Any] = {"r": LORA["r"], "lora_alpha": LORA["alpha"], "target_modules": "all-linear"}
    names = [n for n, m in value.model.named_modules() if isinstance(m, nn.Linear)]
    inject_adapter_in_model(LoraConfig(**(lora | {"target_modules": names})), value.model)
    words = Words(shape.vocabulary, seed=7)
    gauge = Gauge(device)
    part = min(8, prompts)
    with tempfile.TemporaryDirectory() as out:
        config = PPOConfig(
            output_dir=out,
            per_device_train_batch_size=part,
            gradient_accumulation_steps=prompts // part,
            num_mini_batches=1,
            num_ppo_epochs=epochs,
            local_rollout_forward_batch_size=min(32, prompts),
            total_episodes=prompts,
            response_length=new,
            temperature=1.0,
            stop_token=None,
            num_sample_generations=0,
            gradient_checkpointing=work["gradient_checkpointing"],
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            bf16=dtype == "bfloat16",
            use_cpu=device == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=policy,
            ref_model=None,
            reward_model=LastToken(shape.vocabulary),
            value_model=value,
            train_dataset=Dataset.from_list([{"input_ids": words.ids(prompt)} for _ in range(prompts)]),
            eval_dataset=Dataset.from_list([{"input_ids": words.ids(prompt)} for _ in range(2)]),
            peft_config=LoraConfig(task_type="CAUSAL_LM", **lora),
        )
        set_trained(trainer.model.policy)
        own_weights(trainer.model)
        ids = torch.full((2, prompt), PAD + 1, device=trainer.model.policy.device)
        trainer.model.policy.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
        trainer.add_callback(Clock(gauge))
        gauge.loaded()
        gauge.start()
        trainer.train()
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return gauge.result(tokens=prompts * (prompt + new), trained=trained)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(measure(json.loads(Path(sys.argv[1]).read_text()))))
