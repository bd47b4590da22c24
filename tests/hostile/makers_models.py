"""Models, adapters and tokenizers with something wrong in them. Options come from the case: `{config: {vocab_size: x}}`
calls `config(here, prepared, vocab_size="x")`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import tiny

WEIGHTS = "model.safetensors"
ADAPTER = "adapter_model.safetensors"


def _copy(source: Path, here: Path, to: str = "model") -> Path:
    if not (here / to).exists():
        shutil.copytree(source, here / to)
    return here / to


def _change(file: Path, changes: dict[str, Any], without: str = "") -> None:
    values = {**json.loads(file.read_text()), **changes}
    values.pop(without, None)
    file.write_text(json.dumps(values))


def config(here: Path, prepared: Path, without: str = "", **changes: Any) -> None:
    """A model with other values in its config, or without one."""
    _change(_copy(prepared / "base", here) / "config.json", changes, without)


def json_of(here: Path, prepared: Path, file: str, without: str = "", **changes: Any) -> None:
    """A model with other values in a JSON file."""
    _change(_copy(prepared / "base", here) / file, changes, without)


def replaced(here: Path, prepared: Path, file: str, by: str | bytes | None = None) -> None:
    """A model with a file that holds something else; without it where that is None."""
    _replace(_copy(prepared / "base", here) / file, by)


def _replace(file: Path, by: str | bytes | None) -> None:
    if by is None:
        file.unlink()
    else:
        file.write_bytes(by if isinstance(by, bytes) else by.encode())


def cut(here: Path, prepared: Path, file: str) -> None:
    """A model with the first half of a file."""
    path = _copy(prepared / "base", here) / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pipe_in_model(here: Path, prepared: Path, file: str) -> None:
    """A model with a FIFO in place of a file."""
    path = _copy(prepared / "base", here) / file
    path.unlink()
    os.mkfifo(path)


def folder_in_model(here: Path, prepared: Path, file: str) -> None:
    """A model with a folder in place of a file."""
    path = _copy(prepared / "base", here) / file
    path.unlink()
    path.mkdir()


def bare(here: Path, prepared: Path, *, keep: list[str]) -> None:
    """A model of which only some files are there."""
    for file in _copy(prepared / "base", here).iterdir():
        if file.name not in keep:
            file.unlink()


def _head(found: dict[str, Tensor]) -> None:
    found["lm_head.weight"] = found["lm_head.weight"][:, :16].clone()


LAYER = "model.layers.1.mlp.up_proj.weight"
DAMAGE: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "nan": lambda w: w[LAYER].fill_(float("nan")),
    "one infinity": lambda w: w[LAYER][3, 4].fill_(float("inf")),
    "int32": lambda w: w.update({LAYER: (w[LAYER] * 100).to(torch.int32)}),
    "all int32": lambda w: w.update({n: (t * 100).to(torch.int32) for n, t in w.items()}),
    "bool": lambda w: w.update({LAYER: w[LAYER] > 0}),
    "another shape": lambda w: w.update({LAYER: w[LAYER][:7].clone()}),
    "transposed": lambda w: w.update({LAYER: w[LAYER].T.contiguous()}),
    "a vector": lambda w: w.update({LAYER: w[LAYER].flatten()}),
    "a cut head": _head,
    "an extra tensor": lambda w: w.update({"model.layers.1.mlp.extra.weight": torch.zeros(3)}),
    "a value head": lambda w: w.update({"v_head.summary.weight": torch.zeros(1, 32)}),
    "a missing tensor": lambda w: w.pop(LAYER),
    "a renamed tensor": lambda w: w.update({"model.layers.1.mlp.upp.weight": w.pop(LAYER)}),
    "no tensor": lambda w: w.clear(),
    "all renamed": lambda w: [w.update({f"mine.{n}": w.pop(n)}) for n in list(w)],
}


def weights(here: Path, prepared: Path, damage: str) -> None:
    """A model with other weights."""
    file = _copy(prepared / "base", here) / WEIGHTS
    found = load_file(file)
    DAMAGE[damage](found)
    save_file(found, file, metadata={"format": "pt"})


def index(here: Path, prepared: Path, content: Any) -> None:
    """A model whose weights an index names; `content` is the index."""
    folder = _copy(prepared / "base", here)
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    (folder / f"{WEIGHTS}.index.json").write_text(content if isinstance(content, str) else json.dumps(content))


def pickled(here: Path, prepared: Path, content: str) -> None:
    """A model whose weights are a pickle: one that would run a program, or bytes that are none."""
    folder = _copy(prepared / "base", here)
    (folder / WEIGHTS).unlink()
    if content == "code":
        torch.save({"model.norm.weight": Owns(str(here / "owned"))}, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(content.encode())


class Owns:
    """Starts a program where it is unpickled."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


