"""alignlab's side: `alignlab.training.Trainer` itself, as `alignlab train adapter=lora` would run it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from alignlab.core import Algorithm, Group, ModelKind, Response, RolloutEngine, Scorer
from alignlab.models import FullFineTuning, LoRA, ModelSettings, PackedModel, QuantizationSettings, load_model
from alignlab.training.callbacks import Callback
from alignlab.training.order import Shuffled
from alignlab.training.settings import SourceSettings, TrainingSettings
from alignlab.training.trainer import Trainer
from measuring.gauge import Gauge, own_weights
from measuring.work import LEARNING_RATE, LORA, Pair, Scale, Shape, model_folder, set_trained

Options = Mapping[str, Any]
"""What is other than the defaults: `training`, `model`, `quantization` (settings), `features` (switches of the forward
pass), `adapter` ("lora" or "none"), `whole_logits` (of all tokens, by the network's own forward)."""


class Clock(Callback):
    """Reads the gauge after each step."""

    def __init__(self, gauge: Gauge, every: int = 1) -> None:
        self.gauge, self.every = gauge, every

    def on_step(self, trainer: Trainer) -> None:
        if trainer.state.step % self.every == 0:
            self.gauge.step(trainer.metrics["loss"])


def load(scale: Scale, options: Options, kind: ModelKind = "policy", shape: Shape | None = None) -> PackedModel:
    """The study's model with an adapter whose weights are those of the other side."""
    adapter = options.get("adapter", "lora")
    settings = {"path": str(model_folder(scale.folder, shape or scale.model, scale.dtype)), "dtype": scale.dtype}
    model = load_model(
        ModelSettings(**(settings | dict(options.get("model", {})))),
        LoRA(r=LORA["r"], alpha=LORA["alpha"]) if adapter == "lora" else FullFineTuning(),
        kind,
        quantization=QuantizationSettings(**options.get("quantization", {})),
        device=scale.device,
    )
    if adapter == "lora":
        set_trained(model.network)
    use_features(model, options.get("features", {}))
    model.whole_logits = options.get("whole_logits", model.whole_logits)
    own_weights(model)
    return model


def use_features(model: PackedModel, wanted: Mapping[str, bool]) -> None:
    """Switch optimisations of the forward pass on or off, those that this version has."""
    features: Any = getattr(model, "features", None)
    if features is None or not wanted:
        return
    known = {f.name for f in dataclasses.fields(features)}
    model.features = dataclasses.replace(features, **{k: v for k, v in wanted.items() if k in known})


def train(
    scale: Scale,
    algorithm: Algorithm,
    batches: Sequence[Sequence[Group]],
    options: Options,
    kind: ModelKind = "policy",
    shape: Shape | None = None,
    source: SourceSettings | None = None,
    scorers: Sequence[Scorer] = (),
    rollout: RolloutEngine | None = None,
    steps: int | None = None,
    every: int = 1,
    before: Callable[[PackedModel], None] | None = None,
) -> dict[str, Any]:
    """Train on batch after batch; the metrics of a `Gauge`, tokens read in a step, and the layout.

    Args:
        steps: optimiser steps in all; one for each batch unless given.
        every: optimiser steps that are measured as one.
        before: warms the model up; the gauge then starts with the first step, instead of after it.
    """
    gauge = Gauge(scale.device)
    size = len(batches[0])
    settings = TrainingSettings(
        **({"steps": steps or len(batches), "epochs": None, "batch_size": size} | dict(options.get("training", {})))
    )
    model = load(scale, options, kind, shape)
    algorithm.setup(model.tokenizer)
    trainer = Trainer(
        model,
        algorithm,
        optimizer=partial(torch.optim.AdamW, lr=LEARNING_RATE, weight_decay=0.0),
        settings=settings,
        source=source,
        train=placed(batches, settings.seed),
        scorers=scorers,
        rollout=rollout,
        callbacks=[Clock(gauge, every)],
    )
    gauge.loaded()
    if before is not None:
        before(model)
        gauge.start()
    trainer.run()
    read = [sum(g.packed_length for g in batch) for batch in batches[-scale.steps :]]
    return gauge.result(layout=model.layout, tokens=sum(read) / len(read))


def placed(batches: Sequence[Sequence[Group]], seed: int) -> list[Group]:
    """The groups so placed that step n of the loop draws batch n."""
    size = len(batches[0])
    groups = [Group([]) for batch in batches for _ in batch]
    order = Shuffled(groups, size, seed)
    for number, batch in enumerate(batches):
        for place, group in zip(order.batch(number), batch, strict=True):
            groups[place] = group
    return groups


def pair_group(pair: Pair) -> Group:
    """A preference pair; as everywhere, a higher score is better."""
    return Group(
        pair["prompt"],
        [
            Response(pair["chosen"], columns={"score": 1.0}),
            Response(pair["rejected"], columns={"score": 0.0}),
        ],
    )


def pair_groups(batches: Sequence[Sequence[Pair]]) -> list[list[Group]]:
    return [[pair_group(pair) for pair in batch] for batch in batches]


def demonstrations(batches: Sequence[Sequence[Pair]]) -> list[list[Group]]:
    """The chosen responses alone."""
    return [[Group(pair["prompt"], [Response(pair["chosen"])]) for pair in batch] for batch in batches]


def ranked_groups(batches: Sequence[Sequence[Pair]]) -> list[list[Group]]:
    """Groups whose k-th response has the reward `reward(k)`."""
    return [
        [
            Group(
                entry["prompt"],
                [Response(ids, columns={"reward": reward(int(k[1:]))}) for k, ids in entry.items() if k != "prompt"],
            )
            for entry in batch
        ]
        for batch in batches
    ]


def reward(k: int) -> float:
    """Of the k-th response of a group: all different, in no order."""
    return float((k * 5 + 3) % 8)
