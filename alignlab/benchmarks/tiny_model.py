"""The base models that benchmarks make for themselves: tiny Llamas, trained once and kept in a cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor

from alignlab.core.errors import AlignlabError
from alignlab.core.files import sync_below
from alignlab.core.settings import Settings

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


class TinyModelSettings(Settings):
    """The model's shape and how long it is trained."""

    layers: int = Field(2, ge=1)
    width: int = Field(64, ge=32, multiple_of=32)  # attention heads are 32 wide
    steps: int = Field(400, ge=1)
    batch_size: int = Field(384, ge=1)
    learning_rate: float = Field(3e-3, gt=0)
    seed: int = Field(0, ge=0)


def model_folder(name: str, settings: Any, code: Sequence[str], cache: Path | None = None) -> Path:
    """Where a model is kept, made or not. Its name ends in a hash of the settings and of the code that makes it, so
    that a change of either makes a new one.

    Args:
        settings: all that decides what the model becomes; JSON.
        code: the files that do.
        cache: `ALIGNLAB_CACHE` or `~/.cache/alignlab` where None.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for file in (*code, __file__):
        digest.update(Path(file).read_bytes())
    cache = cache or Path(os.environ.get("ALIGNLAB_CACHE") or "~/.cache/alignlab").expanduser()
    return cache / f"{name}-{digest.hexdigest()[:16]}"


def make_once(folder: Path, make: Callable[[], tuple[LlamaForCausalLM, PreTrainedTokenizerFast]]) -> Path:
    """The folder of a model and its tokenizer, made where it is not there, as plain `transformers` loads them.

    It appears whole or not at all: processes that ask at the same time may each make it, the first to finish wins,
    and all are given the same folder.

    Raises:
        AlignlabError: the cache cannot be written.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
    except OSError as error:
        where = f"{folder.parent}: {error.strerror}"
        raise AlignlabError(f"{where}; set ALIGNLAB_CACHE to a folder that can be written") from error
    try:
        for part in make():
            part.save_pretrained(unfinished)
        sync_below(unfinished)
        unfinished.chmod(0o755)  # mkdtemp's folder is its owner's alone
        try:
            unfinished.rename(folder)
        except OSError:  # not empty: another process was first
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def train_llama(
    settings: TinyModelSettings,
    loss: Callable[[LlamaForCausalLM], Tensor],
    label: str,
    vocabulary: int,
    end_id: int,
    max_new_tokens: int,
) -> LlamaForCausalLM:
    """A Llama trained on one core of the CPU, in float32. The same settings give the same weights, whatever the state
    of the random generators, which is left as it was.

    Args:
        loss: of the next batch.
        label: of the progress bar.
        vocabulary: number of tokens.
        end_id: the end token, which pads too.
        max_new_tokens: saved as what `generate` samples by default.
    """
    from rich.progress import track

    with _reproducible(settings.seed):
        network = _new_llama(settings, vocabulary, end_id, max_new_tokens)
        optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1
        )
        for _ in track(range(settings.steps), description=label, transient=True):
            value = loss(network)
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return network.eval()


def _new_llama(settings: TinyModelSettings, vocabulary: int, end_id: int, max_new_tokens: int) -> LlamaForCausalLM:
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=settings.width,
        intermediate_size=2 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.width // 32,
        num_key_value_heads=settings.width // 32,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=end_id,
        # The end token pads, but is not declared so here: the embedding of a declared padding token is zero for ever,
        # and a reward model reads the end token.
        pad_token_id=None,
    )
    network = LlamaForCausalLM(config)
    network.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=end_id, pad_token_id=end_id, max_new_tokens=max_new_tokens
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
