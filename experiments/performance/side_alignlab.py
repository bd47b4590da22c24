"""alignlab's side: `alignlab.training.Trainer` itself, as `alignlab train algorithm=dpo adapter=lora` would run it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from side import BETA, LEARNING_RATE, LORA, Gauge, main, read_batches, set_adapter

from alignlab.algorithms.dpo import DPO
from alignlab.core import Group, Response
from alignlab.models import AdapterSettings, ModelSettings, Reference, load_model
from alignlab.training.checkpoints import Checkpoints
from alignlab.training.loop import Trainer
from alignlab.training.processes import Processes
from alignlab.training.progress import ProgressDisplay
from alignlab.training.settings import SourceSettings, TrainingSettings
from alignlab.training.sources import Order
from alignlab.training.tracking import Tracker, TrackerSettings


class Clock(Tracker):
    """Reads the gauge whenever the loop logs a step."""

    def __init__(self, folder: Path, gauge: Gauge) -> None:
        super().__init__(folder, TrackerSettings(mode="off"), {})
        self.gauge = gauge

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        super().log(step, metrics)
        self.gauge.step(metrics["loss"])


def measure(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Options: `training` and `model`, settings other than the defaults."""
    batches = read_batches(folder)
    size = len(batches[0])
    training = TrainingSettings(steps=len(batches), epochs=None, batch_size=size, **options.get("training", {}))
    processes = Processes()
    model = load_model(
        ModelSettings(path=str(folder / "model"), **options.get("model", {})),
        AdapterSettings(kind="lora", r=int(LORA["r"]), alpha=LORA["alpha"]),
        device=processes.device,
    )
    set_adapter(model.network)
    groups = [Group([]) for batch in batches for _ in batch]
    order = Order(len(groups), size, training.seed)
    for number, batch in enumerate(batches):  # so placed that step n of the loop draws batch n
        for place, pair in zip(order.batch(number), batch, strict=True):
            chosen = Response(pair["chosen"], columns={"score": 1.0})
            groups[place] = Group(pair["prompt"], [chosen, Response(pair["rejected"], columns={"score": 0.0})])
    gauge = Gauge()
    with tempfile.TemporaryDirectory() as out, Clock(Path(out), gauge) as clock:
        trainer = Trainer(
            algorithm=DPO(beta=BETA),
            model=model,
            optimizer=torch.optim.AdamW(
                [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0
            ),
            processes=processes,
            settings=training,
            source=SourceSettings(),
            train=groups,
            checkpoints=Checkpoints(Path(out) / "checkpoints", 1, False),
            tracker=clock,
            progress=ProgressDisplay("off"),
            reference=Reference(model, fresh_adapter=True),
        )
        gauge.loaded()
        trainer.run()
    return gauge.result(layout=model.layout)


if __name__ == "__main__":
    main(measure)
