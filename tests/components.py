"""Outside components: what is not installed skips its tests, unless ALIGNLAB_REQUIRE_COMPONENTS=1 asks for all."""

from __future__ import annotations

import importlib
import os
from typing import Any, NoReturn

import pytest


def need(name: str) -> Any:
    """The module; at a test file's top, or in a test."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing(f"{name} cannot be imported here: {error}")


def missing(what: str) -> NoReturn:
    """Skip the test or the file for what is missing; with ALIGNLAB_REQUIRE_COMPONENTS=1 fail."""
    if os.environ.get("ALIGNLAB_REQUIRE_COMPONENTS") == "1":
        pytest.fail(f"{what}; ALIGNLAB_REQUIRE_COMPONENTS=1 asks for all components")
    pytest.skip(what, allow_module_level=True)
