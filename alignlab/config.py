"""From command-line words to settings: Hydra composes, pydantic checks, and what is wrong is said in one line."""

from __future__ import annotations

import importlib
import inspect
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os.path import exists  # unlike Path's, False for what may not be looked at
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ValidationError

from alignlab.core import AlignlabError, ConfigError, did_you_mean
from alignlab.core.settings import Settings

S = TypeVar("S", bound=Settings)

BY_PATH = ("model", "data")
"""Groups whose value may be a path: `model=PATH` means `model.path=PATH`."""

BY_NAME = ("hydra.utils.get_method", "hydra.utils.get_class", "hydra.utils.get_object")
"""Targets that stand for the object named by `path` itself."""


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
        ConfigError: an unknown key or option, with what is known and near; a config that is not YAML.
    """
    from hydra import compose as hydra_compose
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    folders = [config_folder(), *([own] if own else [])]
    words = [_by_path(word, folders) for word in overrides]
    if own is not None:
        if not own.is_dir():
            raise ConfigError(f"--config-dir {own}: there is no such folder")
        words.append(f"hydra.searchpath=[file://{own.resolve()}]")
    with _hydra():
        try:
            return hydra_compose(config_name=name, overrides=words)
        except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
            raise explain(error, name, words, folders) from error


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


@contextmanager
def _hydra() -> Iterator[None]:
    """Hydra, ready to compose; also within itself, as in a sweep over comparisons."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.initialize import get_gh_backup, restore_gh_from_backup

    outer = get_gh_backup()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(config_folder()), version_base="1.3"):
            yield
    finally:
        restore_gh_from_backup(outer)


def as_yaml(config: DictConfig) -> str:
    """The config for people to read, interpolations resolved where what they refer to is given."""
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_yaml(config, resolve=True)
    except OmegaConfBaseException:
        return OmegaConf.to_yaml(config)


