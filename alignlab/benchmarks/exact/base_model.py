"""The base model: a tiny Llama pretrained on sentences of the language, made on first use and kept in a cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from alignlab.benchmarks.exact import enumeration, language, process
from alignlab.benchmarks.exact.language import ExactWorld
from alignlab.core.errors import AlignlabError
from alignlab.core.settings import Settings

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


class BaseModelSettings(Settings):
    """The base model's shape and how long it is pretrained."""

    layers: int = Field(2, ge=1)
    width: int = Field(64, ge=32, multiple_of=32)  # attention heads are 32 wide
    steps: int = Field(400, ge=1)
    batch_size: int = Field(384, ge=1)
    learning_rate: float = Field(3e-3, gt=0)
    seed: int = Field(0, ge=0)


def base_model(world: ExactWorld, settings: BaseModelSettings | None = None, cache: Path | None = None) -> Path:
    """The folder of the base model and its tokenizer, as plain `transformers` loads them; made where it is not there.

    The folder's name is a hash of both settings and of the code that makes the model, so a change of either makes a
    new one. It appears whole or not at all: processes that ask at the same time may each make it, the first to finish
    wins, and all are given the same folder.

    Args:
        world: the language.
        settings: the model.
        cache: where it is kept; `cache_folder()` where None.

    Raises:
        AlignlabError: the cache cannot be written.
    """
    settings = settings or BaseModelSettings()
    folder = base_folder(world, settings, cache)
    cache = folder.parent
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=cache))
    except OSError as error:
        raise AlignlabError(f"{cache}: {error.strerror}; set ALIGNLAB_CACHE to a folder that can be written") from error
    try:
        pretrain(world, settings).save_pretrained(unfinished)
        world.tokenizer().save_pretrained(unfinished)
        unfinished.chmod(0o755)  # mkdtemp's folder is its owner's alone
        try:
            unfinished.rename(folder)
        except OSError:  # not empty: another process was first
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def base_folder(world: ExactWorld, settings: BaseModelSettings, cache: Path | None = None) -> Path:
    """Where `base_model` keeps the model, made or not."""
    return (cache or cache_folder()) / f"exact-base-{_fingerprint(world, settings)}"


def cache_folder() -> Path:
    """Where made things are kept: `ALIGNLAB_CACHE`, or `~/.cache/alignlab`."""
    return Path(os.environ.get("ALIGNLAB_CACHE") or "~/.cache/alignlab").expanduser()


def pretrain(world: ExactWorld, settings: BaseModelSettings) -> LlamaForCausalLM:
    """A Llama trained to continue the prompts with sentences of the process, on one core of the CPU, in float32.

    Each step draws fresh sentences, so the loss tends to the entropy of the process. All of them end with the end
    token, those of L words too. The same settings give the same weights, whatever the state of the random generators.
    """
    from rich.progress import track

    generator = torch.Generator().manual_seed(settings.seed)
    logp_XY = process.process_log_probs(world)
    end_Y1 = torch.full((world.Y, 1), world.end_id)
    tokens_YL = torch.cat([world.words_YL, end_Y1], dim=1)
    ignored_YL = torch.arange(world.L + 1) > world.length_Y[:, None]  # after the first end token
    target_YL = tokens_YL.masked_fill(ignored_YL, -100)
    prompt_XP = torch.tensor(world.prompt_ids)

    with _reproducible(settings.seed):
        network = _new_model(world, settings)
        optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1
        )
        for _ in track(range(settings.steps), description="Making the exact benchmark's base model", transient=True):
            prompt_N = torch.arange(settings.batch_size) % world.X
            y_N = process.sample(logp_XY, prompt_N, generator)
            rows = torch.cat([prompt_XP[prompt_N], tokens_YL[y_N]], dim=1)
            logits = network(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False).logits
            _step(network, optimizer, logits[:, -world.L - 2 : -1], target_YL[y_N])
            schedule.step()
    return network.eval()


def _step(network: LlamaForCausalLM, optimizer: torch.optim.Optimizer, logits: Tensor, target: Tensor) -> None:
    loss = cross_entropy(logits.flatten(0, 1), target.flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()


def _new_model(world: ExactWorld, settings: BaseModelSettings) -> LlamaForCausalLM:
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=world.V + 1,
        hidden_size=settings.width,
        intermediate_size=2 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.width // 32,
        num_key_value_heads=settings.width // 32,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=world.end_id,
        # The end token pads, but is not declared so here: the embedding of a declared padding token is zero for ever,
        # and a reward model reads the end token.
        pad_token_id=None,
    )
    network = LlamaForCausalLM(config)
    network.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=world.end_id, pad_token_id=world.end_id, max_new_tokens=world.L
    )
    return network


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Seeded, on one thread (sums depend on how many share them); afterwards all is as it was."""
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            torch.set_num_threads(1)
            yield
    finally:
        torch.set_num_threads(threads)


def _fingerprint(world: ExactWorld, settings: BaseModelSettings) -> str:
    """Hash of the settings and of the files that define the language, the process and this recipe, 16 hex digits."""
    content = json.dumps([world.settings.model_dump(), settings.model_dump()], sort_keys=True).encode()
    files = [language.__file__, process.__file__, enumeration.__file__, __file__]
    digest = hashlib.sha256(content)
    for file in files:
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()[:16]
