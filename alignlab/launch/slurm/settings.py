"""What a run asks of a Slurm cluster: group `launcher`, option `slurm`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from alignlab.core import ConfigError
from alignlab.core.settings import Settings


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
