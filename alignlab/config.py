"""From command-line words to settings: Hydra composes, pydantic checks, and what is wrong is said in one line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from alignlab.core import AlignlabError, ConfigError, did_you_mean
from alignlab.core.settings import Settings

S = TypeVar("S", bound=Settings)

BY_PATH = ("model", "data")
"""Groups whose value may be a path: `model=PATH` means `model.path=PATH`."""


def config_folder() -> Path:
    """Where the configs are: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    for folder in (package / "_configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise AlignlabError(f"the configs are missing from the installation in {package}: install alignlab again")


def compose(name: str, overrides: Sequence[str], own: Path | None = None) -> DictConfig:
    """Compose the config `name` with command-line overrides.

    Args:
        own: a folder of the user's configs, laid out as ours, searched first.

    Raises:
        ConfigError: an unknown key or option, with what is known and near.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    folders = [config_folder(), *([own] if own else [])]
    words = [_by_path(word, folders) for word in overrides]
    if own is not None:
        if not own.is_dir():
            raise ConfigError(f"--config-dir {own}: there is no such folder")
        words.append(f"hydra.searchpath=[file://{own.resolve()}]")
    with initialize_config_dir(config_dir=str(config_folder()), version_base="1.3"):
        try:
            return hydra_compose(config_name=name, overrides=words)
        except (HydraException, OmegaConfBaseException) as error:
            raise _explain(error, name, overrides) from error


def resolve(config: DictConfig) -> dict[str, Any]:
    """The config as plain values, interpolations resolved.

    Raises:
        ConfigError: where a value that must be given is missing.
    """
    from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue

    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = _full_key(error) or "a key"
        raise ConfigError(f"{key}: must be given, as in {key}=VALUE") from error
    except InterpolationKeyError as error:
        raise ConfigError(f"{_full_key(error)}: {str(error).splitlines()[0]}") from error
    assert isinstance(plain, dict)
    return {str(k): v for k, v in plain.items()}


def section(kind: type[S], values: dict[str, Any], key: str) -> S:
    """A section of the config as a settings object.

    Raises:
        ConfigError: for an unknown key or an impossible value, with the key as it is written on the command line.
    """
    from pydantic import ValidationError

    try:
        return kind(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(p) for p in problem["loc"])
        if problem["type"] == "extra_forbidden":
            raise ConfigError(f"{key}.{place}: unknown key{did_you_mean(place, kind.model_fields)}") from error
        if problem["type"] == "missing":
            raise ConfigError(f"{key}.{place}: must be given, as in {key}.{place}=VALUE") from error
        raise ConfigError(
            f"{key}.{place}={problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
        ) from error


def build(values: dict[str, Any] | None, key: str, *arguments: Any, **keywords: Any) -> Any:
    """The object that `_target_` names, made with the other values.

    Raises:
        ConfigError: where there is no such object, or it refuses its values.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    if values is None:
        return None
    if "_target_" not in values:
        raise ConfigError(f"{key}._target_: must name a class, as in {key}._target_=my_module.MyClass")
    try:
        return instantiate(values, *arguments, _convert_="all", **keywords)
    except (InstantiationException, TypeError, ImportError) as error:
        cause: BaseException = error
        while cause is not None:
            if isinstance(cause, AlignlabError):
                raise cause from error
            if cause.__cause__ is None:
                break
            cause = cause.__cause__
        unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unexpected:
            known = _parameters(values["_target_"])
            raise ConfigError(f"{key}.{unexpected[1]}: unknown key{did_you_mean(unexpected[1], known)}") from error
        missing = re.search(r"missing \d+ required .*?: (.*)", str(error).splitlines()[0])
        if missing:
            raise ConfigError(f"{key}: {values['_target_']} also needs {missing[1]}") from error
        raise ConfigError(f"{key}._target_={values['_target_']}: {_shorten(cause)}") from error


def _parameters(target: str) -> list[str]:
    import inspect

    from hydra.utils import get_object

    return [p for p in inspect.signature(get_object(target)).parameters if p != "self"]


def _by_path(word: str, folders: Sequence[Path]) -> str:
    """`model=PATH` → `model.path=PATH`, unless there is an option of that name."""
    key, _, value = word.partition("=")
    if key not in BY_PATH or not value or any((f / key / f"{value}.yaml").exists() for f in folders):
        return word
    if "/" in value or Path(value).exists() or key == "model":
        return f"{key}.path='{value}'" if re.search(r"[^\w./~-]", value) else f"{key}.path={value}"
    return word


def _explain(error: Exception, name: str, overrides: Sequence[str]) -> ConfigError:
    """Hydra's message as one line with a suggestion."""
    text = str(error)
    cause = f"{text}\n{error.__cause__ or ''}"
    unknown = re.search(r"Could not override '([^']+)'", cause) or re.search(r"full_key: ([\w.]+)", cause)
    option = re.search(r"Could not find '([^']+)'", text) or re.search(r"In '[^']*': Could not find '([^']+)'", text)
    if option:
        group, _, chosen = option[1].rpartition("/")
        known = re.findall(r"^\t(.+)$", text, re.MULTILINE)
        return ConfigError(f"{group or 'config'}={chosen}: there is no such option{did_you_mean(chosen, known)}")
    if "is not in struct" in cause and unknown:
        key = unknown[1]
        parent, _, leaf = key.rpartition(".")
        return ConfigError(f"{key}: unknown key{did_you_mean(leaf, _siblings(name, parent, overrides))}")
    if unknown and "Could not override" in text:
        return ConfigError(f"{unknown[1]}: {_shorten(error.__cause__ or error)}")
    group_missing = re.search(r"Could not override '([^']+)'\.\s*No match", cause)
    if group_missing:
        return ConfigError(
            f"{group_missing[1]}: unknown group{did_you_mean(group_missing[1], _siblings(name, '', ()))}"
        )
    return ConfigError(_shorten(error))


def _siblings(name: str, parent: str, overrides: Sequence[str]) -> list[str]:
    """Keys known beside a mistyped one, in the config without the words that set values."""
    from hydra import compose as hydra_compose

    groups = [w for w in overrides if "." not in w.split("=")[0] and (config_folder() / w.split("=")[0]).is_dir()]
    try:
        config = hydra_compose(config_name=name, overrides=[_by_path(w, [config_folder()]) for w in groups])
        node = OmegaConf.select(config, parent) if parent else config
        return [str(k) for k in node] if isinstance(node, DictConfig) else []
    except Exception:  # a suggestion is not worth a second error
        return []


def _full_key(error: Any) -> str:
    return str(getattr(error, "full_key", "") or "")


def _shorten(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines[:2]) if lines else type(error).__name__


def sweep_words(words: Sequence[str], own: Path | None, by_path: Sequence[str] = BY_PATH) -> list[str]:
    """Command-line words for Hydra's own entry point: paths spelt out, the user's folder on the search path, and a
    folder for each combination."""
    folders = [config_folder(), *([own] if own else [])]
    found = [_by_path(word, folders) for word in words]
    if own is not None:
        found.append(f"hydra.searchpath=[file://{own.resolve()}]")
    if not any(word.startswith("hydra.sweep.dir=") for word in found):
        found.append("hydra.sweep.dir=runs/${name}")
    if not any(word.startswith("out=") for word in found):
        found.append("out=${hydra:sweep.dir}/${hydra:sweep.subdir}")
    if not any(word.startswith("hydra.sweep.subdir=") for word in found):
        found.append("hydra.sweep.subdir=${hydra:job.override_dirname}")
    return found


def read_saved(path: Path) -> dict[str, Any]:
    """A resolved config as a run leaves it."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--from={path}: cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--from={path}: not a saved config")
    return values
