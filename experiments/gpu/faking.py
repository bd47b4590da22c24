"""A CUDA device that is not there: tensors on "cuda" without contents, whose operations, autocast, backward passes and
updates go through PyTorch's own dispatch for CUDA.

Needs a CUDA build of PyTorch. Numbers read from such tensors are made up: 0, on the CPU 1, and True for truths.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

SHIM = """
static int devices = 0;
void pretend_devices(int count) { devices = count; }
signed char _ZN3c104cuda12device_countEv(void) { return devices; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 0; return 0; }
"""
"""What autograd's engine asks about devices before a backward pass: how many there are (c10::cuda::device_count), and
whether one is in use (the driver). It must find none when FakeTensorMode first looks, which then puts a guard in CUDA's
place that does nothing, and many afterwards."""

PRELOADED = "ALIGNLAB_FAKE_CUDA"


def start_again() -> None:
    """Start this script again beside a driver that only says that no device is in use; not where it has been.

    Without a C compiler the script goes on as it is, and there is no backward pass.
    """
    if PRELOADED in os.environ:
        return
    compiler = shutil.which("cc") or shutil.which("gcc")
    os.environ[PRELOADED] = ""
    if compiler is None:
        return
    folder = tempfile.mkdtemp(prefix="alignlab-fake-")
    source, library = Path(folder) / "shim.c", Path(folder) / "libcuda.so.1"
    source.write_text(SHIM)
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)], check=True
    )
    os.environ |= {PRELOADED: str(library), "LD_PRELOAD": str(library)}
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("LD_LIBRARY_PATH")]))
    os.execv(sys.executable, [sys.executable, *sys.argv])


def has_backward() -> bool:
    return bool(os.environ.get(PRELOADED))


def place() -> str:
    """The line of the package that is being executed."""
    frame: Any = sys._getframe(1)
    while frame is not None and "/alignlab/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return "?" if frame is None else f"{frame.f_code.co_filename.rpartition('/alignlab/')[2]}:{frame.f_lineno}"


def fake_mode() -> Any:
    """A FakeTensorMode with a CUDA device; a guard that does nothing is in CUDA's place from now on."""
    from torch._subclasses import fake_tensor

    class Mode(fake_tensor.FakeTensorMode):
        avoid_device_init = True  # whatever torch.cuda.is_available says

    fake_tensor.init_gpu_context = lambda _: None
    mode = Mode(allow_non_fake_inputs=True)
    with mode:
        return mode


@contextmanager
def devices(count: int) -> Iterator[None]:
    """So many for the engine that is asked about devices, where it can be led at all."""
    pretend = ctypes.CDLL("libcuda.so.1").pretend_devices if has_backward() else lambda _: None
    pretend(count)
    try:
        yield
    finally:
        pretend(0)


