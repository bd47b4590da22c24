"""The base model: a tiny Llama that imitates the teacher, made on first use and kept in a cache."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch.nn.functional import cross_entropy

from alignlab.benchmarks.exact.base_model import cache_folder
from alignlab.benchmarks.reasoning import problems
from alignlab.benchmarks.reasoning.problems import END, SEPARATOR, VOCABULARY, Teacher
from alignlab.core.errors import AlignlabError
from alignlab.core.settings import Settings

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

IGNORED = -100


class BaseModelSettings(Settings):
    """The base model's shape and how long it is pretrained."""

    layers: int = Field(2, ge=1)
    width: int = Field(64, ge=32, multiple_of=32)  # attention heads are 32 wide
    steps: int = Field(800, ge=1)
    batch_size: int = Field(96, ge=1)
    learning_rate: float = Field(3e-3, gt=0)
    seed: int = Field(0, ge=0)


def base_model(teacher: Teacher, settings: BaseModelSettings | None = None, cache: Path | None = None) -> Path:
    """The folder of the base model and its tokenizer, as plain `transformers` loads them; made where it is not there.

    As with the exact benchmark's: the name is a hash of the settings and of the code that makes it, and it appears
    whole or not at all, whoever else makes it at the same time.

    Raises:
        AlignlabError: the cache cannot be written.
    """
    settings = settings or BaseModelSettings()
    folder = base_folder(teacher, settings, cache)
    cache = folder.parent
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=cache))
    except OSError as error:
        raise AlignlabError(f"{cache}: {error.strerror}; set ALIGNLAB_CACHE to a folder that can be written") from error
    try:
        pretrain(teacher, settings).save_pretrained(unfinished)
        problems.tokenizer().save_pretrained(unfinished)
        unfinished.chmod(0o755)  # mkdtemp's folder is its owner's alone
        try:
            unfinished.rename(folder)
        except OSError:  # not empty: another process was first
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def base_folder(teacher: Teacher, settings: BaseModelSettings, cache: Path | None = None) -> Path:
    """Where `base_model` keeps the model, made or not."""
    content = json.dumps([teacher.settings.model_dump(), settings.model_dump()], sort_keys=True).encode()
    code = Path(problems.__file__).read_bytes() + Path(__file__).read_bytes()
    return (cache or cache_folder()) / f"reasoning-base-{hashlib.sha256(content + code).hexdigest()[:16]}"


def pretrain(teacher: Teacher, settings: BaseModelSettings) -> LlamaForCausalLM:
    """A Llama trained on fresh solutions of the teacher at every step, on one core of the CPU, in float32. The same
    settings give the same weights, whatever the state of the random generators."""
    from rich.progress import track

    rng = random.Random(f"pretraining {settings.seed}")
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            torch.set_num_threads(1)  # sums depend on how many share them
            network = _new_model(settings)
            optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=0.0)
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1
            )
            label = "Making the reasoning benchmark's base model"
            for _ in track(range(settings.steps), description=label, transient=True):
                ids, target = _batch(teacher, settings.batch_size, rng)
                logits = network(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
                loss = cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten(), ignore_index=IGNORED)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                schedule.step()
    finally:
        torch.set_num_threads(threads)
    return network.eval()


def _batch(teacher: Teacher, size: int, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
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


def _new_model(settings: BaseModelSettings) -> LlamaForCausalLM:
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    end = VOCABULARY.index(END)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=settings.width,
        intermediate_size=2 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.width // 32,
        num_key_value_heads=settings.width // 32,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=None,  # a declared padding token has no embedding, and a reward model reads the end token
    )
    network = LlamaForCausalLM(config)
    network.generation_config = GenerationConfig(do_sample=True, eos_token_id=end, pad_token_id=end, max_new_tokens=64)
    return network
