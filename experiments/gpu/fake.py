"""Every algorithm on a GPU that is not there: wrong devices and dtypes are found by execution.

    make fake-gpu                                                       # in an environment with a CUDA build of torch
    .venv-cuda/bin/python experiments/gpu/fake.py --only dpo ppo        # some algorithms

A run of one step for each algorithm × adapter (full, LoRA, LoRA on a base in NF4) × dtype of the checkpoint: it is
loaded, probed, sampled from, scored, packed, trained and updated, all of it by the package's own code on tensors of
"cuda" that have no contents. Stand-ins: FlexAttention is a function with its inputs and outputs that checks them;
layers in NF4 are those of `alignlab plan`. Numbers read from tensors are made up, so that nothing is said of values.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from faking import fake_cuda, has_backward, start_again  # noqa: E402

ADAPTERS = {
    "full": ["adapter=none"],
    "lora": ["adapter=lora"],
    "nf4": ["adapter=lora", "quantization=nf4"],
}
DTYPES = ("bfloat16", "float32")

WAITS: Counter[str] = Counter()
"""How often which line of the package has read from the GPU, over all runs."""


def main() -> int:
    from tests.training import runs  # the small model and its records are those of the tests

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(runs.ALGORITHMS), default=list(runs.ALGORITHMS))
    parser.add_argument("--adapters", nargs="+", choices=list(ADAPTERS), default=list(ADAPTERS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    asked = parser.parse_args()
    import torch

    lines = [
        f"torch {torch.__version__}, no GPU, "
        + ("forward and backward passes" if has_backward() else "no backward passes: they need a C compiler"),
        "",
        "| algorithm | adapter | checkpoint | rows | trained | frozen | products | heads | waits | result |",
        "|" + "---|" * 10,
    ]
    print("\n".join(lines), flush=True)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="alignlab-fake-") as name:
        folder = Path(name)
        prepare(folder, runs)
        for algorithm in asked.only:
            for adapter in asked.adapters:
                for dtype in asked.dtypes:
                    start = time.perf_counter()
                    found = step(folder, runs, algorithm, adapter, dtype)
                    failed += found["result"] != "ok"
                    line = " | ".join([algorithm, adapter, dtype, *(str(v) for v in found.values())])
                    lines.append(f"| {line} |")
                    print(lines[-1], flush=True)
                    print(f"  {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
                    if asked.out:
                        asked.out.write_text("\n".join(lines) + "\n")
    lines += ["", "Lines that read from the GPU, and how often over all of these runs:", ""]
    lines += [f"* `{place}`: {count}" for place, count in WAITS.most_common(20)]
    print("\n".join(lines[-len(WAITS) - 3 :]))
    if asked.out:
        asked.out.write_text("\n".join(lines) + "\n")
    return int(failed > 0)


def prepare(folder: Path, runs: Any) -> None:
    """Records, and a model in each dtype."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    runs.prepare(folder, hidden_size=64, intermediate_size=128)
    for dtype in DTYPES:
        base = AutoModelForCausalLM.from_pretrained(folder / "base").to(getattr(torch, dtype))
        base.save_pretrained(folder / dtype)
        AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / dtype)


