"""How much memory a pass takes: the real modules run on tensors without contents, and every storage is counted.

What autograd keeps, what checkpointing drops, what an attention kernel saves and what chunked logits cost is not
modelled but observed, for any architecture.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from alignlab.core import Group, Response
from alignlab.core.private_api import storage_id, watching
from alignlab.models import evaluating
from alignlab.models.probe import REFUSALS
from alignlab.planning.shapes import Shapes, held_bytes
from alignlab.rollout.decoding import Decoding
from alignlab.rollout.sampling import draw, filtered_log_probs
from alignlab.rollout.settings import RolloutSettings


@dataclass(frozen=True)
class Needs:
    """What a process that holds all of a model needs: bytes, unless said otherwise. Linear in the layers.

    Attributes:
        parameters: numbers in the base model, heads included, adapters not.
        trained: numbers that are trained.
        trained_weights, frozen_weights, quantised: as they are held. Gradients take as much as the trained weights.
        reference: of a frozen copy of the model, or of the adapter where one is trained further.
        largest: the largest trained tensor.
        layer: all weights of one layer of the decoder; `outside`: those of no layer, embeddings and heads.
        head_gradients: gradients that exist before those of the last layer: the output embedding's.
        table_gradient: the input embedding's, made in a piece beside what is there.
        saved: what the forward pass leaves for the backward pass, logits included.
        activations: the most during forward and backward pass, with gradients there from an earlier micro-batch.
        scoring: the most during a forward pass without gradients, as for the reference's log-probs.
        cache: keys and values of all rows that are sampled, at their final length.
        prefill, step: the most during the prompts' pass of sampling, and during the last token's, cache included.
    """

    parameters: float = 0
    trained: float = 0
    trained_weights: float = 0
    frozen_weights: float = 0
    quantised: float = 0
    reference: float = 0
    largest: float = 0
    layer: float = 0
    outside: float = 0
    head_gradients: float = 0
    table_gradient: float = 0
    saved: float = 0
    activations: float = 0
    scoring: float = 0
    cache: float = 0
    prefill: float = 0
    step: float = 0

    @property
    def weights(self) -> float:
        return self.trained_weights + self.frozen_weights + self.quantised


def extrapolate(low: Needs, high: Needs, at: tuple[int, int], layers: int) -> Needs:
    """The needs of a model of so many layers, from those at two other numbers of layers."""
    found = {}
    for field in fields(Needs):
        a, b = getattr(low, field.name), getattr(high, field.name)
        found[field.name] = b + (b - a) / (at[1] - at[0]) * (layers - at[1])
    return Needs(**found)


@dataclass(frozen=True)
class Workload:
    """The shape of a micro-batch, and of a batch of rows that are sampled.

    Attributes:
        rows: groups of a micro-batch, each a row.
        prompt, response: tokens.
        responses: of each group.
        autocast: dtype of mixed precision, or None.
        temperature: of the log-probs.
    """

    rows: int
    prompt: int
    response: int
    responses: int
    autocast: torch.dtype | None = None
    temperature: float = 1.0

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.prompt + self.responses * self.response

    def groups(self) -> list[Group]:
        responses = [Response([0] * self.response) for _ in range(self.responses)]
        return [Group([0] * self.prompt, responses) for _ in range(self.rows)]

    def precision(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.autocast is None else torch.autocast("cpu", self.autocast)


@dataclass(frozen=True)
class Sampling:
    """A batch that is sampled: `samples` responses to each of `prompts` prompts."""

    prompts: int
    samples: int
    settings: RolloutSettings


def trace(shapes: Shapes, work: Workload, sampling: Sampling | None = None) -> Needs:
    """Count the weights, then run a micro-batch, a pass without gradients and, if there is any, sampling."""
    found = {**_weights(shapes), **_passes(shapes, work)}
    if sampling is not None:
        found |= _sampling(shapes, work.prompt, sampling)
    return Needs(**found)


class Live:
    """Counts the bytes of all storages made inside it that are still in use, those of the `known` tensors not."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        self.now = 0
        self.most = 0
        self._known: dict[int, Any] = {storage_id(t.untyped_storage()): None for t in known}
        self._watching = watching(self._count)

    def __enter__(self) -> Live:
        self._watching.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._watching.__exit__(*error)

    def _count(self, made: Tensor) -> None:
        storage = made.untyped_storage()
        key, size = storage_id(storage), storage.nbytes()
        if key in self._known:
            return
        self.now += size
        self.most = max(self.most, self.now)

        def gone() -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.finalize(storage, gone)

    def restart(self) -> int:
        """Forget the most there was so far; what there is now."""
        self.most = self.now
        return self.now


