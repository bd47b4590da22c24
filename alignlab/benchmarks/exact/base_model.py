"""The base model: a tiny Llama trained on sentences of the language, made on first use and kept in a cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from alignlab.benchmarks.exact import enumeration, language, process
from alignlab.benchmarks.exact.language import ExactWorld
from alignlab.benchmarks.tiny_model import TinyModelSettings, make_once, model_folder, train_llama

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


class BaseModelSettings(TinyModelSettings):
    """The base model's shape and how long it is trained."""


def base_model(world: ExactWorld, settings: BaseModelSettings | None = None, cache: Path | None = None) -> Path:
    """The folder of the base model and its tokenizer, as plain `transformers` loads them; made where it is not there.

    Args:
        cache: where it is kept; see `model_folder`.

    Raises:
        AlignlabError: the cache cannot be written.
    """
    settings = settings or BaseModelSettings()
    folder = base_folder(world, settings, cache)
    return make_once(folder, lambda: (pretrain(world, settings), world.tokenizer()))


def base_folder(world: ExactWorld, settings: BaseModelSettings, cache: Path | None = None) -> Path:
    """Where `base_model` keeps the model, made or not."""
    code = [str(module.__file__) for module in (language, process, enumeration)]
    return model_folder("exact-base", [world.settings.model_dump(), settings.model_dump()], [*code, __file__], cache)


def pretrain(world: ExactWorld, settings: BaseModelSettings) -> LlamaForCausalLM:
    """A Llama trained to continue the prompts with sentences of the process; see `train_llama`.

    Each step draws fresh sentences, so the loss tends to the entropy of the process. All of them end with the end
    token, those of L words too.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    logp_XY = process.process_log_probs(world)
    end_Y1 = torch.full((world.Y, 1), world.end_id)
    tokens_YL = torch.cat([world.words_YL, end_Y1], dim=1)
    ignored_YL = torch.arange(world.L + 1) > world.length_Y[:, None]  # after the first end token
    target_YL = tokens_YL.masked_fill(ignored_YL, -100)
    prompt_XP = torch.tensor(world.prompt_ids)
    prompt_N = torch.arange(settings.batch_size) % world.X

    def loss(network: LlamaForCausalLM) -> Tensor:
        y_N = process.sample(logp_XY, prompt_N, generator)
        rows = torch.cat([prompt_XP[prompt_N], tokens_YL[y_N]], dim=1)
        logits = network(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False).logits
        return cross_entropy(logits[:, -world.L - 2 : -1].flatten(0, 1), target_YL[y_N].flatten())

    label = "Making the exact benchmark's base model"
    return train_llama(settings, loss, label, world.V + 1, world.end_id, max_new_tokens=world.L)
