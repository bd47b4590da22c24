"""Base of every settings class: typed, ranged, closed to unknown keys.

The YAML files in `configs/` give each setting its default and its one-line meaning; the classes give its type and
range. `alignlab.config` turns what pydantic finds wrong into one line with the key as written on the command line.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A section of the config."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), arbitrary_types_allowed=True)
