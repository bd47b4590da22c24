"""Folders of models as others left them: which files they must have, what these hold, and what is wrong with them.

Whatever a library raises while it loads one becomes a ConfigError here: one line that names the setting and the path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from alignlab.core import AlignlabError, ConfigError
from alignlab.core.errors import shorten
from alignlab.core.memory import is_memory_error

KEY = "model.path"
"""The setting that names a model, unless `naming` says that another one does."""

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
WEIGHTS, ADAPTER_WEIGHTS = "model.safetensors", "adapter_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
OBJECTS = (CONFIG, ADAPTER_CONFIG, "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
"""Files of a model that hold a JSON object each. Libraries pass over some of them where they cannot be read."""

LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks)\.(\d+)\.")
READ = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py")
"""How the names of files end that libraries read where they are in a model's folder."""

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
HUB_ID = re.compile(r"(?!\.)[\w.-]{1,96}(/[\w.-]{1,96})?")
PICKLED = (
    "its weights are a pickle that is damaged, or that holds more than tensors and could run any program: ask its "
    "author for safetensors"
)

Header = dict[str, tuple[str, tuple[int, ...]]]
"""Each tensor's dtype, as safetensors names it, and its shape."""


# ---------------------------------------------------------------------- the boundary


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Have errors of the block name another setting than `model.path`."""
    try:
        yield
    except ConfigError as error:
        if key == KEY or KEY not in str(error):
            raise
        raise ConfigError(str(error).replace(KEY, key, 1)) from error


@contextmanager
def loading(path: str, problem: str, key: str = KEY) -> Iterator[None]:
    """Whatever is raised in the block, while `path` (the value of `key`) is loaded, becomes a ConfigError.

    Libraries raise of every kind for files that are not there, damaged, or of another kind; the tokenizers' panics are
    not even Exceptions.
    """
    try:
        yield
    except AlignlabError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception | SystemExit) and type(error).__name__ != "PanicException":
            raise
        raise cannot_load(path, problem, error, key) from error


def cannot_load(path: str, problem: str, error: BaseException, key: str = KEY) -> ConfigError:
    """What to say where `path` cannot be loaded, in one line."""
    if not Path(path).exists():
        problem = "there is no such folder, nor can it be had from the Hub"
    said = shorten(error, 300)
    if is_memory_error(error):
        said = f"there is not enough memory for it: {said}"
    elif "weights_only" in str(error) or type(error).__name__ == "UnpicklingError":
        said = PICKLED
    elif "trust_remote_code" in str(error):
        said = "it comes with code of its own: model.trust_remote_code=true runs that, if you trust its author"
    elif not isinstance(error, OSError | ValueError | RuntimeError):
        said = f"{type(error).__name__}: {said}"
    return ConfigError(f"{key}={path!r}: {problem}: {said}")


def check_folder(path: str, key: str = KEY, needs: Collection[str] = (CONFIG, ADAPTER_CONFIG)) -> None:
    """Refuse a path that is no folder with one of the files in `needs`, unless it can be a Hub id; and a folder with
    something else than files in it, so that nothing waits for a pipe.

    Raises:
        ConfigError: with what is wrong and what to do.
    """
    place, where = Path(path), f"{key}={path!r}"
    try:
        there = place.exists() or place.is_symlink()
        if there and not place.is_dir():
            kind = "a file" if place.is_file() else "no folder"
            raise ConfigError(f"{where}: is {kind}: name the folder that has the {CONFIG} in it")
        files = {p.name: p for p in place.iterdir()} if there else {}
        read = [n for n in sorted(files) if n.endswith(READ)]
        broken = [n for n in read if not (files[n].is_file() or files[n].is_dir())]
    except (OSError, ValueError, RuntimeError) as error:  # no permission, too long, circular, a zero byte
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{where}: cannot be opened as a folder: {reason.lower()}") from error
    if not there and not HUB_ID.fullmatch(path):
        raise ConfigError(f"{where}: there is no such folder")
    if broken:
        raise ConfigError(f"{where}: {broken[0]} in it is not a file, but a pipe, a device or a broken link")
    if there and needs and not any(n in files and files[n].is_file() for n in needs):
        inner = place / "model"
        hint = f": this is the folder of a run; name {inner}" if (inner / CONFIG).exists() else ""
        raise ConfigError(f"{where}: there is no model in it, as it has no file {' or '.join(needs)}{hint}")
    for name in files.keys() & set(OBJECTS):
        read_object(files[name], where)


def read_object(file: Path, where: str) -> dict[str, Any]:
    """The JSON object in a file of a model.

    Raises:
        ConfigError: it holds something else; the message begins with `where`.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: {file.name} is not UTF-8 text: copy or download it again") from error
    except RecursionError as error:
        raise ConfigError(f"{where}: {file.name} is nested too deeply") from error
    except ValueError as error:
        raise ConfigError(f"{where}: {file.name} is not JSON: {error}: copy or download it again") from error
    except OSError as error:
        raise ConfigError(f"{where}: {file.name} cannot be read: {error.strerror}") from error
    if not isinstance(found, dict):
        kind = "null" if found is None else f"a {type(found).__name__}"
        raise ConfigError(f"{where}: {file.name} must hold a JSON object; it holds {kind}")
    return found


