"""DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054): optimiser state, gradients and weights in shares."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from alignlab.core.private_api import forward_pre_hooks, hook_modules, link_states
from alignlab.models import PackedModel
from alignlab.training.distributed.engine import Engine, Tensors

BUCKET = 1 << 26
"""Numbers that are exchanged at once; DeepSpeed's own 5e8 take 2 GB on every device."""

LIVE = 1 << 28
"""Numbers of gathered weights that ZeRO-3 may hold on to; with DeepSpeed's own 1e9 it divides no model below that."""


class ZeroEngine(Engine):
    """ZeRO on float32 weights: the model makes its products in half precision by itself, as in one process. DeepSpeed
    switches off an autocast that is around its engine; this one is inside.

    Driven directly: Accelerate takes the optimiser's step inside the backward pass, before anybody has seen whether
    the loss is finite.
    """

    together = True
    stage: ClassVar[int] = 1
    offload: ClassVar[bool] = False

    @staticmethod
    def of(mode: str) -> type[ZeroEngine]:
        stage = int(mode[4])
        return type(
            "ZeroEngine",
            (ZeroEngine,),
            {"stage": stage, "divides": stage == 3, "offload": mode.endswith("offload")},
        )

    def _wrap(self) -> None:
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # On CPUs it would compile collectives of its own, for a minute, and wait for ever where a process has died.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._references: list[Any] = []
        if self.divides:
            self._share_out(self.model)
        self.module, self.optimizer, _, _ = deepspeed.initialize(
            model=self.model, optimizer=self.optimizer, config=self._config(), dist_init_required=False
        )

    def _config(self) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self.stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
        if self.divides:
            zero["stage3_max_live_parameters"] = LIVE
        if self.offload:
            zero |= {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
        return {
            "train_micro_batch_size_per_gpu": 1,  # only for its own reports
            "gradient_accumulation_steps": 1,  # losses are scaled by us, boundaries set by us
            "gradient_clipping": self.max_grad_norm or 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # ours, so that offloading changes no result
            "steps_per_print": 1 << 60,
        }

    @property
    def name(self) -> str:
        stage = self.module.zero_optimization_stage()
        offload = " with offload" if self.module.zero_cpu_offload() else ""
        return f"DeepSpeed ZeRO-{stage}{offload}"

    # ------------------------------------------------------------------ a step

    def hold(self, last: bool) -> AbstractContextManager[Any]:
        self.module.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.module.backward(loss)

    def reduced_in(self) -> set[torch.dtype]:
        return set(self.optimizer.ipg_buckets)

    def step(self) -> float:
        self.module.step()
        norm = float(self.module.get_global_grad_norm() or 0.0)
        return math.inf if self.optimizer.overflow else norm

    def discard(self) -> None:
        """What DeepSpeed itself does with a gradient that overflowed."""
        self.optimizer.zero_grad(set_to_none=True)
        for held in ("averaged_gradients", "all_grad_tensors"):
            for key in getattr(self.optimizer, held, {}):
                getattr(self.optimizer, held)[key] = None

    # ------------------------------------------------------------------ weights

    def _share_out(self, model: PackedModel) -> None:
        """Tensor by tensor from wherever the model is to shares on the devices: it need not fit on one of them.

        The map to the vocabulary is fetched for a whole pass, and not called as a module: log-probs come in chunks, of
        which one process has more than another, and DeepSpeed wants all to call the same modules.
        """
        import deepspeed

        deepspeed.zero.Init(module=model, config_dict_or_path=self._config())
        model.gathered = whole_of
        for buffer in model.buffers():
            buffer.data = buffer.to(self.processes.device)
        head = model.vocabulary_head
        model.head_use = "weight" if type(head) is nn.Linear else "once"
        if model.head_use == "weight":
            for parameter in head.parameters():
                deepspeed.zero.register_external_parameter(model, parameter)

    def divide(self, model: PackedModel) -> None:
        if self.divides:
            import deepspeed

            self._share_out(model)
            engine, *_ = deepspeed.initialize(model=model, config=self._config(), dist_init_required=False)
            self._references.append(engine)

    @contextmanager
    def whole(self, model: nn.Module, change: bool = False) -> Iterator[None]:
        if not self.divides:
            yield
            return
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0 if change else None)
        with gathered, self._without_hooks(model):
            yield

    @contextmanager
    def _without_hooks(self, model: nn.Module) -> Iterator[None]:
        """Sub-modules that neither fetch nor release weights: processes may call them unequally often."""
        engine = next((e for e in self._references if e.module is model), self.module)
        offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
        for hook in [*offload.forward_hooks, *offload.backward_hooks]:
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        first, hooks = offload.fwd_pre_hook.id, forward_pre_hooks(offload.module)
        start = hooks.pop(first)  # until it has seen a whole step, it compares notes with the other processes
        try:
            yield
        finally:
            hooks[first] = start
            hook_modules(offload)

    def _flat(self) -> list[Any]:
        """The flat float32 weights that the optimiser works on, this process's share."""
        if self.divides:
            return [p for p in self.optimizer.fp32_partitioned_groups_flat if p is not None]
        return list(self.optimizer.single_partition_of_fp32_groups)

    def _link(self) -> None:
        """Let DeepSpeed find each parameter's piece of the optimiser state; by itself it looks once, and too early for
        all but the first group of parameters."""
        if not self.divides and any(self.optimizer.optimizer.state.values()):
            link_states(self.optimizer)

    def tensors(self, states: bool = True) -> Iterator[tuple[str, Tensors]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self._link()
        held = self.optimizer.optimizer.state if states else {}
        first: dict[str, Any] = next((held[p] for p in self._flat() if held.get(p)), {})
        keys = [k for k, v in first.items() if torch.is_tensor(v) and v.dim()]
        numbers = {k: torch.as_tensor(v) for k, v in first.items() if k not in keys and v is not None}
        shapes = {n: getattr(p, "ds_shape", p.shape) for n, p in self.model.named_parameters()}
        for name, parameter in self.trained().items():
            found = {"weight": safe_get_full_fp32_param(parameter).reshape(shapes[name])}
            for key in keys:
                found[key] = safe_get_full_optimizer_state(parameter, key).reshape(shapes[name])
            yield name, found | {k: v.clone() for k, v in numbers.items()}

    def load(self, found: Mapping[str, Tensors]) -> None:
        import deepspeed
        from deepspeed import utils

        state = next(iter(found.values()))
        keys = [k for k, v in state.items() if k != "weight" and v.dim()]
        numbers = {k: v for k, v in state.items() if k != "weight" and k not in keys}
        for flat in self._flat():
            if keys or numbers:
                self.optimizer.optimizer.state[flat] = {
                    **{k: v.clone() for k, v in numbers.items()},
                    **{k: torch.zeros_like(flat) for k in keys},
                }
        self._link()
        for name, parameter in self.trained().items():
            tensors = {k: v.to(self.processes.device) for k, v in found[name].items()}
            with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(tensors["weight"])
            if self.divides:  # the functions for whole tensors fail on those that cannot be divided evenly
                utils.safe_set_local_fp32_param(parameter, self._share(tensors["weight"], parameter))
            else:
                utils.safe_set_full_fp32_param(parameter, tensors["weight"].float())
            for key in keys:
                if self.divides:
                    utils.safe_set_local_optimizer_state(parameter, self._share(tensors[key], parameter), key)
                else:
                    utils.safe_set_full_optimizer_state(parameter, tensors[key], key)

    def _share(self, tensor: Tensor, parameter: Any) -> Tensor:
        """This process's piece of a whole tensor, filled up with zeros where there is less for it."""
        size = parameter.ds_tensor.numel()
        padded = nn.functional.pad(tensor.float().flatten(), (0, size * self.processes.world - tensor.numel()))
        return padded[self.processes.rank * size : (self.processes.rank + 1) * size]


def whole_of(tensor: Tensor) -> Tensor:
    """All of a weight of which each process holds a share. Called by all."""
    import deepspeed

    if not hasattr(tensor, "ds_id"):
        return tensor
    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().clone()
