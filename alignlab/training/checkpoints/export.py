"""A model that any tool loads, from a run that has ended or from any of its checkpoints, in one piece."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from alignlab.build import build_type, check_ours, section
from alignlab.config import read_yaml
from alignlab.core import AdapterKind, ConfigError
from alignlab.core.settings import Settings
from alignlab.models import (
    FullFineTuning,
    ModelSettings,
    PackedModel,
    QuantizationSettings,
    add_value_head,
    load_model,
    save_model,
)
from alignlab.training.checkpoints.state import Saved
from alignlab.training.checkpoints.store import Checkpoints, verify
from alignlab.training.distributed.engine import Tensors
from alignlab.training.run_config import build_algorithm
from alignlab.training.run_folder import RESULT, SECTIONS
from alignlab.training.settings import TrainingSettings

OTHERS = "if the run is yours, add trust=true"


class ExportSettings(Settings):
    """Which weights of which run go where."""

    run: str = Field(min_length=1)
    checkpoint: str | int | None = None
    merge: bool = True
    out: str = Field(min_length=1)
    trust: bool = False


def export(settings: ExportSettings) -> list[str]:
    """Write the model of a run to a new folder, adapters folded into their base unless told otherwise.

    Whatever engine trained it: checkpoints are the same for all, each process having written some of the tensors.

    Returns:
        What there is to say of it.

    Raises:
        ConfigError: there is no such run or checkpoint, or the folder is in use.
    """
    run, out = Path(settings.run), Path(settings.out)
    if not (run / "config.yaml").exists():
        raise ConfigError(f"run={run}: not the folder of a training run: it has no config.yaml")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={out}: there is something already: choose another folder")
    step = _checkpoint(run, settings.checkpoint)
    model = rebuild(run, None if step is None else Saved(step), settings.trust)
    notes = save_model(model, out, merge=settings.merge)
    return [f"{step or run / 'model'} → {out}", *notes]


def rebuild(run: Path, trained: Mapping[str, Tensors] | None, trust: bool) -> PackedModel:
    """The model that a run trained, in this process's memory: from its `model/`, or with the tensors it trained.

    Args:
        trust: build classes from outside alignlab that the run's config names, and run code that its model has.

    Raises:
        ConfigError: the config is damaged, or names such code and is not trusted.
    """
    config = read_yaml(run / "config.yaml", *SECTIONS, advice="without it the model cannot be rebuilt")
    if not trust:
        for name in ("algorithm", "adapter"):
            check_ours(config[name], name, OTHERS)
        if config["model"].get("trust_remote_code"):
            raise ConfigError(f"run={run}: its model.trust_remote_code is true, and it may be anyone's: {OTHERS}")
    algorithm = build_algorithm(config["algorithm"])
    settings = section(ModelSettings, config["model"], "model")
    adapter = build_type(AdapterKind, config["adapter"], "adapter")
    quantization = section(QuantizationSettings, config.get("quantization", {}), "quantization")
    seed = section(TrainingSettings, config["training"], "training").seed
    whole = trained is None and not (run / "model" / "adapter_config.json").exists()
    if trained is None:
        settings = settings.model_copy(update={"path": str(run / "model"), "freeze": [], "freeze_layers": 0})
    model = load_model(
        settings,
        FullFineTuning() if whole else adapter,
        algorithm.model,
        labels=algorithm.labels,
        quantization=None if whole else quantization,
        seed=seed,
        key="run" if trained is None else "model.path",
    )
    if "value" in algorithm.reads:
        add_value_head(model, algorithm.critic, seed)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensors in (trained or {}).items():
            parameters[name].copy_(tensors["weight"])
    return model


def _checkpoint(run: Path, wanted: str | int | None) -> Path | None:
    """The folder of a checkpoint; None for the run's finished model."""
    if wanted is None and (run / RESULT).exists():
        return None
    checkpoints = Checkpoints(run / "checkpoints", is_main=False)
    names = [p.name for p in checkpoints.folders()]
    found: Any
    if wanted in (None, "last"):
        found = checkpoints.latest()
    elif wanted == "best":
        found = checkpoints.best()
    else:
        digits = str(wanted).removeprefix("step-")
        found = run / "checkpoints" / (f"step-{int(digits):08}" if digits.isdigit() else str(wanted))
        problems = verify(found) if found.name in names else [f"there is no {found.name}"]
        if problems:
            there = f"; there are {', '.join(names)}" if names else "; there are none"
            raise ConfigError(f"checkpoint={wanted}: {problems[0]}{there}")
    if found is None:
        raise ConfigError(
            f"run={run}: no checkpoint to export{f': {checkpoints.problems[0]}' if checkpoints.problems else ''}"
        )
    return Path(found)
