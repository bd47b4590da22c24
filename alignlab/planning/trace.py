"""How much memory a pass takes: the real modules run on tensors without contents, and every storage is counted.

What autograd keeps, what checkpointing drops, what an attention kernel saves and what chunked logits cost is thereby
not modelled but observed, for any architecture.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alignlab.core import Group, Response
from alignlab.models import evaluating
from alignlab.planning.shapes import Shapes
from alignlab.rollout.decoding import Decoding
from alignlab.rollout.sampling import draw, filtered_log_probs
from alignlab.rollout.settings import RolloutSettings


@dataclass(frozen=True)
class Passes:
    """Bytes that come on top of weights, gradients and optimiser states. Linear in the layers.

    Attributes:
        saved: what the forward pass leaves for the backward pass, logits included.
        forward: the most during the forward pass.
        backward: the most during forward and backward pass, with gradients there from an earlier micro-batch.
        scoring: the most during a forward pass without gradients, as for the reference's log-probs.
    """

    saved: float = 0
    forward: float = 0
    backward: float = 0
    scoring: float = 0


@dataclass(frozen=True)
class Generation:
    """Bytes of sampling. Linear in the layers.

    Attributes:
        cache: keys and values of all rows at their final length.
        prefill, step: the most during the prompts' forward pass, and during the last token's, the cache included.
    """

    cache: float = 0
    prefill: float = 0
    step: float = 0


class Live(TorchDispatchMode):
    """Counts the bytes of all storages made inside it that are still in use, those of `module` not."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.now = 0
        self.most = 0
        tensors = [*module.parameters(), *module.buffers()]
        self._known: dict[int, Any] = {t.untyped_storage()._cdata: None for t in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._count(value)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
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

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def groups(self) -> list[Group]:
        return [
            Group([0] * self.prompt, [Response([0] * self.response) for _ in range(self.responses)])
            for _ in range(self.rows)
        ]


def trace_passes(shapes: Shapes, work: Workload) -> Passes:
    """Run two micro-batches and a pass without gradients; the first leaves the gradients that the second finds."""
    model, reads = shapes.model, tuple(shapes.algorithm.reads)
    reads = tuple(r for r in reads if model.kind == "policy" or r in ("score", "step", "logp"))
    saved = forward = backward = 0
    with shapes.mode, _still_tables(shapes), Live(model) as live:
        rows = _lay_out(shapes, work)
        for _ in range(2):
            before = live.restart()
            with _precision(work):
                outputs = model(rows, reads, work.temperature)
                loss = sum((v.sum() for v in outputs.values() if v.requires_grad), torch.zeros(()))
            del outputs
            saved, forward = live.now - before, live.most - before
            loss.backward()
            del loss
            backward = live.most - before
        before = live.restart()
        with torch.no_grad(), evaluating(model), _precision(work):
            model(rows, reads, work.temperature)
        scoring = live.most - before
        for parameter in model.parameters():
            parameter.grad = None
    return Passes(float(saved), float(forward), float(backward), float(scoring))


@contextmanager
def _still_tables(shapes: Shapes) -> Iterator[None]:
    """The input embeddings without gradients: theirs are made last, when nothing else is left, and would hide what
    grows with the layers in a model with few of them."""
    kept, hooks = [], []
    for module in shapes.model.modules():
        if isinstance(module, torch.nn.Embedding) and module.weight.requires_grad:
            kept.append((module, module.weight))
            module.weight = torch.nn.Parameter(torch.empty_like(module.weight), requires_grad=False)
            hooks.append(module.register_forward_hook(lambda _, __, out: out.requires_grad_(torch.is_grad_enabled())))
    try:
        yield
    finally:
        for module, weight in kept:
            module.weight = weight
        for hook in hooks:
            hook.remove()


def _lay_out(shapes: Shapes, work: Workload) -> Any:
    """Rows of tokens, packed where the architecture takes them."""
    model = shapes.model
    if model.layout == "packed":
        few = Workload(1, 2, 2, work.responses)
        try:
            with torch.no_grad():
                model._run(model.decoder, model.lay_out(few.groups()))
        except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError):
            model.layout = "plain"
    return model.lay_out(work.groups())


def _precision(work: Workload) -> AbstractContextManager[Any]:
    return nullcontext() if work.autocast is None else torch.autocast("cpu", work.autocast)


def trace_generation(
    shapes: Shapes, prompts: int, samples: int, work: Workload, settings: RolloutSettings
) -> Generation:
    """Sampling `samples` responses to each of `prompts` prompts, from the prompts' pass to the last token."""
    model = shapes.model
    rows, final = prompts * samples, work.prompt + settings.max_new_tokens
    with shapes.mode, torch.no_grad(), evaluating(model), Live(model) as live:
        before = live.restart()
        decoding = Decoding(model, [[0] * work.prompt] * prompts, True)
        decoding.select([i for i in range(prompts) for _ in range(samples)])
        prefill = live.most - before
        del decoding
        decoding = Decoding(model, [[0] * (final - 1)] * rows, True)
        cache = live.now - before - decoding.logits_RV.nbytes
        live.restart()
        token = torch.zeros(rows, dtype=torch.int64)
        decoding.append(token)
        log_probs = filtered_log_probs(decoding.logits_RV, settings)
        draw(log_probs, torch.zeros(rows, dtype=torch.float64))
        step = live.most - before
    return Generation(float(cache), float(prefill), float(step))
