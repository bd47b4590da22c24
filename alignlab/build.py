"""Settings and objects from a config's sections: checked, and what is wrong said in one line with its key."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ValidationError

from alignlab.core import AlignlabError, ConfigError, did_you_mean
from alignlab.core.errors import failure
from alignlab.core.settings import Settings, renamed

S = TypeVar("S", bound=Settings)

BY_NAME = ("hydra.utils.get_method", "hydra.utils.get_class", "hydra.utils.get_object")
"""Targets that stand for the object named by `path` itself."""


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


def build(values: Any, key: str, *arguments: Any, **given: Any) -> Any:
    """The object that `_target_` names, made with the other values; those that have a `_target_` themselves are
    built first. None for None.

    Args:
        arguments, given: what the target is called with besides the config's values.

    Raises:
        ConfigError: where there is no such object, or it refuses its values.
    """
    return _build(None, values, key, arguments, given)


def _build(kind: Any, values: Any, key: str, arguments: tuple[Any, ...], given: dict[str, Any]) -> Any:
    if values is None:
        return None
    if not isinstance(values, dict) or not values.get("_target_"):
        raise ConfigError(f"{key}._target_: must name a class, as in {key}._target_=my_module.MyClass")
    name, target = str(values["_target_"]), locate(values["_target_"], f"{key}._target_")
    if name not in BY_NAME:
        _check_target(kind, target, f"{key}._target_={name}")
    made = {k: _built(v, f"{key}.{k}") for k, v in values.items() if k != "_target_"}
    if name in BY_NAME and isinstance(made.get("path"), str):
        return locate(made["path"], f"{key}.path")
    made = _checked(target, made, key, len(arguments), given)
    try:
        return target(*arguments, **given, **made)
    except AlignlabError:
        raise
    except ValidationError as error:
        # Of settings that a constructor makes of a dictionary: find the one that it was.
        first = error.errors()[0]["loc"][:1]
        place = next((k for k, v in made.items() if isinstance(v, dict) and first and first[0] in v), None)
        nested, where = (made[place], f"{key}.{place}") if place else (made, key)
        kind = target if inspect.isclass(target) and issubclass(target, BaseModel) else None
        raise _invalid(error, nested, where, kind) from error
    except (Exception, SystemExit) as error:  # the target may be the user's own: say where it failed
        raise ConfigError(f"{key}._target_={name}: {failure(error)}") from error


def targets(values: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every `_target_` in a section: the key it is at, and what it names."""
    for name, value in values.items() if isinstance(values, dict) else enumerate(values):
        if name == "_target_":
            yield f"{key}._target_", str(value)
        elif isinstance(value, dict | list):
            yield from targets(value, f"{key}.{name}")


def check_ours(values: Any, key: str, advice: str) -> None:
    """Refuse a section that names anything but classes of alignlab, before anything of it is imported: a config may
    come from someone else.

    Raises:
        ConfigError: it does.
    """
    for place, name in targets(values, key):
        ours = re.fullmatch(r"alignlab(\.(?!_)\w+)+", name) is not None
        found = locate(name, place) if ours else None
        if not inspect.isclass(found) or found.__module__.partition(".")[0] != "alignlab":
            raise ConfigError(
                f"{place}={name}: is no class of alignlab, and the config that names it may be anyone's: {advice}"
            )


def build_type(kind: Any, values: Any, key: str, *arguments: Any, **given: Any) -> Any:
    """The object that `_target_` names, which must be what a Protocol asks for.

    Args:
        kind: a runtime-checkable Protocol, or a class.

    Raises:
        ConfigError: it lacks something, with what that is.
    """
    made = _build(kind, values, key, arguments, given)
    return made if made is None else check_type(kind, made, f"{key}._target_={values['_target_']}")


def _check_target(kind: Any, target: Any, where: str) -> None:
    """Refuse to call what can be none of the kind that is wanted: a config may come from someone else, and what it
    names would run.

    Raises:
        ConfigError: the target is a function of a library, a class of Python's own, or lacks the kind's methods.
    """
    if inspect.isfunction(target) and (_is_own(target) if kind is None else target.__module__.startswith("alignlab.")):
        return  # makes a part of a part; of ours, as a benchmark's reward, any: what they return is checked
    if not inspect.isclass(target):
        raise ConfigError(f"{where}: not a class; a function is named by _target_=hydra.utils.get_method and path=…")
    if kind is not None and not getattr(kind, "_is_protocol", False):
        if not issubclass(target, kind):
            package = ".".join(kind.__module__.split(".")[:2])
            raise ConfigError(f"{where}: not a subclass of {package}.{kind.__name__}")
    elif kind is not None:
        methods = [n for n in _attributes(kind) if inspect.isfunction(getattr(kind, n, None))]
        if not all(hasattr(target, n) for n in methods):
            missing = sorted(n for n in _attributes(kind) if not hasattr(target, n))
            raise ConfigError(f"{where}: not a {kind.__name__}: it has no {', '.join(missing)}")
    if target.__module__.partition(".")[0] in sys.stdlib_module_names:
        raise ConfigError(f"{where}: a class of Python's own library, which nothing here is made of")


