"""Memory that runs out: fewer tokens at a time, and the same result."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.core import AlignlabError
from alignlab.core.memory import TOKENS_ON_CPU, TOKENS_ON_GPU, in_halves, is_memory_error, usual_tokens
from alignlab.training import step
from alignlab.training.micro_batch_budget import TokenBudget
from tests.training import forks, runs

USUAL = usual_tokens(on_cpu=not torch.cuda.is_available())
MORE = ["adapter=lora", "adapter.dropout=0.2", "training.batch_size=6", "training.progress=off"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("memory")
    runs.prepare(made)
    return made


def no_memory(kind: str) -> Exception:
    return {
        "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
        "python": MemoryError(),
    }[kind]


@pytest.mark.parametrize("kind", ["cuda", "cpu", "python"])
def test_what_counts_as_running_out_of_memory(kind: str) -> None:
    assert is_memory_error(no_memory(kind))


@pytest.mark.parametrize("other", [RuntimeError("shape mismatch"), KeyError("out of memory"), OSError(28, "No space")])
def test_what_does_not(other: Exception) -> None:
    assert not is_memory_error(other)


def test_the_allocator_itself_is_understood() -> None:
    """What PyTorch says when the operating system refuses."""
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_memory_error(refused.value)


class Memory:
    """A device that takes micro-batches of up to so many tokens.

    Attributes:
        asked: the tokens of each micro-batch tried, with whether it was trained on.
    """

    def __init__(self, patch: pytest.MonkeyPatch, tokens: int, kind: str = "cpu", backward: bool = False) -> None:
        self.asked: list[tuple[int, bool]] = []
        aggregate = step.aggregate

        def guarded(loss: torch.Tensor, *arguments: Any) -> torch.Tensor:
            value = aggregate(loss, *arguments)
            if self.asked[-1] <= tokens:
                return value
            if not backward:
                raise no_memory(kind)
            value.register_hook(lambda gradient: (_ for _ in ()).throw(no_memory(kind)))
            return value

        lay_out = step._micro_batch

        def noted(batch: Any, *arguments: Any) -> Any:
            self.asked.append(sum(g.packed_length for g in batch.groups))
            return lay_out(batch, *arguments)

        patch.setattr(step, "_micro_batch", noted)
        patch.setattr(step, "aggregate", guarded)


@pytest.mark.parametrize(("kind", "backward"), [("cpu", False), ("cuda", True), ("python", False)])
def test_the_budget_is_halved_and_the_run_is_that_of_a_smaller_budget(
    folder: Path, kind: str, backward: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Bit for bit that of a run which began with the budget that was arrived at: dropout draws again from where it
    was, and nothing of the failed attempt is left in the gradient."""
    out = f"halved-{kind}"
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        memory = Memory(patch, 40, kind, backward)
        runs.train(folder, "simpo", out, *MORE)
    said = [r.getMessage() for r in caplog.records if "max_tokens_per_microbatch" in r.getMessage()]
    kept = json.loads((folder / out / "token_budget.json").read_text())
    assert kept["asked"] == USUAL and kept["tokens"] <= 40
    assert len(said) == sum(tokens > 40 for tokens in memory.asked) <= 3
    assert re.search(rf"training\.max_tokens_per_microbatch goes down from [\d,]+ to {kept['tokens']}$", said[-1])
    small = f"{out}-small"
    runs.train(folder, "simpo", small, *MORE, f"training.max_tokens_per_microbatch={kept['tokens']}")
    assert runs.identical(runs.weights(folder, out), runs.weights(folder, small))
    first, second = (runs.metrics(folder, o) for o in (out, small))
    assert [line["loss"] for line in first] == [line["loss"] for line in second]


