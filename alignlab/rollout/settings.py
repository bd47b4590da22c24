"""The `rollout` section of the config: what all engines have, what is sampled, which server samples."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from alignlab.core import RolloutContext, Sampler
from alignlab.core.settings import Settings


class BaseRollout(Settings):
    """Base class of rollout engines; a subclass needs only `sampler`. See `alignlab.core.RolloutEngine`.

    Its annotated attributes are its keys in the config's section `rollout`.
    """

    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)

    @property
    def importance_cap(self) -> float | None:
        return None

    @property
    def off_policy(self) -> bool:
        return False

    @property
    def prefetches(self) -> bool:
        return False

    def check(self, config: Mapping[str, Any], algorithm: Any) -> None:
        """Nothing is refused."""

    def start(self, context: RolloutContext) -> AbstractContextManager[Any]:
        return nullcontext()

    def sampler(self, policy: Any) -> Sampler:
        raise NotImplementedError(f"{type(self).__name__} does not define sampler")


class RolloutSettings(BaseRollout):
    """What responses are drawn, when they end, how much is drawn at a time.

    The filters apply in the order temperature, top_k, top_p, min_p. Tokens in `stop_tokens` and `suppress_tokens` are
    ids, or entries of the tokenizer's vocabulary as text.
    """

    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    max_new_tokens: int = Field(128, ge=1)
    min_new_tokens: int = Field(0, ge=0)
    stop: list[Annotated[str, StringConstraints(min_length=1)]] = Field(default_factory=list)
    stop_tokens: list[int | str] = Field(default_factory=list)
    suppress_tokens: list[int | str] = Field(default_factory=list)
    max_batch_tokens: int = Field(16384, ge=1)

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens={self.min_new_tokens} exceeds max_new_tokens={self.max_new_tokens}")
        return self

    @property
    def unfiltered(self) -> bool:
        """Whether responses are drawn from the model's own distribution, at the temperature, whatever the tokens."""
        filters = self.top_k or self.top_p < 1 or self.min_p
        return not (filters or self.min_new_tokens or self.suppress_tokens or self.temperature == 0)


class VllmSettings(Settings):
    """The section `rollout.vllm`: which servers sample, how they are started, how they get weights, and how samples are
    corrected that come from another policy than the trainer's.

    Attributes:
        importance_cap: C of truncated importance weights min(π_old/π_behaviour, C); None: no weights.
        asynchronous: whether an iteration's responses are drawn while the one before it trains.
    """

    url: str | None = Field(None, pattern=r"^https?://[^/\s]+/?$")
    shared_dir: str | None = None
    python: str | None = None
    port: int | None = Field(None, ge=1, le=65535)
    devices: str | None = Field(None, pattern=r"^[^,\s]+(,[^,\s]+)*$")
    tensor_parallel: int = Field(1, ge=1)
    replicas: int | None = Field(None, ge=1)
    memory: float | None = Field(None, gt=0, lt=1)
    sleep: Literal["auto", 0, 1, 2] = "auto"
    transfer: Literal["auto", "disk", "ipc", "nccl"] = "auto"
    arguments: list[str] = Field(default_factory=list)
    start_timeout: float = Field(600.0, gt=0)
    timeout: float = Field(600.0, gt=0)
    importance_cap: float | None = Field(None, gt=0)
    asynchronous: bool = False

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.url is not None:
            of_ours = ("devices", "replicas", "memory", "port")
            given = next((n for n in of_ours if getattr(self, n) is not None), None)
            given = given or ("tensor_parallel" if self.tensor_parallel > 1 else None)
            given = given or ("sleep" if self.sleep in (1, 2) else None)
            if given is not None:
                raise ValueError(f"{given} is about servers that the run starts, url names one that runs: give one")
            if self.transfer == "ipc":
                raise ValueError("transfer=ipc is for servers that the run starts on its own GPUs: leave url out")
        if self.asynchronous and self.sleep in (1, 2):
            raise ValueError(f"sleep={self.sleep}: with asynchronous the server samples while the run trains: use 0")
        if self.transfer == "ipc" and self.devices is not None:
            raise ValueError("transfer=ipc is for a server on the trainer's own GPU: leave out devices, or use nccl")
        if self.transfer == "ipc" and self.port is not None:
            raise ValueError("transfer=ipc: others on this host could reach the server by its port: leave port out")
        if self.port is not None and (self.replicas or 1) > 1:
            raise ValueError(f"port={self.port}: {self.replicas} replicas cannot share it: leave it out")
        if self.devices is not None and self.replicas is not None:
            wanted, there = self.replicas * self.tensor_parallel, len(self.devices.split(","))
            if wanted > there:
                raise ValueError(f"devices={self.devices}: replicas × tensor_parallel = {wanted} need {wanted} GPUs")
        return self
