"""Recognising keys and passwords, which must not stand in a config, a log or a record of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "<secret>"

SECRET_KEY = re.compile(
    r"(?:^|[./+-])token$"
    r"|(?:^|[._/+-])(?:(?:hf|hub|auth|access|api|bearer|secret|wandb|github|openai)[_-]?token"
    r"|(?:api|access|private|secret)[_-]?key|secret|passw(?:or)?d|credentials?|authorization)$",
    re.IGNORECASE,
)
"""Names whose values are secrets: `api_key`, `hf_token`, `--token`; not `eos_token`, `max_tokens` or `tokenizer`."""
SECRET_VALUE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|(?:sk|pk|rk)-[A-Za-z0-9_\-]{16,}|wandb_v1_\w{16,}|gh[pousr]_[A-Za-z0-9]{16,}"
    r"|github_pat_\w{16,}|AKIA[A-Z0-9]{12,})|(?<=://)[^/\s@]+:[^/\s@]+(?=@)"
)
"""Values that are secrets under any key: keys of well-known services, user and password in a URL."""


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
