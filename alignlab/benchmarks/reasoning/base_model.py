"""The base model: a tiny Llama that imitates the teacher, made on first use and kept in a cache."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from alignlab.benchmarks.reasoning import problems
from alignlab.benchmarks.reasoning.problems import END, SEPARATOR, VOCABULARY, Teacher
from alignlab.benchmarks.tiny_model import TinyModelSettings, make_once, model_folder, train_llama

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

IGNORED = -100


class BaseModelSettings(TinyModelSettings):
    """The base model's shape and how long it is trained."""

    steps: int = Field(800, ge=1)
    batch_size: int = Field(96, ge=1)


def base_model(teacher: Teacher, settings: BaseModelSettings | None = None, cache: Path | None = None) -> Path:
    """The folder of the base model and its tokenizer, as plain `transformers` loads them; made where it is not there.

    Raises:
        AlignlabError: the cache cannot be written.
    """
    settings = settings or BaseModelSettings()
    folder = base_folder(teacher, settings, cache)
    return make_once(folder, lambda: (pretrain(teacher, settings), problems.tokenizer()))


def base_folder(teacher: Teacher, settings: BaseModelSettings, cache: Path | None = None) -> Path:
    """Where `base_model` keeps the model, made or not."""
    decides = [teacher.settings.model_dump(), settings.model_dump()]
    return model_folder("reasoning-base", decides, [str(problems.__file__), __file__], cache)


def pretrain(teacher: Teacher, settings: BaseModelSettings) -> LlamaForCausalLM:
    """A Llama trained on fresh solutions of the teacher at every step; see `train_llama`."""
    rng = random.Random(f"pretraining {settings.seed}")

    def loss(network: LlamaForCausalLM) -> Tensor:
        ids, target = _batch(teacher, settings.batch_size, rng)
        logits = network(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten(), ignore_index=IGNORED)

    label, end = "Making the reasoning benchmark's base model", VOCABULARY.index(END)
    return train_llama(settings, loss, label, len(VOCABULARY), end, max_new_tokens=64)


def _batch(teacher: Teacher, size: int, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Problems with solutions as rows of tokens, and what is learned of them: the solutions."""
    number = {character: i for i, character in enumerate(VOCABULARY)}
    rows, targets = [], []
    for _ in range(size):
        prompt = teacher.problem(rng)
        row = [number[c] for c in prompt + SEPARATOR.join(teacher.solve(prompt, rng))] + [number[END]]
        rows.append(row)
        targets.append([IGNORED] * len(prompt) + row[len(prompt) :])
    length = max(map(len, rows))
    ids = [row + [number[END]] * (length - len(row)) for row in rows]
    return torch.tensor(ids), torch.tensor([row + [IGNORED] * (length - len(row)) for row in targets])
