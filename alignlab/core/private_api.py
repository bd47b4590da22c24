"""Private API of libraries: what is used of it, in which versions it is known to work, how that is tried, and what is
done without it. This module and `alignlab.models.private_api`, which adds what models use, are the only ones that may
use any.

Nothing is looked up when this module is imported. Where private API is not what it was, the plain way is taken, which
is slower and never computes something else, and the run says so; where there is none, what needs it is refused with the
reason.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from importlib import metadata
from typing import Any

from alignlab.core.errors import AlignlabError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reach:
    """One use of private API.

    Attributes:
        library: the distribution's name.
        known: its versions, as prefixes, with which the tests pass.
        into: what is used.
        probe: raises where it is not there, or does not do what it did.
        without: what is done then.
    """

    library: str
    known: tuple[str, ...]
    into: str
    probe: Callable[[], None]
    without: str

    @property
    def version(self) -> str | None:
        """Installed version of the library; None where it is not installed."""
        try:
            return metadata.version(self.library)
        except metadata.PackageNotFoundError:
            return None

    @property
    def is_known(self) -> bool:
        """Whether the installed version is one with which the tests pass."""
        return any(f"{self.version}.".startswith(f"{prefix}.") for prefix in self.known)


@cache
def problem(name: str) -> str | None:
    """What a run should say of a use that does not work here, tried once; None where it works."""
    import torch

    reach = REACHES[name]
    try:
        with torch.random.fork_rng(devices=[]):  # layers are made to try them on: no number of a run may move
            reach.probe()
    except Exception as error:  # whatever a library of another version may raise
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        version = f"{reach.library} {reach.version} (known: {', '.join(reach.known)})"
        return f"{reach.into} of {version} cannot be used ({said}): {reach.without}"
    return None


def works(name: str) -> bool:
    """Whether private API does what it should with the libraries that are installed; where not, that is logged once."""
    if (refused := problem(name)) is not None:
        _warn(refused)
    return refused is None


@cache
def _warn(refused: str) -> None:
    log.warning("%s", refused)


def need(name: str) -> None:
    """For what has no other way.

    Raises:
        AlignlabError: it does not work here.
    """
    if (refused := problem(name)) is not None:
        raise AlignlabError(refused)


def there(*names: tuple[Any, str]) -> None:
    """Check that objects have these attributes.

    Raises:
        AttributeError: one is missing.
    """
    for owner, name in names:
        if not hasattr(owner, name):
            raise AttributeError(f"{getattr(owner, '__name__', type(owner).__name__)} has no {name}")


# ---------------------------------------------------------------------- torch: compilation


@contextmanager
def recompiling(limit: int) -> Iterator[None]:
    """Calls of compiled functions in the block may be compiled anew so often. The next time is an error, where PyTorch
    would go on uncompiled. Without it PyTorch's own limits hold, and functions compiled with `fullgraph` fail at them
    all the same."""
    if not works("limits of compilation"):
        yield
        return
    import torch

    found = {"recompile_limit": limit, "accumulated_recompile_limit": 4 * limit, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(found):
        yield


def _try_limits() -> None:
    import torch

    config = torch._dynamo.config
    there(*((config, name) for name in ("recompile_limit", "accumulated_recompile_limit", "patch")))
    there((config, "fail_on_recompile_limit_hit"))


# ---------------------------------------------------------------------- torch: tensors without contents


def fake_tensors() -> Any:
    """The mode in which tensors have shapes and no contents; real ones may be mixed in.

    Raises:
        AlignlabError: this torch has none.
    """
    need("tensors without contents")
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def watching(made: Callable[[Any], None], called: Callable[[str, Any], None] | None = None) -> Iterator[None]:
    """Call `made` with every tensor that an operator returns in the block, and `called` with its name and arguments."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if called is not None:
                called(func.overloadpacket.__name__, args)
            for value in tree_leaves(out):
                if hasattr(value, "untyped_storage"):
                    made(value)
            return out

    with Watching():
        yield


def storage_id(storage: Any) -> int:
    """What a storage is known by as long as it lives, if its tensors have no contents too."""
    return int(storage._cdata)


def _try_fake_tensors() -> None:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    seen: list[int] = []
    with FakeTensorMode(allow_non_fake_inputs=True), watching(lambda made: seen.append(made.numel())):
        ones = torch.ones(2, 3)
        again = ones.view(6)
        torch.ones(2) + 1
    if seen != [6, 6, 2, 2] or storage_id(ones.untyped_storage()) != storage_id(again.untyped_storage()):
        raise AttributeError(f"operators returned tensors of {seen} elements, not of 6, 6, 2 and 2")


# ---------------------------------------------------------------------- processes


def forget_accelerator() -> None:
    """Have Accelerate forget an earlier run in this process, which may have been in another precision."""
    from accelerate.state import AcceleratorState

    if works("Accelerate's state"):
        AcceleratorState._reset_state()


def _try_accelerate() -> None:
    from accelerate.state import AcceleratorState

    there((AcceleratorState, "_reset_state"))


def same_timeout(seconds: float) -> None:
    """Have all process groups time out after so many seconds, those that libraries made for themselves too."""
    if works("time-outs of process groups"):
        from torch.distributed import distributed_c10d

        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def _try_timeouts() -> None:
    from torch.distributed import distributed_c10d

    there((distributed_c10d, "_set_pg_timeout"), (distributed_c10d._world, "pg_map"))


def make_root(model: Any) -> None:
    """Make a module that `fully_shard` has divided the root of its layers: else one of them that is called by itself,
    in sampling, takes itself for the root."""
    need("FSDP2's root")
    model._get_fsdp_state()._lazy_init()