def _weights(shapes: Shapes) -> dict[str, float]:
    model = shapes.model
    lists = [list(m) for m in model.decoder.modules() if isinstance(m, nn.ModuleList)]
    layers = max(lists, key=lambda found: sum(p.numel() for m in found for p in m.parameters()), default=[])
    inside = {id(p) for layer in layers for p in layer.parameters()}
    heads = [m for m in (model.head, model.value_head) if m is not None]
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]
    table = model.base.get_input_embeddings().weight
    return {
        "parameters": float(shapes.parameters),
        "trained": float(sum(p.numel() for p in trained)),
        "trained_weights": float(sum(p.nbytes for p in trained)),
        "frozen_weights": float(sum(t.nbytes for t in frozen if not hasattr(t, "bytes_each"))),
        "quantised": sum(held_bytes(t) for t in frozen if hasattr(t, "bytes_each")),
        "reference": float(shapes.reference),
        "largest": float(max((p.nbytes for p in trained), default=0)),
        "layer": max((sum(map(held_bytes, layer.parameters())) for layer in layers), default=0.0),
        "outside": sum(held_bytes(p) for p in model.parameters() if id(p) not in inside),
        "head_gradients": float(sum(p.nbytes for m in heads for p in m.parameters() if p.requires_grad)),
        "table_gradient": float(table.nbytes if table.requires_grad else 0),
    }


def _passes(shapes: Shapes, work: Workload) -> dict[str, float]:
    """A micro-batch that finds gradients of an earlier one, and a pass without gradients."""
    model = shapes.model
    own = ("score", "step", "logp")
    reads = tuple(r for r in shapes.algorithm.reads if model.kind == "policy" or r in own)
    with shapes.mode, _still_tables(model):
        rows = _lay_out(shapes, work, reads)
        gradients = []
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
                gradients.append(parameter.grad)
        with Live([*model.parameters(), *model.buffers(), *gradients]) as live:
            before = live.restart()
            with work.precision():
                outputs = model(rows, reads, work.temperature)
                loss = sum((v.sum() for v in outputs.values() if v.requires_grad), torch.zeros(()))
            del outputs
            saved = live.now - before
            loss.backward()
            del loss
            activations = live.most - before
            before = live.restart()
            with torch.no_grad(), evaluating(model), work.precision():
                model(rows, reads, work.temperature)
            scoring = live.most - before
        for parameter in model.parameters():
            parameter.grad = None
    return {"saved": float(saved), "activations": float(activations), "scoring": float(scoring)}


@contextmanager
def _still_tables(model: nn.Module) -> Iterator[None]:
    """The input embeddings without gradients: these are made last, when nothing else is left, and would hide what
    grows with the layers in a model with few of them."""
    kept, hooks = [], []
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.requires_grad:
            kept.append((module, module.weight))
            module.weight = nn.Parameter(torch.empty_like(module.weight), requires_grad=False)
            hooks.append(module.register_forward_hook(lambda _, __, out: out.requires_grad_(torch.is_grad_enabled())))
    try:
        yield
    finally:
        for module, weight in kept:
            module.weight = weight
        for hook in hooks:
            hook.remove()


def _lay_out(shapes: Shapes, work: Workload, reads: Sequence[str]) -> Any:
    """Rows of tokens, in the first layout that the architecture takes."""
    model, few = shapes.model, Workload(1, 2, 2, work.responses).groups()
    layouts = ("varlen", "packed", "plain")
    for layout in layouts[layouts.index(model.layout) :]:
        model.layout = layout  # type: ignore[assignment]
        try:
            with torch.no_grad():
                model(model.lay_out(few), reads)
        except REFUSALS:
            continue
        break
    return model.lay_out(work.groups())


def _sampling(shapes: Shapes, prompt: int, sampling: Sampling) -> dict[str, float]:
    """From the prompts' pass to the last token."""
    model, settings = shapes.model, sampling.settings
    rows, final = sampling.prompts * sampling.samples, prompt + settings.max_new_tokens
    with shapes.mode, torch.no_grad(), evaluating(model), Live([*model.parameters(), *model.buffers()]) as live:
        before = live.restart()
        decoding = Decoding(model, [[0] * prompt] * sampling.prompts, True)
        decoding.select([i for i in range(sampling.prompts) for _ in range(sampling.samples)])
        prefill = live.most - before
        del decoding
        decoding = Decoding(model, [[0] * (final - 1)] * rows, True)
        cache = live.now - before - decoding.logits_RV.nbytes
        live.restart()
        decoding.append(torch.zeros(rows, dtype=torch.int64))
        draw(filtered_log_probs(decoding.logits_RV, settings), torch.zeros(rows, dtype=torch.float64))
        step = live.most - before
    return {"cache": float(cache), "prefill": float(prefill), "step": float(step)}