@contextmanager
def fake_cuda() -> Iterator[Any]:
    """Everything inside is on tensors without contents, and torch finds a GPU. Yields what counts the host's waits."""
    import numpy as np
    import torch
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    if torch.version.cuda is None:
        raise SystemExit(f"torch {torch.__version__} is not a CUDA build: make fake-gpu")
    if torch.cuda.is_available():
        raise SystemExit("there is a GPU here: experiments/gpu/check.py says more")

    aten = torch.ops.aten

    class Answers(TorchDispatchMode):
        """Numbers, and sizes, for what asks a tensor for them: a mask counts as true everywhere.

        Attributes:
            waits: how often the host has read from the GPU, which it would have waited for.
            places: which lines of ours did.
        """

        def __init__(self) -> None:
            super().__init__()
            self.waits, self.places = 0, Counter[str]()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            first = args[0] if args and isinstance(args[0], torch.Tensor) else None
            asks = func in (aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default)
            asks |= func in (aten.unique_consecutive.default, aten._unique2.default, aten.masked_select.default)
            if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
                asks = any(x is not None and x.dtype == torch.bool for x in args[1])
                args = (args[0], [x for index in args[1] for x in self.everywhere(index)], *args[2:])
            if first is not None and first.device.type == "cuda":
                leaves = func is aten._to_copy.default and str(kwargs.get("device", "cuda")).startswith("cpu")
                if asks or leaves:
                    self.waits += 1
                    self.places[place()] += 1
            if func is aten._local_scalar_dense.default:
                dtype, on_cpu = args[0].dtype, args[0].device.type == "cpu"  # as an optimiser's count of steps
                return True if dtype == torch.bool else float(on_cpu) if dtype.is_floating_point else 0
            if func is aten.equal.default:
                return True
            if func is aten.nonzero.default:
                return torch.zeros(args[0].numel(), args[0].dim(), dtype=torch.int64, device=args[0].device)
            if func in (aten.unique_consecutive.default, aten._unique2.default):
                one = torch.ones_like(args[0], dtype=torch.int64)
                return args[0].clone(), one, one.clone()
            return func(*args, **kwargs)

        @staticmethod
        def everywhere(index: Any) -> list[Any]:
            """An index, or for a mask the indices of all its places."""
            if index is None or index.dtype != torch.bool:
                return [index]
            return [torch.zeros(index.numel(), dtype=torch.int64, device=index.device) for _ in index.shape]

    class Attention(TorchFunctionMode):
        """SDPA by its definition: which of its kernels it takes it would ask of the device."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.nn.functional.scaled_dot_product_attention:
                return by_definition(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))

    def by_definition(
        query: Any, key: Any, value: Any, attn_mask: Any = None, enable_gqa: bool = False, **_: Any
    ) -> Any:
        if not torch.is_autocast_enabled("cuda") and not query.dtype == key.dtype == value.dtype:
            raise RuntimeError(f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}")
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
        scores = query @ key.transpose(-1, -2)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, 0.0) if attn_mask.dtype == torch.bool else scores + attn_mask
        return scores.softmax(-1).to(value.dtype) @ value

    def made_up(tensor: Any, *_: Any, **__: Any) -> Any:
        wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        if tensor.device.type != "cpu":
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        made = np.ones if tensor.dtype == torch.bool else np.zeros
        return made(tuple(tensor.shape), str(wide.dtype).removeprefix("torch."))

    def moved(module: Any, change: Any, recurse: bool = True) -> Any:
        """nn.Module._apply, which would swap the contents of tensors that have none."""
        made: dict[int, Any] = {}
        own: Any = {"recurse": False, "remove_duplicate": False}
        for part in module.modules() if recurse else (module,):
            for name, tensor in [*part.named_parameters(**own), *part.named_buffers(**own)]:
                if id(tensor) not in made:
                    with torch.no_grad():
                        new = change(tensor)
                    if isinstance(tensor, torch.nn.Parameter) and new is not tensor:
                        new = torch.nn.Parameter(new, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = new
                setattr(part, name, made[id(tensor)])
        return module

    card = SimpleNamespace(
        name="none", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132, gcnArchName=""
    )
    stream = SimpleNamespace(is_capturing=lambda: False)
    mode = fake_mode()
    answering = Answers()
    answers = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_properties": lambda *_: card,
        "get_device_capability": lambda *_: (9, 0),
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "manual_seed_all": lambda *_: None,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "max_memory_allocated": lambda *_: 0,
        "is_current_stream_capturing": lambda: False,
    }
    with (
        devices(127),
        patch.multiple(torch.cuda, **answers),
        patch.object(torch.accelerator, "current_stream", lambda *_: stream),
        patch.object(FakeTensor, "numpy", made_up, create=True),
        patch.object(torch.nn.Module, "_apply", moved),
        patch.object(FakeTensor, "tolist", lambda tensor: made_up(tensor.cpu()).tolist()),
        mode,
        answering,
        Attention(),
    ):
        yield answering
