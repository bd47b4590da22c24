"""What a run knows of itself beside its weights, and how the whole of it goes to disk and comes back."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alignlab.core import AlignlabError, Group, Response
from alignlab.models import Reference
from alignlab.training.distributed.engine import Engine, Tensors
from alignlab.training.order import balanced

REFERENCE = "reference.pt"
"""The reference's weights, where it has been refreshed."""

KNOWN = "ref_logp.pt"
"""What the reference has said of the training data so far: place of the record → log-probs of each response."""

SHARDS = "trained-*-of-*.safetensors"
"""The trained weights with their optimiser state, whole tensors in float32 or what they were trained in, named
`weight|NAME`, `exp_avg|NAME` and so on; each process writes some of them. The same files whatever the engine, so that a
run can go on in another mode, or on another number of processes."""


@dataclass
class State:
    """Where a run stands. Data order and sampling are functions of the seed and of these numbers.

    Attributes:
        step: optimiser steps done.
        iteration: iterations begun: batches drawn from the data, or rounds of sampling.
        position: minibatches of the current iteration that are done.
        pending: the current iteration's groups, scored and prepared, while some of them are still to be trained on.
        trained_tokens, generated_tokens: response tokens trained on and sampled, over all processes.
        sampled: how many of them were sampled for the current iteration.
        refreshed: the iteration before which the reference was last refreshed.
        seconds: time spent, start-up not counted, over all sessions of the run.
        best: the best value of the watched metric so far.
        bad_evaluations: evaluations since then.
        skipped: steps left out because a loss or gradient was not finite.
        reward: mean reward of the current iteration's samples.
        report: metrics of the current iteration: the algorithm's, the scorers'.
        algorithm: what the algorithm wants to keep.
        order: what the order of the records wants to keep.
        watched: the watched metric, where this step was evaluated.
        stopped: why a callback has ended the run.
    """

    step: int = 0
    iteration: int = 0
    position: int = 0
    trained_tokens: int = 0
    generated_tokens: int = 0
    sampled: int = 0
    refreshed: int = 0
    seconds: float = 0.0
    best: float | None = None
    bad_evaluations: int = 0
    skipped: int = 0
    reward: float | None = None
    report: dict[str, float] = field(default_factory=dict)
    algorithm: dict[str, float] = field(default_factory=dict)
    order: dict[str, Any] = field(default_factory=dict)
    watched: float | None = None
    stopped: str | None = None
    pending: list[Group] = field(default_factory=list)


def save_state(
    folder: Path, state: State, engine: Engine, reference: Reference | None = None, records: Sequence[Group] = ()
) -> None:
    """Write everything a run needs to go on, bit-identically where sums have a fixed order: on CPUs. Called by all.

    Args:
        records: the training data, whose reference log-probs are kept: computed anew, beside other records, they would
            differ in their last bits.
    """
    import safetensors.torch

    processes = engine.processes
    sizes = [getattr(p, "ds_numel", p.numel()) for p in engine.trained().values()]
    own = set(balanced(sizes, processes.world)[processes.rank])
    mine: dict[str, Tensor] = {}
    for i, (name, tensors) in enumerate(engine.tensors()):
        if i in own:
            mine |= {f"{key}|{name}": t.detach().cpu().clone().contiguous() for key, t in tensors.items()}
    shard = f"trained-{processes.rank + 1:05}-of-{processes.world:05}.safetensors"
    safetensors.torch.save_file(mine, folder / shard)
    torch.save(_random_state(processes.device), folder / _random_name(processes.rank))
    with _reference_weights(engine, reference):
        weights = reference.state() if reference is not None else {}
    if processes.is_main:
        scaler = processes.accelerator.scaler
        torch.save(_as_tensors(asdict(state)) | {"scaler": scaler.state_dict() if scaler else {}}, folder / "state.pt")
        if weights:
            torch.save(weights, folder / REFERENCE)
        if known := _known(records):
            torch.save(known, folder / KNOWN)