def summed_in(model: Any) -> set[Any]:
    """What dtypes `fully_shard` adds gradients up in; after a first pass."""
    need("FSDP2's root")
    states = [module._get_fsdp_state() for module in model.modules() if hasattr(module, "_get_fsdp_state")]
    groups = [state._fsdp_param_group for state in states if state._fsdp_param_group is not None]
    trained = [(g, p) for g in groups for p in g.fsdp_params if p.sharded_param.requires_grad]
    return {group._reduce_dtype or p.param_dtype or p.orig_dtype for group, p in trained}


def state_dict_hooks(model: Any) -> list[dict[int, Any]]:
    """The hooks that run before a module's `state_dict`, of each module; to be emptied and filled again."""
    need("FSDP2's root")
    return [module._state_dict_pre_hooks for module in model.modules()]


def _try_fsdp() -> None:
    from torch import nn
    from torch.distributed.fsdp import FSDPModule

    there((FSDPModule, "_get_fsdp_state"), (nn.Module(), "_state_dict_pre_hooks"))


def forward_pre_hooks(module: Any) -> dict[int, Any]:
    """The hooks that run before a module's forward pass, by number; to be changed."""
    found: dict[int, Any] = module._forward_pre_hooks
    return found


def hook_modules(offload: Any) -> None:
    """Have DeepSpeed's ZeRO-3 put its hooks on all modules again.

    Args:
        offload: its `DeepSpeedZeRoOffload`.
    """
    need("ZeRO-3's hooks")
    offload._register_deepspeed_module(offload.module)


def _try_zero_hooks() -> None:
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from torch import nn

    there((DeepSpeedZeRoOffload, "_register_deepspeed_module"), (nn.Module(), "_forward_pre_hooks"))


def link_states(optimizer: Any) -> None:
    """Let DeepSpeed's ZeRO-1 and -2 find each parameter's piece of the optimiser state; by itself it looks once, and
    too early for all but the first group of parameters."""
    need("ZeRO's states")
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()


def _try_zero_states() -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    there((DeepSpeedZeroOptimizer, "_lazy_init_hp_params_optimizer_state"))


# ---------------------------------------------------------------------- Optuna, submitit


def storage_of(study: Any) -> Any:
    """Where an Optuna study keeps its trials."""
    need("an Optuna study's storage")
    return study._storage


def trial_id(trial: Any) -> int:
    """The number by which an Optuna storage knows a trial."""
    need("an Optuna study's storage")
    return int(trial._trial_id)


def _try_study() -> None:
    import optuna
    from optuna.storages import InMemoryStorage

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(storage=InMemoryStorage())
    there((study, "_storage"), (study.ask(), "_trial_id"))


@contextmanager
def journal_lock(lock: Any) -> Iterator[None]:
    """Hold the lock of an Optuna journal."""
    need("an Optuna journal's lock")
    from optuna.storages.journal._file import get_lock_file

    with get_lock_file(lock):
        yield


def _try_journal() -> None:
    from optuna.storages.journal import _file

    there((_file, "get_lock_file"))


def submission_text(executor: Any) -> str:
    """The batch script that a submitit executor for Slurm would submit."""
    need("submitit's batch script")
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    return text


def _try_submitit() -> None:
    from submitit.slurm.slurm import SlurmExecutor

    there((SlurmExecutor, "_make_submission_file_text"), (SlurmExecutor, "_submitit_command_str"))


REACHES: dict[str, Reach] = {
    "limits of compilation": Reach(
        "torch", ("2.13",), "_dynamo.config", _try_limits, "what is compiled anew too often may run uncompiled, slower"
    ),
    "tensors without contents": Reach(
        "torch",
        ("2.13",),
        "_subclasses.fake_tensor, utils._python_dispatch and utils._pytree",
        _try_fake_tensors,
        "no plan of memory can be made: `alignlab plan` needs a version that is known",
    ),
    "Accelerate's state": Reach(
        "accelerate",
        ("1.15",),
        "AcceleratorState._reset_state",
        _try_accelerate,
        "a second run in one process keeps the first one's precision",
    ),
    "time-outs of process groups": Reach(
        "torch",
        ("2.13",),
        "distributed_c10d._world and _set_pg_timeout",
        _try_timeouts,
        "groups of processes that libraries make wait as long as these say, not distributed.timeout",
    ),
    "FSDP2's root": Reach(
        "torch",
        ("2.13",),
        "FSDPModule._get_fsdp_state and Module._state_dict_pre_hooks",
        _try_fsdp,
        "distributed=fsdp needs a version that is known: choose ddp or zero3",
    ),
    "ZeRO-3's hooks": Reach(
        "deepspeed",
        ("0.19",),
        "DeepSpeedZeRoOffload._register_deepspeed_module",
        _try_zero_hooks,
        "distributed=zero3 needs a version that is known: choose fsdp or zero2",
    ),
    "ZeRO's states": Reach(
        "deepspeed",
        ("0.19",),
        "DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state",
        _try_zero_states,
        "distributed=zero1 and zero2 need a version that is known: choose ddp, fsdp or zero3",
    ),
    "an Optuna study's storage": Reach(
        "optuna", ("5.0",), "Study._storage and _trial_id", _try_study, "pruning needs a version that is known"
    ),
    "an Optuna journal's lock": Reach(
        "optuna",
        ("5.0",),
        "storages.journal._file.get_lock_file",
        _try_journal,
        "a study's file cannot be mended: sweeper=optuna needs a version that is known",
    ),
    "submitit's batch script": Reach(
        "submitit",
        ("1.5",),
        "SlurmExecutor._make_submission_file_text and _submitit_command_str",
        _try_submitit,
        "launcher=slurm needs a version that is known",
    ),
}
"""Every use of private API, by name."""