def foreign_tokenizer(here: Path, prepared: Path) -> None:
    """A model with a tokenizer of another one, which has more tokens than the model has rows."""
    folder = _copy(prepared / "base", here)
    tiny.stories_tokenizer().save_pretrained(folder)


def more_tokens(here: Path, prepared: Path, **special: Any) -> None:
    """A model with a tokenizer to which a special token was added that it has no row for."""
    made = tiny.tokenizer()
    made.add_special_tokens(special)
    made.save_pretrained(_copy(prepared / "base", here))


# ---------------------------------------------------------------------- adapters


def _adapter(here: Path, prepared: Path) -> Path:
    """A copy of an adapter that was trained on the small model."""
    if not (prepared / "adapter").exists():
        from alignlab.models import LoRA, ModelSettings, load_model, save_model

        made = load_model(ModelSettings(path=str(prepared / "base")), LoRA(r=4))
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01)
        save_model(made, prepared / "adapter")
    return _copy(prepared / "adapter", here, "adapter")


def an_adapter(here: Path, prepared: Path, without: str = "", **changes: Any) -> None:
    """An adapter with other values in its config."""
    _change(_adapter(here, prepared) / "adapter_config.json", changes, without)


def adapter_file(here: Path, prepared: Path, file: str, by: str | bytes | None = None) -> None:
    """An adapter with a file that holds something else; without it where that is None."""
    _replace(_adapter(here, prepared) / file, by)


QUERY = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
ADAPTER_DAMAGE: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "no tensor": lambda w: w.clear(),
    "a missing tensor": lambda w: w.pop(QUERY),
    "a renamed tensor": lambda w: w.update({QUERY.replace("q_proj", "query"): w.pop(QUERY)}),
    "all renamed": lambda w: [w.update({n.replace("lora_", "lorra_"): w.pop(n)}) for n in list(w)],
    "another prefix": lambda w: [w.update({n.removeprefix("base_model.model."): w.pop(n)}) for n in list(w)],
    "an extra layer": lambda w: w.update({QUERY.replace("layers.1", "layers.2"): w[QUERY].clone()}),
    "another shape": lambda w: w.update({QUERY: w[QUERY][:7].clone()}),
    "nan": lambda w: w[QUERY].fill_(float("nan")),
    "int32": lambda w: w.update({QUERY: (w[QUERY] * 100).to(torch.int32)}),
}


def adapter_weights(here: Path, prepared: Path, damage: str) -> None:
    """An adapter with other weights."""
    file = _adapter(here, prepared) / ADAPTER
    found = load_file(file)
    ADAPTER_DAMAGE[damage](found)
    save_file(found, file, metadata={"format": "pt"})


def adapter_of_another_base(here: Path, prepared: Path, name: str = "llama", **sizes: Any) -> None:
    """An adapter that says it stands on another model than it was trained on."""
    tiny.save(here / "other", name, **sizes)
    an_adapter(here, prepared, base_model_name_or_path=str(here / "other"))


def adapter_on_itself(here: Path, prepared: Path) -> None:
    """An adapter that names itself as its base."""
    an_adapter(here, prepared, base_model_name_or_path=str(here / "adapter"))


def pickled_adapter(here: Path, prepared: Path) -> None:
    """An adapter whose weights are a pickle that would start a program."""
    folder = _adapter(here, prepared)
    (folder / ADAPTER).unlink()
    torch.save({QUERY: Owns(str(here / "owned"))}, folder / "adapter_model.bin")


# ---------------------------------------------------------------------- other kinds


def reward_model(here: Path, prepared: Path, tied: bool = False) -> None:
    """A reward model, in `reward`."""
    tiny.save(here / "reward", kind="score", tie_word_embeddings=tied)


def broken_reward_model(here: Path, prepared: Path) -> None:
    """A reward model with half its weights."""
    reward_model(here, prepared)
    file = here / "reward" / WEIGHTS
    file.write_bytes(file.read_bytes()[:3000])


def run_with(here: Path, prepared: Path, file: str, by: str | bytes | None = None) -> None:
    """A finished run of which a file of its model holds something else."""
    _replace(_copy(prepared / "run", here, "run") / "model" / file, by)


def deep(here: Path, prepared: Path, file: str) -> None:
    """A model with a file of brackets in brackets."""
    replaced(here, prepared, file, "[" * 100_000 + "]" * 100_000)


def own_benchmark(here: Path, prepared: Path) -> None:
    """A user's benchmark, in mine.py, that opens the reference."""
    (here / "mine.py").write_text(
        "class Mine:\n    name, files = 'mine', ()\n    def write_data(self, folder, model):\n        pass\n"
        "    def evaluate(self, subject):\n        with subject.reference():\n            return {'x': 1.0}\n"
    )