def saved_adapter(path: str) -> dict[str, Any] | None:
    """The PEFT config in the folder `path`, whose `base_model_name_or_path` is a text; None where it holds no adapter.

    Raises:
        ConfigError: it is broken, or names no base.
    """
    file = Path(path) / ADAPTER_CONFIG
    if not file.exists():
        return None
    where = f"{KEY}={path!r}: {ADAPTER_CONFIG}"
    found = read_object(file, f"{KEY}={path!r}")
    for name in ("base_model_name_or_path", "peft_type"):
        if not isinstance(found.get(name), str) or not found[name]:
            raise ConfigError(f"{where}: {name}={found.get(name)!r}: must be a text")
    if (Path(found["base_model_name_or_path"]) / ADAPTER_CONFIG).exists():
        base = found["base_model_name_or_path"]
        raise ConfigError(f"{where}: base_model_name_or_path={base!r} is an adapter: it must name a full model")
    return found


# ---------------------------------------------------------------------- config.json


def read_config(path: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The transformers config of a full model.

    Raises:
        ConfigError: there is none, or what it says cannot be.
    """
    from transformers import AutoConfig

    check_folder(path, needs=(CONFIG,))
    where, raw = f"{KEY}={path!r}: its {CONFIG}", {}
    if Path(path).exists():
        raw = read_object(Path(path) / CONFIG, f"{KEY}={path!r}")
        if not isinstance(raw.get("model_type"), str):
            raise ConfigError(f"{where} has model_type={raw.get('model_type')!r}: must name a type, such as llama")
        for name, kind in (("quantization_config", dict), ("architectures", list)):
            if not isinstance(raw.get(name), kind | None):
                raise ConfigError(f"{where} has {name}={raw[name]!r}: must be a {kind.__name__}")
        _check_quantization(raw.get("quantization_config"), where)
        _check_counts({name: raw[name] for name in SIZES if raw.get(name) is not None}, where)
    with loading(path, f"its {CONFIG} cannot be used"):
        found = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
        text = found.get_text_config()
        _check_counts({name: getattr(text, name, 1) for name in SIZES}, where)
        for name, value in raw.items():
            if isinstance(value, float) and value != value:
                raise ConfigError(f"{where} has {name}=NaN")
        dtype = getattr(found, "dtype", None)
        dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ConfigError(f"{where} has dtype={dtype}: must be a floating-point type of torch, such as bfloat16")
        pad = getattr(text, "pad_token_id", None)
        if pad is not None and not -text.vocab_size <= pad < text.vocab_size:
            raise ConfigError(f"{where} has pad_token_id={pad}: outside its vocabulary of {text.vocab_size}")
    return found


def _check_counts(values: Mapping[str, Any], where: str) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{where} has {name}={value!r}: must be a whole number, at least 1")


def _check_quantization(config: dict[str, Any] | None, where: str) -> None:
    """Transformers passes over a kind of quantization that it does not know."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    if config is None or config.get("load_in_4bit") or config.get("load_in_8bit"):
        return
    if str(method := config.get("quant_method")) not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise ConfigError(f"{where} has quantization_config.quant_method={method!r}, which transformers does not know")


# ---------------------------------------------------------------------- weights


def header(file: Path, where: str) -> Header:
    """What tensors a safetensors file holds.

    Raises:
        ConfigError: it is not there, cut short, or of another kind.
    """
    try:
        with file.open("rb") as opened:
            if opened.read(20).startswith(b"version https://git"):
                raise ConfigError(f"{where}: {file.name} is a pointer of Git LFS: get the file by `git lfs pull`")
        with safe_open(str(file), "pt") as found:
            slices = {name: found.get_slice(name) for name in found.keys()}  # noqa: SIM118
            return {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except OSError as error:
        raise ConfigError(f"{where}: {file.name} cannot be read: {error.strerror or error}") from error
    except AlignlabError:
        raise
    except Exception as error:  # of safetensors' own kind
        problem = f"{file.name} is no safetensors file, or is cut short ({shorten(error)})"
        raise ConfigError(f"{where}: {problem}: copy or download it again") from error


def headers(path: str) -> Header:
    """What tensors the model in a folder holds; nothing where it is on the Hub or has no safetensors.

    Raises:
        ConfigError: its weights are not there, or damaged.
    """
    folder, where = Path(path), f"{KEY}={path!r}"
    if not folder.exists():
        return {}
    if (folder / WEIGHTS).exists():
        names: Iterable[str] = [WEIGHTS]
    elif (folder / INDEX).exists():
        table = read_object(folder / INDEX, where).get("weight_map")
        if not isinstance(table, dict) or not table or not all(isinstance(n, str) for n in table.values()):
            raise ConfigError(f"{where}: {INDEX} must have a weight_map from names of weights to names of files")
        names = sorted(set(table.values()))
        if absent := [n for n in names if not (folder / n).is_file()]:
            raise ConfigError(f"{where}: {INDEX} names {first(absent)}, which is not there")
    elif any(folder.glob("pytorch_model*.bin*")):
        return {}
    else:
        raise ConfigError(f"{where}: there are no weights in it: it has neither {WEIGHTS} nor {INDEX}")
    found: Header = {}
    for name in names:
        found |= header(folder / name, where)
    if not found:
        raise ConfigError(f"{where}: there are no weights in its {WEIGHTS}")
    return found


def saved_tensors(path: str, names: Collection[str], revision: str | None = None) -> dict[str, Tensor]:
    """Some weights of the model in a folder, or on the Hub and in its cache, in the dtype that they were saved in;
    those that it has, where it has safetensors."""
    from transformers.utils import cached_file

    def local(name: str) -> str | None:
        found: str | None = cached_file(
            path, name, revision=revision, local_files_only=True, _raise_exceptions_for_missing_entries=False
        )
        return found

    if (one := local(WEIGHTS)) is not None:
        files = {one}
    elif (index := local(INDEX)) is not None:
        table = read_object(Path(index), f"{KEY}={path!r}")["weight_map"]
        files = {str(Path(index).with_name(table[n])) for n in names if n in table}
    else:
        return {}
    found: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            found |= {n: opened.get_tensor(n) for n in set(names) & set(opened.keys())}
    return found


def check_sizes(path: str, config: Any, tensors: Header) -> None:
    """Refuse a config that wants a far larger model than the weights are, before one is made.

    Raises:
        ConfigError: with the size.
    """
    if not tensors or getattr(config, "quantization_config", None) is not None:
        return
    text = config.get_text_config()
    layers = [int(m.group(1)) for name in tensors if (m := LAYER.search(name))]
    largest = max((n for _, shape in tensors.values() for n in shape), default=0)
    for name, most in (
        ("num_hidden_layers", max(layers, default=-2) + 1),
        ("vocab_size", largest),
        ("hidden_size", largest),
    ):
        value = int(getattr(text, name, 0))
        if 0 <= most < value:
            found = f"have {most} layers" if name == "num_hidden_layers" else f"have no side longer than {most}"
            raise ConfigError(f"{KEY}={path!r}: its {CONFIG} has {name}={value}, but its weights {found}")


def check_fit(
    path: str,
    kind: str,
    missing: Collection[str] = (),
    unexpected: Collection[str] = (),
    shapes: Mapping[str, tuple[Iterable[int], Iterable[int]]] | None = None,
) -> None:
    """Refuse weights that are not those of the model: some would stay random, others would be left out.

    Args:
        kind: what was wanted, as in "a policy model".
        shapes: of weights that have another one in the file than in the model: both.

    Raises:
        ConfigError: with the first few and their number.
    """
    where = f"{KEY}={path!r}: not {kind}"
    if missing:
        raise ConfigError(f"{where}: it has no weights for {first(missing)}")
    if unexpected:
        raise ConfigError(
            f"{where}: it has weights that this has no place for: {first(unexpected)}: its config is of another model, "
            "or they must be taken out of the file"
        )
    if shapes:
        told = [f"{n} of shape {tuple(a)} where the config says {tuple(b)}" for n, (a, b) in sorted(shapes.items())]
        raise ConfigError(f"{where}: its weights have other shapes than its config says: {first(told)}")


def check_types(path: str, tensors: Header, parameters: Collection[str], prefix: str = "") -> None:
    """Refuse whole numbers where weights should be: they would be taken for weights a hundred times as large.

    Raises:
        ConfigError: with the first few and their number.
    """
    known = set(parameters)
    wrong = {n: t for n, (t, _) in tensors.items() if t[0] in "IUB" and t != "BF16" and {n, f"{prefix}.{n}"} & known}
    if wrong:
        kind = next(iter(wrong.values())).replace("BOOL", "bool").replace("I", "int").replace("U", "u")
        raise ConfigError(f"{KEY}={path!r}: these weights are {kind}, no floating-point numbers: {first(wrong)}")


def check_finite(path: str, parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse weights that are NaN or infinite: nothing could be learned from them.

    Raises:
        ConfigError: with the first few and their number.
    """
    wrong = {}
    for name, tensor in parameters:
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            low, high = (float(t) for t in tensor.detach().aminmax())
            if not (abs(low) < float("inf") and abs(high) < float("inf")):
                wrong[name] = "NaN" if low != low or high != high else "infinite"
    if wrong:
        kind = " or ".join(sorted(set(wrong.values())))
        raise ConfigError(f"{KEY}={path!r}: its weights are {kind} in {first(wrong)}: take an earlier copy of it")


def first(names: Iterable[str]) -> str:
    """The first three of some names, and how many more there are."""
    found = sorted(names)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