def _is_own(function: Any) -> bool:
    """Whether a function is ours or the user's: not of Python's library, nor of a package that is installed."""
    package = function.__module__.partition(".")[0]
    if package == "alignlab":
        return True
    return package not in sys.stdlib_module_names and package not in importlib.metadata.packages_distributions()


def _attributes(kind: Any) -> set[str]:
    """What a Protocol asks for."""
    return getattr(kind, "__protocol_attrs__", None) or {n for n in dir(kind) if not n.startswith("_")}


def check_type(kind: Any, made: Any, where: str) -> Any:
    """The object, which must be what a Protocol asks for.

    Args:
        where: the setting that named it, as on the command line.

    Raises:
        ConfigError: it lacks something, with what that is.
    """
    try:
        if isinstance(made, kind):  # which reads its properties
            return made
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{where}: {failure(error)}") from error
    missing = sorted(name for name in _attributes(kind) if not hasattr(made, name))
    what = f"it has no {', '.join(missing)}" if missing else f"it is a {type(made).__name__}"
    raise ConfigError(f"{where}: not a {kind.__name__}: {what}")


def check_objects(kind: Any, objects: Iterable[Any], where: str) -> list[Any]:
    """Objects that were made in Python, as a list.

    Raises:
        ConfigError: one is a class, or lacks something that the Protocol `kind` asks for.
    """
    found = list(objects)
    for each in found:
        if inspect.isclass(each):
            raise ConfigError(f"{where}: {each.__name__} is a class; an object is wanted: {each.__name__}(…)")
        check_type(kind, each, f"{where}: {type(each).__name__}")
    return found


EXTRAS = {"optimi": "kahan"}
"""Modules that configs of ours name and that not everyone has, by the extra that installs them."""


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
                raise ConfigError(f"{where}: importing {module} failed: {failure(error)}") from error
            if i == 0:
                install = (
                    f"pip install 'alignlab[{EXTRAS[part]}]'" if part in EXTRAS else "is its folder on PYTHONPATH?"
                )
                raise ConfigError(f"{where}: there is no module '{part}': {install}") from error
            there = [n for n, v in vars(found).items() if n[0] != "_" and (inspect.isclass(v) or inspect.isroutine(v))]
            near = did_you_mean(part, there)
            near = "" if near.startswith("; known") and len(there) > 10 else near
            raise ConfigError(f"{where}: {'.'.join(parts[:i])} has no '{part}'{near}") from error
        except (Exception, SystemExit) as error:  # the user's module
            raise ConfigError(f"{where}: importing {module} failed: {failure(error)}") from error
    return found


def parameters_of(name: str) -> frozenset[str] | None:
    """What the class of that name is made with; None where it takes any, or there is no such class."""
    try:
        parameters = inspect.signature(locate(name, "_target_")).parameters.values()
    except (AlignlabError, TypeError, ValueError):  # said where it is built
        return None
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters) else frozenset(p.name for p in parameters)


def _built(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return build(value, key) if "_target_" in value else {k: _built(v, f"{key}.{k}") for k, v in value.items()}
    return [_built(v, f"{key}.{i}") for i, v in enumerate(value)] if isinstance(value, list) else value


def _checked(target: Any, values: dict[str, Any], key: str, first: int, given: Collection[str]) -> dict[str, Any]:
    """The keywords for a call of `target`, held against its signature and its type hints.

    Args:
        first: how many arguments it gets by position.
        given: names of those that it gets besides the values.
    """
    from pydantic import ConfigDict, TypeAdapter

    try:
        parameters = list(inspect.signature(target).parameters.values())[first:]
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (TypeError, ValueError, NameError):  # built in, or its hints cannot be understood
        return values
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {p.name: p for p in parameters if p.kind in kinds and p.name not in given}
    for name in values:
        if name not in named and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            raise ConfigError(f"{key}.{name}: unknown key{renamed(f'{key}.{name}') or did_you_mean(name, named)}")
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in values:
            raise ConfigError(f"{key}.{name}: must be given, as in {key}.{name}=VALUE")
    checked = dict(values)
    for name in values.keys() & hints.keys():
        try:
            adapter = TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))
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
        hint = renamed(place) or did_you_mean(path[-1], kind.model_fields if kind else ())
        return ConfigError(f"{place}: unknown key{hint}")
    if first["type"] == "missing":
        place = f"{place}.{first['loc'][-1]}" if place else str(first["loc"][-1])
        return ConfigError(f"{place}: must be given, as in {place}=VALUE")
    # Of a union's members each has its own complaint.
    alike = [p for p in problems if list(p["loc"][: len(path)]) == path]
    told = [p["msg"] for p in alike if p["type"] != "is_instance_of"] or [first["msg"]]
    said = list(dict.fromkeys(m.removeprefix("Value error, ").removeprefix("Input ") for m in told))
    text = ", or ".join([said[0][0].lower() + said[0][1:], *said[1:]])
    if isinstance(value, dict):  # a rule about several of its keys, which names them
        return ConfigError(f"{place}: {text}" if place else text)
    return ConfigError(f"{place}={_shown(value)}: {text}" if place else text)


def _shown(value: Any) -> str:
    """As one would write it on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
