"""Recognising keys and passwords, which must not stand in a config, a log or a record of a run.

What is under a key that names a secret, what an environment variable holds whose name says so, and what looks like the
key of a well-known service is replaced by `<secret>` in all that is written and said. Processes that work on a config
which was written down get its secrets by their environment: there, `<secret:VARIABLE>` stands for them.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from alignlab.core.errors import ConfigError

HIDDEN = "<secret>"
STANDS_FOR = re.compile(r"<secret(?::(\w+))?>")

SECRET_KEY = re.compile(
    r"(?:^|[./+-])token$"
    r"|(?:^|[._/+-])(?:(?:hf|hub|auth|access|api|bearer|secret|wandb|github|openai)[_-]?token"
    r"|(?:api|access|private|secret)[_-]?key|secret|passw(?:or)?d|passphrase|credentials?|authorization)$",
    re.IGNORECASE,
)
"""Names whose values are secrets: `api_key`, `hf_token`, `--token`; not `eos_token`, `max_tokens` or `tokenizer`."""
SECRET_VALUE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|(?:sk|pk|rk)-[A-Za-z0-9_\-]{16,}|wandb_v1_\w{16,}|gh[pousr]_[A-Za-z0-9]{16,}"
    r"|github_pat_\w{16,}|AKIA[A-Z0-9]{12,})|(?<=://)[^/\s@]+:[^/\s@]+(?=@)"
)
"""Values that are secrets under any key: keys of well-known services, user and password in a URL."""

SECRET_VARIABLE = re.compile(r"(?:^|_)(?:TOKEN|(?:API)?KEY|SECRET|PASSW(?:OR)?D|PASSPHRASE)$", re.IGNORECASE)
"""Names of environment variables that hold secrets."""
SHORTEST = 8
"""Characters of a secret that is looked for in texts: a shorter one may stand anywhere."""
PLAIN_WORD = re.compile(r"[a-z_]{1,15}")
"""Not looked for in texts, though a variable holds it: results in which "training" were hidden would be lost."""
PASSED_ON = "ALIGNLAB_SECRET_"
"""How the variables begin that hand secrets on to the processes of a run."""
INLINE = re.compile(r"(?P<key>[\w./+-]+)(?P<is>['\"]?\s*[:=]\s*)(?P<value>[^,{}\[\]]+)")
"""A key and its value inside an argument, as in `judge={url:URL,api_key:KEY}`."""

_noticed: set[str] = set()


def notice(config: Any, key: str = "") -> None:
    """Remember what stands under keys that name secrets, so that `hide` knows it. Also of a command line: a list of
    overrides."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            notice(value, str(name))
    elif isinstance(config, list | tuple):
        for value in config:
            notice(value, key)
    elif SECRET_KEY.search(key) and _hides(config):
        _noticed.update({str(config)} if len(str(config)) >= SHORTEST and not STANDS_FOR.fullmatch(str(config)) else ())
    elif isinstance(config, str):
        for found in INLINE.finditer(config):
            if SECRET_KEY.search(found["key"]):
                notice(found["value"].strip("'\" "), found["key"])


def _hides(value: Any) -> bool:
    """Whether a value under a key that names secrets is one: `token: 5` is not."""
    return isinstance(value, str) or (isinstance(value, int | float) and len(str(value)) >= SHORTEST)


def hide(text: str) -> str:
    """A text without what is known to be a secret, or looks like one."""
    found = {v for n, v in os.environ.items() if SECRET_VARIABLE.search(n) or n.startswith(PASSED_ON)}
    for secret in sorted(_noticed | {v.strip() for v in found}, key=len, reverse=True):
        if len(secret) >= SHORTEST and not PLAIN_WORD.fullmatch(secret):
            text = text.replace(secret, HIDDEN)
    return SECRET_VALUE.sub(HIDDEN, text)


