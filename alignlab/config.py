"""From overrides on the command line to settings: Hydra composes, pydantic checks, errors are one line."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from os.path import exists  # unlike Path's, False for what may not be looked at
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from alignlab.core import AlignlabError, ConfigError, did_you_mean
from alignlab.core.errors import shorten
from alignlab.core.files import read_text
from alignlab.core.secrets import notice, take_back, without_secrets
from alignlab.core.settings import renamed

BY_PATH = ("model", "data")
"""Groups whose value may be a path: `model=PATH` means `model.path=PATH`."""

OPEN = re.compile(r"(launcher\.(stages|additional_parameters)|callbacks|data\.fields|scoring\.normalize_data)[.=]")
"""Settings whose keys the user makes up, which Hydra takes only when told so."""


LARGEST = 100_000
"""Values that a config may hold, its aliases written out; a run has about a hundred."""


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
        own: a folder of the user's configs, laid out as ours, searched beside ours.

    Raises:
        ConfigError: an unknown key or option, with what is known and near; a config that is not YAML.
    """
    from hydra import compose as hydra_compose
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    folders = [config_folder(), *([own] if own else [])]
    given = [w for override in overrides for w in _several(_by_path(override, folders))]
    given = [_of_new_class(word, _targets(given)) for word in given]
    if own is not None:
        given.append(_search_path(own))
    with hydra_ready():
        try:
            config = hydra_compose(config_name=name, overrides=given)
        except (HydraException, OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
            raise explain(error, name, given, folders) from error
    check_keys([str(key) for key in config], name)
    _without_leftovers(config, given)
    return config


def _targets(overrides: Sequence[str]) -> dict[str, str]:
    """Sections whose class is given by an override: section → class."""
    found = (re.fullmatch(r"\+{0,2}([\w.]+)\._target_=(.+)", word) for word in overrides)
    return {match[1]: match[2] for match in found if match}


def _of_new_class(word: str, targets: Collection[str]) -> str:
    """`schedule.power=2` → `++schedule.power=2` beside a `schedule._target_=…`: a key that the default option lacks."""
    key = word.partition("=")[0]
    return f"++{word}" if any(key.startswith(f"{t}.") and key != f"{t}._target_" for t in targets) else word


def _without_leftovers(config: DictConfig, overrides: Sequence[str]) -> None:
    """Drop keys of the option that `GROUP._target_=CLASS` took the place of which the new class does not take."""
    from alignlab.build import parameters_of

    for place, target in _targets(overrides).items():
        section, taken = OmegaConf.select(config, place), parameters_of(target)
        if taken is None or not isinstance(section, DictConfig):
            continue
        words = [w.lstrip("+").removeprefix(f"{place}.") for w in overrides if w.lstrip("+").startswith(f"{place}.")]
        kept = {"_target_", *taken, *(re.split(r"[.=]", word)[0] for word in words)}
        for key in [str(k) for k in section if k not in kept]:
            with open_dict(section):
                del section[key]


def check_keys(keys: Collection[str], name: str, where: str = "") -> None:
    """Refuse top-level keys that the config `name` lacks, and the lack of one that it has.

    Args:
        where: put before the message, as in "--from=FILE: ".

    Raises:
        ConfigError: there is such a key.
    """
    keys_of_its_own, sections = top_level(name)
    known = keys_of_its_own | sections
    for key in keys:
        if key not in known and key != "hydra":
            raise ConfigError(f"{where}{key}: unknown key{renamed(key) or did_you_mean(key, known)}")
    if missing := sorted(known - set(keys)):
        raise ConfigError(f"{where}{missing[0]}: is missing: `alignlab {name}` needs it")


@cache
def top_level(name: str) -> tuple[frozenset[str], frozenset[str]]:
    """Top-level keys of our config `name`: those in its file, and the sections that its groups fill."""
    folder = config_folder()
    values = read_yaml(folder / f"{name}.yaml")
    keys, sections = set(values) - {"defaults", "hydra"}, set[str]()
    for entry in values.get("defaults", []):
        if isinstance(entry, str):
            if entry != "_self_":
                base = top_level(entry)
                keys, sections = keys | base[0], sections | base[1]
            continue
        group = next(iter(entry)).removeprefix("override ").removeprefix("/")
        options = [option.read_text(encoding="utf-8") for option in (folder / group).glob("*.yaml")]
        if any("@package _global_" not in text or f"\n{group}:" in text for text in options):
            sections.add(group)
    return frozenset(keys), frozenset(sections)


def resolve(config: DictConfig) -> dict[str, Any]:
    """The config as plain values, interpolations resolved.

    Raises:
        ConfigError: where a value that must be given is missing.
    """
    from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = _full_key(error) or "a key"
        raise ConfigError(f"{key}: must be given, as in {key}=VALUE") from error
    except InterpolationKeyError as error:
        raise ConfigError(f"{_full_key(error)}: {str(error).splitlines()[0]}") from error
    except (OmegaConfBaseException, RecursionError) as error:
        what = "refers to itself in a circle" if "ecursi" in str(error) else shorten(error).partition("; full_key")[0]
        raise ConfigError(f"{_full_key(error) or 'a reference (${…})'}: {what}") from error
    assert isinstance(plain, dict)
    notice(plain)
    return {str(k): v for k, v in plain.items()}


def _search_path(own: Path) -> str:
    """The word that has Hydra look in the user's folder too.

    Raises:
        ConfigError: there is no such folder, or one of its files has the name of one of ours, which Hydra would take.
    """
    if not own.is_dir():
        raise ConfigError(f"--config-dir {own}: there is no such folder")
    for path in sorted(own.glob("**/*.yaml")):
        name = path.relative_to(own)
        if (config_folder() / name).exists():
            raise ConfigError(f"{path}: alignlab has a file {name} of its own, which would be taken instead: rename it")
        if path.is_file():
            read_yaml(path)
    place = str(own.resolve()).replace("\\", "\\\\").replace("'", "\\'")
    return f"hydra.searchpath=['file://{place}']"


@contextmanager
def hydra_ready() -> Iterator[None]:
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
    """The config for people to read, without secrets, interpolations resolved where what they refer to is given."""
    from omegaconf.errors import OmegaConfBaseException

    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException:
        plain = OmegaConf.to_container(config)
    return OmegaConf.to_yaml(OmegaConf.create(without_secrets(plain)))


def _by_path(word: str, folders: Sequence[Path]) -> str:
    """`model=PATH` → `model.path=PATH`, unless there is an option of that name; `~/` is the home folder."""
    key, _, value = word.partition("=")
    if OPEN.match(word):
        a_file = key == "callbacks" and any(exists(f / key / f"{value}.yaml") for f in folders)
        return f"+{word}" if a_file else f"++{word}"
    if value.startswith("~/"):
        value = str(Path(value).expanduser())
        word = f"{key}={value}"
    if key not in BY_PATH or not value or any(exists(f / key / f"{value}.yaml") for f in folders):
        return word
    if "/" in value or exists(value) or key == "model":
        plain = re.fullmatch(r"[\w./~-]+", value) or value.startswith(("'", '"'))
        return f"{key}.path={value}" if plain else f"{key}.path='{value}'"
    return word


def _several(word: str) -> list[str]:
    """`scoring=[a,b]` → the option a as `scoring.a` and b as `scoring.b`; Hydra would merge them into one."""
    found = re.fullmatch(r"scoring=\[([\w-]+(?:,[\w-]+)+)\]", word)
    return [f"+scoring@scoring.{name}={name}" for name in found[1].split(",")] if found else [word]


def explain(error: Exception, name: str, overrides: Sequence[str], folders: Sequence[Path]) -> ConfigError:
    """What Hydra found wrong with `overrides` for the config `name`, as one line with a suggestion."""
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
        return ConfigError(f"a config is not YAML: {shorten(error)}")
    if isinstance(error, TypeError):
        listed = next((o for o in overrides if re.match(r"[\w/]+=\[\s*\{", o)), None)
        if listed is None:
            raise error
        key = listed.partition("=")[0]
        return ConfigError(f"{listed}: options are listed, as in {key}=[a,b]; a class is +{key}.NAME._target_=CLASS")
    if "Config group override must be" in text:
        for override in overrides:
            group, _, value = override.partition("=")
            options = sorted({p.stem for folder in folders for p in (folder / group).glob("*.yaml")})
            if not group:
                return ConfigError(f"{override}: a setting is written KEY=VALUE")
            if options and value not in options:
                return ConfigError(f"{override}: is a choice between {', '.join(options)}")
            kind = type(_plain(value)).__name__
            if options and kind != "str":
                return ConfigError(
                    f"{override}: {value} is read as a {kind}, not as a name: rename {group}/{value}.yaml"
                )
    if unknown := re.search(r"Could not override '([^']+)'|Could not delete from config. '([^']+)'", text):
        exact = re.search(r"full_key: (\S+)", text)
        key = exact[1] if exact else unknown[1] or unknown[2]
        parent, _, leaf = key.rpartition(".")
        known = _siblings(name, parent, overrides)
        inside = next((f"{parent}.{k}.{leaf}" for k, v in known.items() if isinstance(v, dict) and leaf in v), None)
        if inside and parent:
            return ConfigError(f"{key}: unknown key; did you mean '{inside}'?")
        chosen = next((w for w in overrides if parent and w.startswith(f"{parent}=")), None)
        near = renamed(key) or did_you_mean(leaf, known)
        if option := _option_with(parent, leaf, folders):
            if chosen:
                return ConfigError(f"{key}: unknown key of {chosen}{near}; {option} has it")
            return ConfigError(f"{key}: is a key of {option}: add {option}")
        return ConfigError(f"{key}: unknown key{near}")
    if there := re.search(r"An item is already at '([^']+)'", text):
        return ConfigError(f"+{there[1]}: there is such a key already: leave out the +")
    if several := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return ConfigError(f"{several[1]}: a list is written [1,2]; to run with each value in turn, add -m")
    return ConfigError(shorten(error))


def _plain(value: str) -> Any:
    """What Hydra makes of a value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(f"key={value}").value()


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


def _option_with(group: str, key: str, folders: Sequence[Path]) -> str:
    """An option of a group, as `group=option`, that has a key which the one chosen lacks; "" where none has."""
    for path in sorted(p for folder in folders for p in (folder / group).glob("*.yaml")) if group else ():
        if re.search(rf"^{re.escape(key)}:", path.read_text(), re.MULTILINE):
            return f"{group}={path.stem}"
    return ""


def _siblings(name: str, parent: str, overrides: Sequence[str]) -> dict[str, Any]:
    """What is known beside a mistyped key, in the config without the overrides that set values."""
    from hydra import compose as hydra_compose

    groups = [w for w in overrides if "." not in w.split("=")[0].split("@")[0] or w.startswith("hydra.searchpath")]
    for kept in (groups, []):
        try:
            with hydra_ready():
                config = hydra_compose(config_name=name, overrides=kept)
            node = OmegaConf.select(config, parent) if parent else config
            plain = OmegaConf.to_container(node) if isinstance(node, DictConfig) else {}
            return {str(k): v for k, v in plain.items()} if isinstance(plain, dict) else {}
        except Exception:  # a suggestion is not worth a second error
            continue
    return {}


def _full_key(error: Any) -> str:
    return str(getattr(error, "full_key", "") or "")


def read_saved(path: Path) -> dict[str, Any]:
    """A resolved config of a training run, as `alignlab train` leaves it.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    values = read_yaml(path, advice="name the config.yaml of a run")
    check_keys(values, "train", f"{path}: ")
    for key in top_level("train")[1]:
        if not isinstance(values[key], dict | None):
            raise ConfigError(f"{path}: {key}: must be a section with keys")
    found: dict[str, Any] = take_back(values, str(path))
    return found


def read_yaml(path: Path, *sections: str, advice: str = "mend it") -> dict[str, Any]:
    """A config file as it is, without what its `defaults` name.

    Args:
        sections: that it must have.
        advice: what to do where it is damaged.

    Raises:
        ConfigError: it cannot be read or is no YAML of sections, with its name and the line.
    """
    import yaml

    try:
        values = yaml.safe_load(read_text(path, advice))
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise ConfigError(f"{path}{line}: not YAML: {error.problem}: {advice}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply: {advice}") from error
    except (ValueError, yaml.YAMLError) as error:  # of a date that is none
        raise ConfigError(f"{path}: cannot be read: {shorten(error)}: {advice}") from error
    except AlignlabError as error:
        raise ConfigError(str(error)) from error
    if _size(values, {}) > LARGEST:
        raise ConfigError(f"{path}: its aliases (*name) stand for more than {LARGEST:,} values: {advice}")
    if not isinstance(values, dict | None):
        kind = type(values).__name__
        raise ConfigError(f"{path}: not a config: must hold keys and values; it holds a {kind}: {advice}")
    for name in sections:
        if not isinstance((values or {}).get(name), dict):
            raise ConfigError(f"{path}: damaged: it has no section '{name}': {advice}")
    return {str(key): value for key, value in (values or {}).items()}


def _size(value: Any, known: dict[int, float]) -> float:
    """How many values there are once aliases are written out; infinite where one holds itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(value)]