def load_state(
    folder: Path, engine: Engine, reference: Reference | None = None, records: Sequence[Group] = ()
) -> State:
    """Read it back, into the same engine or another. Called by all processes."""
    try:
        saved = Saved(folder)
        trained = engine.trained()
        if set(saved) != set(trained):
            raise ValueError(f"it holds {len(saved)} trained tensors, the model has {len(trained)}")
        engine.load(saved)
        _set_random_state(folder / _random_name(engine.processes.rank), engine.processes.device)
        raw: dict[str, Any] = torch.load(folder / "state.pt", weights_only=True)
        if scaler := raw.pop("scaler"):
            engine.processes.accelerator.scaler.load_state_dict(scaler)
        if reference is not None and (folder / REFERENCE).exists():
            with _reference_weights(engine, reference, change=True):
                reference.load_state(torch.load(folder / REFERENCE, weights_only=True))
        if (folder / KNOWN).exists():
            for i, columns in torch.load(folder / KNOWN, weights_only=True).items():
                for response, values in zip(records[i].responses, columns, strict=True):
                    response.columns["ref_logp"] = values.numpy()
    except (OSError, EOFError, RuntimeError, LookupError, ValueError, UnpicklingError, SafetensorError) as error:
        raise AlignlabError(f"{folder}: this checkpoint does not fit the run: {error}") from error
    raw = _as_arrays(raw)
    pending = [Group(**{**g, "responses": [Response(**r) for r in g["responses"]]}) for g in raw.pop("pending")]
    return State(**raw, pending=pending)


def _known(records: Sequence[Group]) -> dict[int, list[Tensor]]:
    """Reference log-probs of the records that have them, by place."""
    return {
        i: [torch.tensor(np.asarray(r.columns["ref_logp"])) for r in group.responses]
        for i, group in enumerate(records)
        if group.responses and all("ref_logp" in r.columns for r in group.responses)
    }


def _as_tensors(value: Any) -> Any:
    """A value with tensors for arrays, and Python's numbers for NumPy's: torch reads these without other pickles."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {k: _as_tensors(v) for k, v in value.items()}
    return [_as_tensors(v) for v in value] if _holds_more(value) else value


def _as_arrays(value: Any) -> Any:
    """The inverse."""
    if isinstance(value, Tensor):
        return value.numpy()
    if isinstance(value, dict):
        return {k: _as_arrays(v) for k, v in value.items()}
    return [_as_arrays(v) for v in value] if _holds_more(value) else value


def _holds_more(value: Any) -> bool:
    """Whether a value is a list of lists or mappings, not of numbers."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict | list)


class Saved(Mapping[str, Tensors]):
    """The trained tensors of a checkpoint by the parameter's name, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, dict[str, Any]] = {}
        paths = sorted(folder.glob(SHARDS))
        if not paths:
            raise FileNotFoundError(f"no {SHARDS} in it")
        for path in paths:
            file = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118 - not a mapping
                kind, _, name = key.partition("|")
                self._files.setdefault(name, {})[kind] = file

    def __getitem__(self, name: str) -> Tensors:
        return {kind: file.get_tensor(f"{kind}|{name}") for kind, file in self._files[name].items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _reference_weights(engine: Engine, reference: Reference | None, change: bool = False) -> Any:
    """The reference's weights at hand, where they are kept apart at all."""
    if reference is None or not (reference.refreshed or change):
        return nullcontext()
    return engine.whole(reference.held_in, change)


def _random_name(rank: int) -> str:
    return f"random-{rank + 1:05}.pt"


def _random_state(device: torch.device) -> dict[str, Any]:
    """Of every generator that training uses, on this process and its device: asking others would take memory there."""
    name, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), place, has_gauss, gauss],
        "python": random.getstate(),
    }


def _set_random_state(path: Path, device: torch.device) -> None:
    """Where this process had one: on more processes than before, the new ones keep what the seed gave them."""
    if not path.exists():
        return
    found = torch.load(path, weights_only=True)
    torch.set_rng_state(found["torch"])
    if found["cuda"] and device.type == "cuda":
        torch.cuda.set_rng_state(found["cuda"][0], device)
    name, keys, *rest = found["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, numbers, gauss = found["python"]
    random.setstate((version, tuple(numbers), gauss))