def hide_in_logs() -> None:
    """Have all that this process logs go through `hide`."""
    factory = logging.getLogRecordFactory()
    if getattr(factory, "hides", False):
        return

    def make(*arguments: Any, **more: Any) -> logging.LogRecord:
        record = factory(*arguments, **more)
        said = record.getMessage()
        if (clean := hide(said)) != said:
            record.msg, record.args = clean, None
        return record

    make.hides = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make)


def redact(arguments: Iterable[str]) -> list[str]:
    """Command-line arguments with what looks like a secret taken out: `judge.api_key=<secret>`."""
    clean: list[str] = []
    hide_next = False
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if hide_next:
            clean.append(HIDDEN)
        elif equals and SECRET_KEY.search(key):
            clean.append(f"{key}={HIDDEN}")
        else:
            clean.append(hide(INLINE.sub(_hide_inline, argument)))
        hide_next = argument.startswith("--") and not equals and bool(SECRET_KEY.search(key))
    return clean


def _hide_inline(found: re.Match[str]) -> str:
    return f"{found['key']}{found['is']}{HIDDEN}" if SECRET_KEY.search(found["key"]) else found[0]


def without_secrets(config: Any, key: str = "") -> Any:
    """A copy of a config (nested mappings and lists) with what looks like a secret taken out."""
    if isinstance(config, Mapping):
        return {name: without_secrets(value, str(name)) for name, value in config.items()}
    if isinstance(config, list | tuple):
        return redact(config) if all(isinstance(v, str) for v in config) else [without_secrets(v) for v in config]
    if SECRET_KEY.search(key) and _hides(config):
        return HIDDEN
    return hide(config) if isinstance(config, str) else config


def set_aside(config: Any, key: str = "") -> Any:
    """A copy of a config to be written down for processes that this one starts: its secrets go into the environment,
    and `<secret:VARIABLE>` stands for them."""
    if isinstance(config, Mapping):
        return {name: set_aside(value, str(name)) for name, value in config.items()}
    if isinstance(config, list | tuple):
        return [set_aside(value) for value in config]
    if STANDS_FOR.fullmatch(str(config)) or without_secrets(config, key) == config:
        return config
    known = (n for n, v in os.environ.items() if v == str(config))
    name = next(known, f"{PASSED_ON}{sum(n.startswith(PASSED_ON) for n in os.environ) + 1}")
    os.environ[name] = str(config)
    return f"<secret:{name}>"


def take_back(config: Any, where: str, key: str = "") -> Any:
    """The config that `set_aside` was given.

    Args:
        where: what it was read from, for messages.

    Raises:
        ConfigError: a secret is not in the environment.
    """
    if isinstance(config, Mapping):
        return {n: take_back(value, where, f"{key}.{n}" if key else str(n)) for n, value in config.items()}
    if isinstance(config, list):
        return [take_back(value, where, key) for value in config]
    found = STANDS_FOR.fullmatch(config) if isinstance(config, str) else None
    if found is None:
        return config
    if found[1] is None or found[1] not in os.environ:
        raise ConfigError(f"{where}: {key}: this secret was not written down: start the command that gave it again")
    return os.environ[found[1]]


def find_secret(value: Any, key: str, known: str = "") -> str | None:
    """The key, as written on the command line, of a value that looks like a secret; None if there is none.

    Args:
        value: a string, a number, or mappings and lists of them.
        key: the key of `value` itself.
        known: a secret to look for; "": none.
    """
    if isinstance(value, Mapping):
        for name, inner in value.items():
            place = f"{key}.{name}"
            if isinstance(inner, str) and SECRET_KEY.search(str(name)):
                return place
            if (found := find_secret(inner, place, known)) is not None:
                return found
        return None
    if isinstance(value, list | tuple):
        return next((p for i, v in enumerate(value) if (p := find_secret(v, f"{key}.{i}", known))), None)
    if isinstance(value, str) and (SECRET_VALUE.search(value) or (known and known in value)):
        return key
    return None
