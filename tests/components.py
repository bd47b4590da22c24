"""Outside components: what is not installed skips its tests, unless ALIGNLAB_REQUIRE_COMPONENTS=1 asks for all."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest


def need(name: str) -> Any:
    """The module; at a test file's top, or in a test."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if os.environ.get("ALIGNLAB_REQUIRE_COMPONENTS") == "1":
            pytest.fail(f"{name} cannot be imported ({error}), and ALIGNLAB_REQUIRE_COMPONENTS=1 asks for it")
        pytest.skip(f"needs {name}, which cannot be imported here: {error}", allow_module_level=True)