def section(kind: type[S], values: Any, key: str) -> S:
    """A section of the config as a settings object.

    Args:
        key: where it stands in the config; "" for the config itself.

    Raises:
        ConfigError: for an unknown key or an impossible value, with the key as it is written on the command line.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{key}={_shown(values)}: a section with keys is wanted: {', '.join(kind.model_fields)}")
    try:
        return kind(**values)
    except ValidationError as error:
        raise _invalid(error, values, key, kind) from error


def build(values: Any, key: str, *arguments: Any) -> Any:
    """The object that `_target_` names, made with the other values; those that have a `_target_` themselves are
    built first. None for None.

    Raises:
        ConfigError: where there is no such object, or it refuses its values.
    """
    if values is None:
        return None
    if not isinstance(values, dict) or not values.get("_target_"):
        raise ConfigError(f"{key}._target_: must name a class, as in {key}._target_=my_module.MyClass")
    name, target = str(values["_target_"]), locate(values["_target_"], f"{key}._target_")
    made = {k: _built(v, f"{key}.{k}") for k, v in values.items() if k != "_target_"}
    if name in BY_NAME and isinstance(made.get("path"), str):
        return locate(made["path"], f"{key}.path")
    made = _checked(target, made, key, len(arguments))
    try:
        return target(*arguments, **made)
    except AlignlabError:
        raise
    except ValidationError as error:
        # Of settings that a constructor makes of a dictionary: find the one that it was.
        place = next((k for k, v in made.items() if isinstance(v, dict) and error.errors()[0]["loc"][0] in v), None)
        nested, where = (made[place], f"{key}.{place}") if place else (made, key)
        raise _invalid(error, nested, where) from error
    except Exception as error:  # the target may be the user's own: say where it failed
        raise ConfigError(f"{key}._target_={name}: {_failure(error)}") from error


def locate(name: Any, key: str) -> Any:
    """The object that a dotted name stands for.

    Raises:
        ConfigError: there is none, or importing its module fails.
    """
    parts = str(name).split(".")
    where = f"{key}={name}"
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ConfigError(f"{where}: must be written MODULE.NAME")
    found: Any = None
    for i, part in enumerate(parts):
        if found is not None and hasattr(found, part):
            found = getattr(found, part)
            continue
        module = ".".join(parts[: i + 1])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module and not str(error).endswith("is not a package"):
                raise ConfigError(f"{where}: importing {module} failed: {_failure(error)}") from error
            if i == 0:
                raise ConfigError(f"{where}: there is no module '{part}': is its folder on PYTHONPATH?") from error
            there = [n for n, v in vars(found).items() if n[0] != "_" and (inspect.isclass(v) or inspect.isroutine(v))]
            near = did_you_mean(part, there)
            near = "" if near.startswith("; known") and len(there) > 10 else near
            raise ConfigError(f"{where}: {'.'.join(parts[:i])} has no '{part}'{near}") from error
        except Exception as error:  # the user's module
            raise ConfigError(f"{where}: importing {module} failed: {_failure(error)}") from error
    return found


def _built(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return build(value, key) if "_target_" in value else {k: _built(v, f"{key}.{k}") for k, v in value.items()}
    return [_built(v, f"{key}.{i}") for i, v in enumerate(value)] if isinstance(value, list) else value


def _checked(target: Any, values: dict[str, Any], key: str, given: int) -> dict[str, Any]:
    """The keywords for a call of `target`, held against its signature and its type hints."""
    from pydantic import ConfigDict, TypeAdapter

    try:
        parameters = list(inspect.signature(target).parameters.values())[given:]
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (TypeError, ValueError, NameError):  # built in, or its hints cannot be understood
        return values
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for name in values:
        if name not in named and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            raise ConfigError(f"{key}.{name}: unknown key{did_you_mean(name, named)}")
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in values:
            raise ConfigError(f"{key}.{name}: must be given, as in {key}.{name}=VALUE")
    checked = dict(values)
    for name in values.keys() & hints.keys():
        try:
            adapter = TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True))
        except Exception:  # not a type that pydantic can check: what is wrong will show in the call
            continue
        try:
            checked[name] = adapter.validate_python(values[name])
        except ValidationError as error:
            raise _invalid(error, values[name], f"{key}.{name}") from error
    return checked


def _invalid(error: Any, values: Any, key: str, kind: type[BaseModel] | None = None) -> ConfigError:
    """What pydantic found wrong with `values`, which stand at `key`, as one line."""
    problems = error.errors()
    first, path, value = problems[0], [], values
    for part in first["loc"]:
        if not (isinstance(value, dict) and part in value) and not (isinstance(value, list) and isinstance(part, int)):
            break  # the rest says which member of a union, or is the name of what is missing
        value = value[part]
        path.append(part)
    place = ".".join(str(part) for part in [*([key] if key else []), *path])
    if first["type"] == "extra_forbidden":
        for part in path[:-1]:
            inner = kind.model_fields[part].annotation if kind and part in kind.model_fields else None
            kind = inner if inspect.isclass(inner) and issubclass(inner, BaseModel) else None
        return ConfigError(f"{place}: unknown key{did_you_mean(path[-1], kind.model_fields if kind else ())}")
    if first["type"] == "missing":
        place = f"{place}.{first['loc'][-1]}" if place else str(first["loc"][-1])
        return ConfigError(f"{place}: must be given, as in {place}=VALUE")
    # Of a union's members each has its own complaint.
    alike = [p for p in problems if list(p["loc"][: len(path)]) == path]
    told = [p["msg"] for p in alike if p["type"] != "is_instance_of"] or [first["msg"]]
    said = list(dict.fromkeys(m.removeprefix("Value error, ").removeprefix("Input ") for m in told))
    text = ", or ".join([said[0][0].lower() + said[0][1:], *said[1:]])
    return ConfigError(f"{place}={_shown(value)}: {text}" if place else text)


def _shown(value: Any) -> str:
    """As one would write it on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _failure(error: BaseException) -> str:
    """An error of someone else's code in one line, with the place it comes from."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    file, line = (error.filename, error.lineno) if isinstance(error, SyntaxError) else (place.filename, place.lineno)
    return f"{type(error).__name__}: {_shorten(error)} ({Path(file or '?').name}:{line})"


def _by_path(word: str, folders: Sequence[Path], sweep: bool = False) -> str:
    """`model=PATH` → `model.path=PATH`, unless there is an option of that name; `~/` is the home folder.

    Args:
        sweep: commas part several paths.
    """
    key, _, value = word.partition("=")
    if value.startswith("~/"):
        value = str(Path(value).expanduser())
        word = f"{key}={value}"
    if key not in BY_PATH or not value or any(exists(f / key / f"{value}.yaml") for f in folders):
        return word
    if "/" in value or exists(value) or key == "model":
        plain = re.fullmatch(r"[\w./~,-]+" if sweep else r"[\w./~-]+", value) or value.startswith(("'", '"'))
        return f"{key}.path={value}" if plain else f"{key}.path='{value}'"
    return word


def explain(error: Exception, name: str, words: Sequence[str], folders: Sequence[Path]) -> ConfigError:
    """What Hydra found wrong with `words` for the config `name`, as one line with a suggestion."""
    from hydra.errors import MissingConfigException, OverrideParseException
    from yaml import YAMLError
    from yaml.error import MarkedYAMLError

    text = f"{error}\n{error.__cause__ or ''}"
    if isinstance(error, OverrideParseException):
        return ConfigError(f"{error.override}: {_unreadable(error.override)}")
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, chosen = error.missing_cfg_file.rpartition("/")
        options = sorted({p.stem for folder in folders for p in (folder / group).glob("*.yaml")})
        file = "file and no such " if group in BY_PATH else ""
        wrong = f"{group or 'config'}={chosen}"
        return ConfigError(f"{wrong}: there is no such {file}option{did_you_mean(chosen, options)}")
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return ConfigError(f"{mark.name}:{mark.line + 1}: not YAML: {error.problem}")
    if isinstance(error, YAMLError):
        return ConfigError(f"a config is not YAML: {_shorten(error)}")
    if "Config group override must be" in text:
        for word in words:
            group, _, value = word.partition("=")
            options = sorted({p.stem for folder in folders for p in (folder / group).glob("*.yaml")})
            if not group:
                return ConfigError(f"{word}: a setting is written KEY=VALUE")
            if options and value not in options:
                return ConfigError(f"{word}: is a choice between {', '.join(options)}")
    if unknown := re.search(r"Could not override '([^']+)'|Could not delete from config. '([^']+)'", text):
        exact = re.search(r"full_key: (\S+)", text)
        key = exact[1] if exact else unknown[1] or unknown[2]
        parent, _, leaf = key.rpartition(".")
        return ConfigError(f"{key}: unknown key{did_you_mean(leaf, _siblings(name, parent, words))}")
    if there := re.search(r"An item is already at '([^']+)'", text):
        return ConfigError(f"+{there[1]}: there is such a key already: leave out the +")
    if several := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return ConfigError(f"{several[1]}: a list is written [1,2]; to run with each value in turn, add -m")
    return ConfigError(_shorten(error))


def _unreadable(word: str) -> str:
    """What is wrong with a word that Hydra cannot parse."""
    key, equals, value = word.partition("=")
    if not equals:
        return "a setting is written KEY=VALUE"
    if not re.fullmatch(r"[~+]{0,2}[\w./@:-]+", key) or ".." in key or key.endswith("."):
        return f"'{key}' cannot be a key"
    if any(value.count(a) != value.count(b) for a, b in ("[]", "{}", "()")) or any(value.count(q) % 2 for q in "'\""):
        return "a bracket or quote in it is not closed"
    return "cannot be understood: put what holds spaces, brackets, commas or = in quotes, as in key=['a=1','b c']"


def _siblings(name: str, parent: str, words: Sequence[str]) -> list[str]:
    """Keys known beside a mistyped one, in the config without the words that set values."""
    from hydra import compose as hydra_compose

    groups = [w for w in words if "." not in w.split("=")[0] or w.startswith("hydra.searchpath")]
    for kept in (groups, []):
        try:
            with _hydra():
                config = hydra_compose(config_name=name, overrides=kept)
            node = OmegaConf.select(config, parent) if parent else config
            return [str(k) for k in node] if isinstance(node, DictConfig) else []
        except Exception:  # a suggestion is not worth a second error
            continue
    return []


def _full_key(error: Any) -> str:
    return str(getattr(error, "full_key", "") or "")


def _shorten(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines[:2]) if lines else type(error).__name__


def sweep_words(words: Sequence[str], own: Path | None) -> list[str]:
    """Command-line words for Hydra's own entry point: paths spelt out, the user's folder on the search path, and a
    folder for each combination, in the folder `out`, named after the values that vary.

    Raises:
        ConfigError: a word cannot be parsed.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    folders = [config_folder(), *([own] if own else [])]
    found = [_by_path(word, folders, sweep=True) for word in words]
    try:
        overrides = OverridesParser.create().parse_overrides(found)
    except HydraException as error:
        raise explain(error, "", found, folders) from error
    steady = [o.key_or_group for o in overrides if not o.is_sweep_override()]
    place = next((w.removeprefix("out=") for w in reversed(found) if w.startswith("out=")), "runs/${name}")
    ours = {
        "hydra.sweep.dir": place,
        "hydra.sweep.subdir": "${hydra:job.override_dirname}",
        "hydra.output_subdir": "null",  # a run's folder says itself what its settings are
        "hydra/job_logging": "none",
        "hydra.job.config.override_dirname.exclude_keys": f"[{','.join(dict.fromkeys(['out', *steady]))}]",
    }
    found = [w for w in found if not w.startswith("out=")]
    found += [f"{k}={v}" for k, v in ours.items() if not any(w.startswith(f"{k}=") for w in found)]
    if own is not None:
        found.append(f"hydra.searchpath=[file://{own.resolve()}]")
    return [*found, "out=${hydra:sweep.dir}/${hydra:sweep.subdir}"]


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