def test_who_says_nothing_gets_what_suits_the_device(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's line says it, and what an earlier sitting has learnt."""
    cpu, cuda = (TokenBudget(tmp_path, None, torch.device(kind)) for kind in ("cpu", "cuda"))
    assert (cpu.tokens, cuda.tokens) == (cpu.asked, cuda.asked) == (TOKENS_ON_CPU, TOKENS_ON_GPU)
    assert TokenBudget(tmp_path, 7, torch.device("cpu")).tokens == 7
    for out, more, said in (
        ("usual", [], f"{USUAL:,}"),
        ("asked", ["training.max_tokens_per_microbatch=3000"], "3,000"),
    ):
        runs.train(folder, "simpo", out, *MORE, "training.steps=1", *more)
        assert f" rows, {said} tokens at a time → " in capsys.readouterr().out
    (folder / "usual/token_budget.json").write_text(json.dumps({"asked": USUAL, "tokens": 99}))
    (folder / "usual/result.json").unlink()  # or the run would be over
    runs.train(folder, "simpo", "usual", *MORE, "training.steps=1")
    assert " rows, 99 tokens at a time → " in capsys.readouterr().out


def test_a_continuation_keeps_the_budget_and_another_wish_is_granted(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Memory(patch, 40)
        runs.train(folder, "dpo", "kept", *MORE, "training.checkpoint_every=3")
    kept = json.loads((folder / "kept/token_budget.json").read_text())["tokens"]
    budgets: list[int] = []
    run_batch = step.run_batch

    def noting(*arguments: Any, **options: Any) -> Any:
        budgets.append(options["max_tokens_per_microbatch"])
        return run_batch(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "run_batch", noting)
        for more in ([], ["training.max_tokens_per_microbatch=5000"]):
            (folder / "kept/checkpoints/step-00000006/state.pt").unlink(missing_ok=True)
            (folder / "kept/result.json").unlink()  # or the run would be over
            runs.train(folder, "dpo", "kept", *MORE, "training.checkpoint_every=3", *more)
    assert budgets == [kept] * 3 + [5000] * 3


def test_one_group_that_is_too_long_is_named(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Memory(patch, 3)
        with pytest.raises(AlignlabError, match=r"micro-batch of one group.*preferences\.jsonl:\d+.*data\.max_length"):
            runs.train(folder, "dpo", "should_prune", *MORE)


def test_two_processes_agree(folder: Path) -> None:
    """Only one has no memory; both take the step again with the same budget, and none waits for the other."""
    more = [*MORE, "adapter.dropout=0", "distributed=ddp"]
    forks.train(folder, "dpo", "two-whole", *more)
    with pytest.MonkeyPatch.context() as patch:
        aggregate, calls = step.aggregate, 0

        def starved(*arguments: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == 3 and os.environ["RANK"] == "1":
                raise no_memory("cuda")
            return aggregate(*arguments)

        patch.setattr(step, "aggregate", starved)
        forks.train(folder, "dpo", "two", *more)
    assert json.loads((folder / "two/token_budget.json").read_text())["tokens"] < USUAL
    assert runs.difference(runs.weights(folder, "two-whole"), runs.weights(folder, "two")) < 1e-5


# ------------------------------------------------------------------ sampling and scoring


def test_work_in_halves() -> None:
    tried: list[list[int]] = []

    def work(batch: list[int]) -> Iterator[int]:
        tried.append(batch)
        if len(batch) > 2:
            raise MemoryError
        yield sum(batch)

    assert list(in_halves([[1, 2, 3, 4, 5], [6]], work, "a test")) == [3, 3, 9, 6]
    assert tried == [[1, 2, 3, 4, 5], [1, 2], [3, 4, 5], [3], [4, 5], [6]]


def test_a_single_item_too_many() -> None:
    def work(batch: list[int]) -> Iterator[int]:
        raise MemoryError
        yield 0

    with pytest.raises(AlignlabError, match="out of memory in a test, with a single item"):
        list(in_halves([[1, 2]], work, "a test"))


def test_sampling_and_scoring_in_smaller_batches_change_nothing(folder: Path) -> None:
    """Rows that had ended stay as they are, the others go on where they were. (Trials of the model are left alone.)"""
    from alignlab.models.packed_model import PackedModel
    from alignlab.rollout import local
    from alignlab.rollout.continuous import ContinuousDecoding
    from alignlab.training import run

    more = ["training.steps=2", "training.progress=off", "source.rollout_batch_size=6"]
    runs.train(folder, "ppo", "plenty", *more)
    failures = {"sampling": 0, "scoring": 0}
    append, forward, load = ContinuousDecoding.append, PackedModel.forward, run.load_model
    try_it = local.takes_plans
    loaded: list[Any] = []
    tried: list[bool] = []

    def starved_append(self: Any, token_R: torch.Tensor) -> None:
        if tried and len(token_R) > 4:
            failures["sampling"] += 1
            raise no_memory("cuda")
        append(self, token_R)

    def starved_forward(self: Any, rows: Any, *arguments: Any) -> Any:
        if loaded and not torch.is_grad_enabled() and rows.tokens > 60:
            failures["scoring"] += 1
            raise no_memory("cpu")
        return forward(self, rows, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContinuousDecoding, "append", starved_append)
        patch.setattr(PackedModel, "forward", starved_forward)
        patch.setattr(run, "load_model", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[0])
        patch.setattr(local, "takes_plans", lambda *a: tried.append(try_it(*a)) or tried[-1])
        runs.train(folder, "ppo", "little", *more)
    assert failures["sampling"] > 0 and failures["scoring"] > 0
    assert (folder / "plenty/samples.jsonl").read_text() == (folder / "little/samples.jsonl").read_text()
    assert runs.difference(runs.weights(folder, "plenty"), runs.weights(folder, "little")) < 1e-4


# ------------------------------------------------------------------ in earnest

LIMITED = """
import re, resource, sys
from pathlib import Path
from alignlab.config import compose, resolve
from alignlab.training import run, step
run_batch = step.run_batch
def limited(*arguments, **options):
    if options["max_tokens_per_microbatch"] == 8192:  # first call: from now on there is room for a part of it
        used = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
        resource.setrlimit(resource.RLIMIT_DATA, (used + (int(sys.argv[1]) << 20), resource.RLIM_INFINITY))
    return run_batch(*arguments, **options)
step.run_batch = limited
config = resolve(compose("train", sys.argv[2:]))
run.train(config, Path(config["out"]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA")
def test_the_operating_system_refuses_memory(folder: Path) -> None:
    """A process whose data ends where the first step needs more of it."""
    (folder / "long.jsonl").write_text(
        "".join(json.dumps({"prompt": "a b", "completion": " ".join("abcdefgh" * 5)}) + "\n" for _ in range(300))
    )
    words = runs.words_for(folder, "sft", "refused", *MORE, "training.batch_size=300", "training.steps=2")
    words += [f"data.path={folder}/long.jsonl", "training.max_tokens_per_microbatch=8192"]
    done = runs.spawn([sys.executable, "-c", LIMITED, "30", *words])
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        "allocate memory" in done.stderr and "training.max_tokens_per_microbatch goes down from 8,192 to" in done.stderr
    )
