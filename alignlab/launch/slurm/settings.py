"""What a run asks of a Slurm cluster: group `launcher`, option `slurm`."""

from __future__ import annotations

import re
import unicodedata
from typing import Any, Literal

from pydantic import Field

from alignlab.core import ConfigError
from alignlab.core.settings import Settings

CONTROL = ("Cc", "Cs", "Zl", "Zp")
"""Kinds of characters that no line of a script may hold: of control, halves of a pair, ends of lines and paragraphs."""


def check_script(value: Any, key: str) -> None:
    """Refuse what would not stay in its line of a batch script, where the next line is run. Called with everything
    that goes into one.

    Args:
        value: a text, or lists and dictionaries of them.
        key: where it stands in the config.

    Raises:
        ConfigError: a text holds a line end or another control character, or the name of an option is none.
    """
    if isinstance(value, dict):
        for name, inner in value.items():
            if not re.fullmatch(r"[A-Za-z][\w-]*", str(name)):
                raise ConfigError(f"{key}.{str(name)!r}: is no name of an option of sbatch")
            check_script(inner, f"{key}.{name}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            check_script(inner, f"{key}.{i}")
    elif isinstance(value, str) and (wrong := [c for c in value if unicodedata.category(c) in CONTROL]):
        raise ConfigError(f"{key}={value!r}: holds {wrong[0]!r}, and must be one line of a batch script: leave it out")


class SlurmSettings(Settings):
    """Group `launcher`, option `slurm`: resources by submitit's names, for sweeps and for `alignlab submit` alike."""

    kind: Literal["slurm"] = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodes: int = Field(1, ge=1)
    gpus_per_node: int = Field(1, ge=0)
    cpus_per_task: int = Field(4, ge=1)
    mem_gb: float = Field(32, gt=0)
    timeout_min: int = Field(240, ge=1)
    signal_delay_s: int = Field(120, ge=1)
    array_parallelism: int = Field(256, ge=1)
    additional_parameters: dict[str, Any] = Field(default_factory=dict)
    setup: list[str] = Field(default_factory=list)
    prefix: list[str] = Field(default_factory=list)
    python: str | None = None
    stages: dict[str, dict[str, Any]] = Field(default_factory=dict)

    def processes_per_node(self, processes: int | None) -> int:
        """How many processes a distributed run has on each node: its share of `processes`, else one for each GPU.

        Raises:
            ConfigError: the processes cannot be spread evenly.
        """
        if processes is None:
            return max(1, self.gpus_per_node)
        if processes % self.nodes:
            raise ConfigError(f"distributed.processes={processes}: cannot be spread evenly over {self.nodes} nodes")
        return processes // self.nodes
