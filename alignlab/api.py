"""The public API, as notebooks and one's own scripts use it: `import alignlab as al`.

    policy = al.load("Qwen/Qwen3-0.6B", adapter="lora")
    prompts = al.prompts(["Once upon a time"], policy)
    groups = policy.sample(prompts, n=8, max_new_tokens=64, seed=0)
    al.score(groups, lambda prompt, response, extra: response.count("e"))
    trainer = al.Trainer(policy, al.GRPO(kl_coef=0.05), lr=1e-5)
    metrics = trainer.step(groups)
    trainer.save("out")

`alignlab train` composes a config as `train` does, and calls the same function with it.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from os.path import exists
from pathlib import Path
from typing import Any

from alignlab.build import build_type, check_objects, section
from alignlab.config import compose, config_folder, read_yaml, resolve, top_level
from alignlab.core import (
    AdapterKind,
    Algorithm,
    AlignlabError,
    Callback,
    ConfigError,
    DataError,
    Group,
    ModelKind,
    Scorer,
    did_you_mean,
)
from alignlab.core.files import write_text
from alignlab.core.parts import score as score_groups
from alignlab.core.settings import Settings
from alignlab.data import DataSettings, encode_prompt
from alignlab.data import load as load_data
from alignlab.launch import start
from alignlab.models import ModelSettings, QuantizationSettings, load_model
from alignlab.rollout import RolloutSettings
from alignlab.rollout.policy import Policy
from alignlab.scoring import FunctionScorer
from alignlab.training.distributed.processes import launched
from alignlab.training.run_config import check
from alignlab.training.settings import DistributedSettings, SourceSettings, TrainingSettings

Function = Callable[[str, str, dict[str, Any]], float]
"""(prompt, response, the record's other fields) → reward."""

Messages = list[dict[str, str]]
"""A conversation: `[{"role": "user", "content": "…"}]`."""


def load(
    path: str | Path,
    *,
    adapter: str | Mapping[str, Any] | AdapterKind = "none",
    quantization: str | Mapping[str, Any] = "none",
    kind: ModelKind = "policy",
    labels: int = 1,
    seed: int = 0,
    device: str | None = None,
    **settings: Any,
) -> Policy:
    """A model that can be trained, with its tokenizer.

    Args:
        path: Hub id, folder of a model or an adapter, or the `model/` folder of a run.
        adapter: an option of the config group `adapter` ("none" trains the model's own weights, "lora" an adapter on
            them), settings of one (`{"r": 32}` is LoRA of rank 32), or an object such as `models.LoRA(r=32)`.
        quantization: an option of the config group `quantization` ("none", "nf4", "int8"), or its settings.
        kind: "policy" for a causal language model; "score" for reward models, "step" for process reward models.
        labels: outputs of a step head.
        seed: of new heads and adapters.
        device: as torch writes it; None: this process's GPU where there is one, else the CPU.
        settings: those of the config group `model`: `dtype`, `revision`, `freeze`, `gradient_checkpointing`, …

    Raises:
        ConfigError: nothing can be loaded from there, or a setting is unknown or impossible.
    """
    model = load_model(
        section(ModelSettings, {"path": str(path), **settings}, "model"),
        adapter
        if isinstance(adapter, AdapterKind)
        else build_type(AdapterKind, _option("adapter", adapter, "lora"), "adapter"),
        kind,
        labels=labels,
        quantization=section(QuantizationSettings, _option("quantization", quantization, "nf4"), "quantization"),
        device=device or _device(),
        seed=seed,
    )
    return Policy(model)


def prompts(texts: Sequence[str | Messages] | str | Path, policy: Policy, **settings: Any) -> list[Group]:
    """Prompts as groups without responses, to be sampled for.

    Args:
        texts: texts, or conversations that end before the assistant's turn, which get the tokenizer's chat template;
            or the path of a file of prompts.
        policy: whose tokenizer it is.
        settings: those of the config group `data`: `chat_template`, `prompt_template`, `max_prompt_length`, …

    Raises:
        ConfigError: there is no such file.
        DataError: a prompt has no tokens, or is too long.
    """
    if isinstance(texts, str | Path):
        if not exists(texts) and (isinstance(texts, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", texts)):
            raise ConfigError(
                f"prompts: {str(texts)!r}: there is no such file; texts are given as a list: [{str(texts)!r}]"
            )
        return records(texts, policy, parser="prompts", **settings)
    wanted = section(DataSettings, {"parser": "prompts", **settings}, "data")
    found = []
    for number, text in enumerate(texts, start=1):
        try:
            ids = encode_prompt(text, policy.tokenizer, wanted)
        except DataError as error:
            raise DataError(f"prompts, number {number}: {error}") from error
        shown = text if isinstance(text, str) else json.dumps(list(text), ensure_ascii=False)
        found.append(Group(ids, origin=f"prompts:{number}", prompt=shown))
    return found


def records(data: str | Path | Iterable[Mapping[str, Any]], policy: Policy, **settings: Any) -> list[Group]:
    """Records as groups: demonstrations, chats, preference pairs, rankings, …

    Args:
        data: the path of a file or folder, a Hub id, or the records themselves.
        policy: whose tokenizer it is.
        settings: those of the config group `data`: `parser` (told by the fields unless given), `fields`, …

    Raises:
        DataError: a record cannot be used, with its file and line; `records:2` is the second of `data`.
    """
    if isinstance(data, str | Path):
        path = str(data)
        return load_data(_data_settings(policy, path=path, **settings), policy.tokenizer).train
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "records.jsonl")
        Path(path).write_text(_as_lines(data), encoding="utf-8")
        try:
            groups = load_data(_data_settings(policy, path=path, **settings), policy.tokenizer).train
        except DataError as error:
            said = re.sub(r"\(data\.(\w+)\)|data\.(on_bad_record=)(\w+)", _as_argument, str(error))
            raise DataError(said.replace(path, "records")) from error
    for group in groups:
        group.origin = group.origin.replace(path, "records")
    return groups


def score(groups: Sequence[Group], scorer: Scorer | Function) -> Sequence[Group]:
    """Fill in a column of the groups' responses, in place; `reward`, where the scorer is a function.

    Args:
        scorer: a function of (prompt, response, the record's other fields), or a `Scorer`.

    Returns:
        The same groups.

    Raises:
        AlignlabError: the function fails or gives no number, with the record's origin.
    """
    made = scorer if isinstance(scorer, Scorer) else FunctionScorer(scorer)
    score_groups(made, groups)
    return groups


def train(
    *,
    algorithm: Algorithm | str,
    model: str | Path,
    data: str | Path | Sequence[str] | Sequence[Mapping[str, Any]],
    scoring: Scorer | Function | str | Mapping[str, Any] | None = None,
    callbacks: Iterable[Callback] = (),
    lr: float | None = None,
    out: str | Path | None = None,
    config_dir: str | Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """A whole training run with a folder of its own, as `alignlab train` makes it: resumable, with checkpoints,
    `metrics.jsonl`, provenance and the model.

    Args:
        algorithm: one of `alignlab`'s or your own, or an option of the config group `algorithm`.
        model: Hub id or folder.
        data: path or paths of the records, or the records themselves, which are kept in the run's folder; their format
            is told by the fields unless `data_format` names it.
        scoring: fills in rewards: a function, a scorer, an option of the config group `scoring`, or its settings.
        callbacks: called beside the usual ones.
        lr: peak learning rate; None: the optimiser's default.
        out: the run's folder; None: `runs/train`.
        config_dir: a folder of your own configs.
        settings: any other section of the config: an option of that group by name (`adapter="lora"`,
            `source="rollout"`), or its settings (`training={"steps": 100}`, `rollout={"max_new_tokens": 64}`).
            `distributed` is "ddp" under torchrun unless given.

    Returns:
        The run's result: steps, tokens, seconds, the last evaluation, `out`.

    Raises:
        ConfigError: a setting is unknown or impossible.
        DataError: a record cannot be used, with file and line.
    """
    if isinstance(algorithm, type):
        raise ConfigError(f"algorithm: {algorithm.__name__} is a class; an object is wanted: {algorithm.__name__}(…)")
    callbacks = check_objects(Callback, callbacks, "callbacks")
    _check_names(settings)
    if (launched() or 1) > 1:
        settings.setdefault("distributed", "ddp")
    overrides, sections = [f"data={settings.pop('data_format', 'base')}"], {}
    made = algorithm if isinstance(algorithm, Algorithm) else None
    if (option := algorithm if made is None else _option_of(made)) is not None:
        overrides.append(f"algorithm={option}")
    for name, value in settings.items():
        if isinstance(value, str):
            overrides.append(f"{name}={value}")
        else:
            sections[name] = value
    scorers: list[Scorer] | None = None
    if isinstance(scoring, str):
        overrides.append(f"scoring={scoring}")
    elif isinstance(scoring, Mapping):
        sections["scoring"] = dict(scoring)
    elif scoring is not None:
        scorers = [scoring if isinstance(scoring, Scorer) else FunctionScorer(scoring)]
    config = _composed(overrides, config_dir)
    for name, value in sections.items():
        _merge(config, name, value)
    config["model"]["path"] = str(model)
    if made is not None:
        config["algorithm"] = _described(made)
    if scorers is not None:
        config["scoring"] = {"_target_": _name_of(scoring)}
    if lr is not None:
        config["optimizer"]["lr"] = lr
    if out is not None:
        config["out"] = str(out)
    config["data"]["path"] = str(data) if isinstance(data, str | Path) else _paths(data, Path(config["out"]))
    checked = check(config, algorithm=made, scorers=scorers)
    result = start.train(config, Path(config["out"]), callbacks, checked)
    assert result is not None  # processes are never started from here
    return {**result, "out": config["out"]}


# ---------------------------------------------------------------------------------------------- settings


def _composed(overrides: Sequence[str], config_dir: str | Path | None) -> dict[str, Any]:
    """The config of a training run whose paths are yet to be given."""
    given = ["model.path=null", *overrides]
    return resolve(compose("train", given, None if config_dir is None else Path(config_dir)))


def _check_names(settings: Mapping[str, Any]) -> None:
    """Refuse a section that there is not; a key of one is said with its section."""
    known = frozenset.union(*top_level("train")) | {"data_format"}
    for name, value in settings.items():
        if name in known:
            continue
        kinds: dict[str, type[Settings]] = {
            "training": TrainingSettings,
            "source": SourceSettings,
            "rollout": RolloutSettings,
        }
        kinds |= {"distributed": DistributedSettings, "model": ModelSettings, "data": DataSettings}
        inside = next((key for key, kind in kinds.items() if name in kind.model_fields), None)
        near = f"; give {inside}={{{name!r}: {value!r}}}" if inside else did_you_mean(name, known)
        raise ConfigError(f"{name}: unknown section{near}")


def _as_lines(records: Iterable[Mapping[str, Any]]) -> str:
    """Records as JSON lines."""
    lines = []
    for number, record in enumerate(records, start=1):
        try:
            lines.append(json.dumps(dict(record), ensure_ascii=False) + "\n")
        except (TypeError, ValueError) as error:
            raise DataError(f"records:{number}: cannot be written as JSON: {error}") from error
    return "".join(lines)


def _as_argument(found: re.Match[str]) -> str:
    """A setting of `data` as an argument: `(data.parser)` → `(parser=…)`."""
    return f"({found[1]}=…)" if found[1] else f'{found[2]}"{found[3]}"'


def _paths(data: Sequence[Any], out: Path) -> list[str]:
    """Paths of a run's data; records are written to the run's folder, under a name that tells what they are, so that
    the run can be gone on with, and not with others."""
    if not data:
        raise ConfigError("data: no paths and no records are given")
    if not all(isinstance(item, Mapping) for item in data):
        return [str(path) for path in data]
    text = _as_lines(data)
    path = out / f"records-{hashlib.sha256(text.encode()).hexdigest()[:8]}.jsonl"
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise AlignlabError(f"out={out}: cannot be written: {error.strerror}") from error
    return [str(path)]


def _merge(config: dict[str, Any], name: str, values: Any) -> None:
    """Put settings into a section; a section that names another class (`_target_`) replaces it."""
    if name not in config:
        raise ConfigError(f"{name}: unknown section{did_you_mean(name, config)}")
    if not isinstance(values, Mapping) or not isinstance(config[name], dict) or "_target_" in values:
        config[name] = dict(values) if isinstance(values, Mapping) else values
        return
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(config[name].get(key), dict):
            _merge(config[name], key, value)
        else:
            config[name][key] = value


def _option(group: str, value: str | Mapping[str, Any], base: str) -> dict[str, Any]:
    """An option of a config group by name, or `base` with settings of one's own."""
    name = value if isinstance(value, str) else base
    if not isinstance(value, str) and "_target_" in value:
        return dict(value)
    config = _composed([f"{group}={name}"], None)[group]
    return dict(config) if isinstance(value, str) else {**config, **value}


def _data_settings(policy: Policy, **settings: Any) -> DataSettings:
    wanted = section(DataSettings, settings, "data")
    if wanted.max_length is None and policy.model.max_length:
        wanted = wanted.model_copy(update={"max_length": policy.model.max_length})
    return wanted


def _option_of(algorithm: Algorithm) -> str | None:
    """The option of the config group `algorithm` for its class, or the nearest one above: it says whether to sample."""
    options = {str(read_yaml(p)["_target_"]): p.stem for p in (config_folder() / "algorithm").glob("*.yaml")}
    return next((options[name] for kind in type(algorithm).__mro__ if (name := _name_of(kind)) in options), None)


def _described(algorithm: Algorithm) -> dict[str, Any]:
    """An algorithm as a config names it: so that the run's folder says what it was, and can be gone on with.

    Raises:
        ConfigError: it does not keep one of its arguments.
    """
    found: dict[str, Any] = {"_target_": _name_of(algorithm)}
    for name, parameter in inspect.signature(type(algorithm).__init__).parameters.items():
        if name == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if not hasattr(algorithm, name):
            raise ConfigError(
                f"algorithm: {type(algorithm).__name__} does not keep its argument '{name}' as an attribute: add "
                f"self.{name} = {name}, so that the run's folder can say what it was"
            )
        found[name] = getattr(algorithm, name)
    return found


def _name_of(thing: Any) -> str:
    """The dotted name of a function, or of an object's class."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"


def _device() -> str:
    """Where this process computes."""
    import os

    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if launched() else "cuda"