def step(folder: Path, runs: Any, algorithm: str, adapter: str, dtype: str) -> dict[str, str]:
    """Dtypes that the run found, and "ok" or where it failed."""
    import torch

    from alignlab.models import attention, base
    from alignlab.training import run
    from alignlab.training.distributed.processes import Processes
    from alignlab.training.run_config import check

    words = [*ADAPTERS[adapter], f"model={folder}/{dtype}", "training.checkpoint_every=null", "training.steps=1"]
    words += ["algorithm.minimum=-1"] * (algorithm == "expert_iteration")  # all responses are alike
    words = runs.words_for(folder, algorithm, "out", "optimizer=adamw", *words, "training.progress=off")
    found = dict.fromkeys(("rows", "trained", "frozen", "products", "heads", "waits"), "")
    cuda = torch.device("cuda", 0)
    try:
        config = runs.config_of(folder, words)
        checked = check(config)
        processes = Processes()  # of this machine, before it has a GPU
        with (
            fake_cuda() as gpu,
            patch.object(base, "_from_pretrained", Reader(base._from_pretrained, checked.quantization)),
            patch.object(attention, "compiled", stand_in),
        ):
            processes.device = processes.accelerator.state.device = cuda
            model = run._load_model(checked, processes)
            found["rows"] = model.layout + "".join(f": {note}" for note in model.notes)
            splits = run._load_data(checked, model, processes)
            trainer = run._make_trainer(config, Path(config["out"]), checked, processes, None, model, splits, ())
            computes = trainer.computes
            found |= {"trained": computes["weights"], "frozen": computes.get("frozen", "")}
            found |= {key: computes.get(key, "") for key in ("products", "heads")}
            if not has_backward():
                trainer.engine.backward = lambda loss: None
            trainer.callbacks = []
            gpu.waits, gpu.places = 0, Counter()
            trainer.run()
            found["waits"] = str(gpu.waits)
            WAITS.update(gpu.places)
            strays = {n for n, p in model.named_parameters() if p.device.type != "cuda"}
            if strays:
                raise RuntimeError(f"{len(strays)} weights are not on the GPU: {min(strays)}")
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "/alignlab/" in f.filename]
        where = f"{'/'.join(Path(ours[-1].filename).parts[-2:])}:{ours[-1].lineno}" if ours else "?"
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        return {**found, "result": f"{where}: {said[:200]}".replace("|", "/")}
    return {**found, "result": "ok"}


class Reader:
    """Reads a model as `load_base` does, but in earnest on the CPU; what it gives back has no contents, and is where it
    was to be."""

    def __init__(self, read: Any, quantization: Any) -> None:
        self.read, self.quantization = read, quantization

    def __call__(self, auto: Any, path: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        import torch
        from torch.utils._python_dispatch import _disable_current_modes

        from alignlab.planning.shapes import quantise

        options = dict(options)
        device = torch.device("cuda" if options.pop("device_map", None) else "cpu")
        few_bits = options.pop("quantization_config", None)
        with _disable_current_modes():
            network, found = self.read(auto, path, options)
        made: dict[int, Any] = {}
        for module in network.modules():
            own: Any = {"recurse": False, "remove_duplicate": False}
            for name, tensor in [*module.named_parameters(**own), *module.named_buffers(**own)]:
                if id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    if isinstance(tensor, torch.nn.Parameter):
                        empty = torch.nn.Parameter(empty, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = empty
                setattr(module, name, made[id(tensor)])
        if few_bits is not None:
            quantise(network, self.quantization, on_cpu=False)
            network.config.quantization_config = few_bits.to_dict()
        return network, found


def stand_in(heads: int, shared: int, size: int, value_size: int, dtype: Any, device: Any, *_: Any) -> Any:
    """For the compiled FlexAttention: what it refuses is refused, and what it gives back has its shape and dtype."""
    import torch

    def compute(query: Any, key: Any, value: Any, mask: Any) -> Any:
        if not query.dtype == key.dtype == value.dtype == dtype:
            raise ValueError(f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}")
        captured = [c.cell_contents for c in mask.mask_mod.__closure__]
        blocks = [x for x in mask.as_tuple() if isinstance(x, torch.Tensor)]
        for tensor in (query, key, value, *captured, *blocks):
            if tensor.device.type != device.type:
                raise ValueError(f"a tensor of FlexAttention is on {tensor.device}")
        lengths = (query.shape[2], key.shape[2])
        if any(n % attention_block() or n < 2 * attention_block() for n in lengths) or mask.shape[-2:] != lengths:
            raise ValueError(f"rows of {lengths} tokens with a mask of {mask.shape}")
        key, value = (x.repeat_interleave(heads // shared, 1) for x in (key, value))
        return (query @ key.transpose(-1, -2)).softmax(-1).to(dtype) @ value

    return compute


def attention_block() -> int:
    from alignlab.models.attention import BLOCK

    return BLOCK


if __name__ == "__main__":
    start_again()
    sys.exit(main())
