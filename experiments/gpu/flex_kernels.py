"""FlexAttention's kernels, compiled for GPUs that are not there: do they compile, and does their shared memory suffice?

    .venv-cuda/bin/python experiments/gpu/flex_kernels.py --capabilities 80 90 --out experiments/gpu/flex_kernels.md

The package's own mask and call, traced on tensors of "cuda" without contents, through dynamo, autograd and inductor, as
on a GPU: with gradients, for any length. What inductor writes for Triton is compiled by Triton for the architecture. A
kernel whose shared memory is above what a block may have fails there when it is first used. Registers are not known
before a kernel is loaded, and nothing is said of speed. Inductor's own search for example patterns, which needs a
device, is left out.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from faking import devices, fake_mode, has_backward, start_again  # noqa: E402

SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}
"""Bytes of shared memory that a block may have, by compute capability (CUDA C++ Programming Guide, table of technical
specifications: 163, 99, 99 and 227 KB)."""

HEADS = {1: (8, 8), 4: (8, 2), 7: (14, 2)}
"""Heads, and heads of keys, by how many heads share a key."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capabilities", nargs="+", type=int, choices=list(SHARED), default=[80, 89, 90])
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 128], help="of a head")
    parser.add_argument("--shared", nargs="+", type=int, choices=list(HEADS), default=[7, 1], help="heads by key")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    asked = parser.parse_args()
    import torch
    import triton

    if not has_backward():
        raise SystemExit("a C compiler is needed: without one autograd's engine asks for a device (see faking.py)")
    lines = [
        f"torch {torch.__version__}, triton {triton.__version__}, no GPU",
        "",
        "| sm | dtype | head | heads by key | kernel | warps, stages | shared memory (bytes) | of | result |",
        "|" + "---|" * 9,
    ]
    print("\n".join(lines), flush=True)
    failed = 0
    for capability in asked.capabilities:
        for dtype in asked.dtypes:
            for size in asked.sizes:
                for shared in asked.shared:
                    start = time.perf_counter()
                    for row in kernels(capability, getattr(torch, dtype), size, *HEADS[shared]):
                        failed += row[-1] != "ok"
                        lines.append("| " + " | ".join(map(str, (capability, dtype, size, shared, *row))) + " |")
                        print(lines[-1], flush=True)
                        if asked.out:
                            asked.out.write_text("\n".join(lines) + "\n")
                    print(f"  {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return int(failed > 0)


def kernels(capability: int, dtype: Any, size: int, heads: int, shared: int) -> list[tuple[Any, ...]]:
    """(name, warps and stages, bytes of shared memory, bytes that there are, result) of each kernel; where it may be
    launched in several ways, of the one that fails or needs most."""
    with pretended(capability):
        try:
            sources = generated(dtype, size, heads, shared)
        except Exception as error:
            traceback.print_exc()
            return [("inductor", "", "", "", str(error).strip().splitlines()[0][:200].replace("|", "/"))]
        rows = [list(compiled(name, source, SHARED[capability])) for name, source in sources]
        return [max(some, key=lambda row: (row[-1] != "ok", row[2] or 0)) for some in rows]


def generated(dtype: Any, size: int, heads: int, shared: int) -> list[tuple[str, str]]:
    """Names and sources of the kernels that inductor makes of a pass with gradients."""
    import torch
    from torch._inductor import async_compile, compile_fx
    from torch.nn.attention.flex_attention import flex_attention

    from alignlab.models.attention import BLOCK, block_mask, kernel_options

    class Made(Exception):
        pass

    sources: list[tuple[str, str]] = []

    def keep(self: Any, name: str, source: str, *_: Any, **__: Any) -> Any:
        sources.append((name, source))
        return SimpleNamespace(run=None)

    def inner(graph: Any, inputs: Any, **options: Any) -> Any:
        compile_fx.compile_fx_inner(graph, inputs, **options)

        def run(*_: Any) -> None:
            raise Made

        return run

    options: Any = kernel_options(torch.device("cuda", 0), size, dtype)

    def compute(query: Any, key: Any, value: Any, mask: Any) -> Any:
        return flex_attention(query, key, value, block_mask=mask, enable_gqa=heads != shared, kernel_options=options)

    torch._dynamo.reset()
    length = 5 * BLOCK  # no number that heads or sizes have
    with fake_mode() as mode:
        query, key, value = (
            torch.empty(1, length, h, size, dtype=dtype, device="cuda").transpose(1, 2).requires_grad_()
            for h in (heads, shared, shared)
        )
        mask = block_mask(*(torch.empty(length, dtype=torch.int32, device="cuda") for _ in range(2)))
    del mode

    def backend(graph: Any, inputs: Any) -> Any:
        return compile_fx.compile_fx(graph, inputs, inner_compile=inner)

    with devices(127), patch.object(async_compile.AsyncCompile, "triton", keep):
        try:
            torch.compile(compute, dynamic=True, fullgraph=True, backend=backend)(query, key, value, mask)
        except Made:
            return sources
    raise RuntimeError("inductor compiled nothing")


def compiled(name: str, source: str, limit: int) -> Iterator[tuple[Any, ...]]:
    """A kernel's rows, one for each way to launch it."""
    import triton
    from torch._inductor.codecache import _load_triton_kernel_from_source
    from torch._inductor.runtime import triton_helpers, triton_heuristics

    made: list[Any] = []
    compile_ = triton.compile

    def keep(*arguments: Any, **options: Any) -> Any:
        made.append(compile_(*arguments, **options))
        return made[-1]

    with (
        patch.object(triton_heuristics.triton, "compile", keep),
        patch.object(triton_helpers, "set_driver_to_gpu", lambda: None),
    ):
        tuner: Any = _load_triton_kernel_from_source(name, source)
        for config in tuner.configs:
            made.clear()
            launch, result = f"{config.num_warps}, {config.num_stages}", "ok"
            try:
                tuner._precompile_config(config)
            except Exception as error:
                result = f"{type(error).__name__}: {error}".splitlines()[0][:200].replace("|", "/")
            if not made:
                yield name, launch, "", limit, result
                continue
            used = made[0].metadata.shared
            if used > limit:
                result = "more than a block may have"
            elif "cubin" in made[0].asm:
                result = "ok"  # compiled; what comes after would load it
            yield name, launch, used, limit, result


@contextmanager
def pretended(capability: int) -> Iterator[None]:
    """PyTorch and Triton find a GPU of this compute capability."""
    import torch
    import torch._inductor.config as config
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import compile_fx
    from torch._inductor.fx_passes import joint_graph, post_grad
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    major, minor = divmod(capability, 10)
    card = SimpleNamespace(
        name="none",
        major=major,
        minor=minor,
        total_memory=80 << 30,
        multi_processor_count=132 if major == 9 else 108,
        gcnArchName="",
        regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        shared_memory_per_block=49_152,
        shared_memory_per_block_optin=SHARED[capability],
        L2_cache_size=50 << 20,
    )

    class Driver:
        class utils:
            @staticmethod
            def get_device_properties(_: int) -> dict[str, int]:
                return {"max_shared_mem": SHARED[capability], "multiprocessor_count": card.multi_processor_count}

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_active_torch_device(self) -> Any:
            return torch.device("cuda", 0)

        def get_current_stream(self, _: int = 0) -> int:
            return 0

        def get_device_interface(self) -> Any:
            return torch.cuda

    stream = SimpleNamespace(cuda_stream=0, stream_id=0, device_index=0, device_type=1, device=torch.device("cuda", 0))

    def always(value: Any) -> Any:
        return lambda *_, **__: value  # a function of its own each time: dynamo keeps a list of them

    of_torch = {
        "is_available": True,
        "is_initialized": False,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": card,
        "get_device_capability": (major, minor),
        "get_device_name": "none",
        "is_bf16_supported": True,
        "synchronize": None,
        "set_device": None,
        "set_rng_state": None,
        "_lazy_init": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "current_stream": stream,
        "is_current_stream_capturing": False,
    }
    of_dynamo = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_compute_capability": capability,
        "get_device_properties": card,
        "is_bf16_supported": True,
        "get_raw_stream": 0,
        "set_device": None,
        "exchange_device": 0,
        "maybe_exchange_device": 0,
        "synchronize": None,
    }
    of_worker = {"get_device_properties": card, "current_device": 0, "set_device": None}
    of_c = ("_cuda_getDevice", "_cuda_exchangeDevice", "_cuda_maybeExchangeDevice", "_cuda_getCurrentRawStream")
    driver.set_active(Driver())
    with ExitStack() as stack:
        for name, value in of_torch.items():
            stack.enter_context(patch.object(torch.cuda, name, always(value)))
        stack.enter_context(
            patch.object(torch.cuda, "get_rng_state", lambda *_, **__: torch.zeros(16, dtype=torch.uint8))
        )
        for name, value in of_dynamo.items():
            stack.enter_context(patch.object(CudaInterface, name, staticmethod(always(value))))
        for name, value in of_worker.items():
            stack.enter_context(patch.object(CudaInterface.Worker, name, staticmethod(always(value))))
        for name in of_c:
            stack.enter_context(patch.object(torch._C, name, always(0)))
        for module in (joint_graph, post_grad):
            stack.enter_context(patch.object(module, "lazy_init", always(None)))
        stack.enter_context(patch.object(compile_fx, "get_cuda_device_context", lambda _: nullcontext()))
        stack.enter_context(patch.object(torch.accelerator, "is_available", always(False)))
        stack.enter_context(patch.object(torch.accelerator, "current_stream", always(stream)))
        stack.enter_context(config.patch(force_disable_caches=True, compile_threads=1))
        yield


if __name__ == "__main__":
    start_again()
    sys.exit(main())
