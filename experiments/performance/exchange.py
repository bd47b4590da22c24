"""What an iteration's groups cost between sampling and the first forward pass: their exchange and their layout.

    python experiments/performance/exchange.py                          # a minute on two cores
    python experiments/performance/exchange.py --tokens 500000 --processes 4

Several processes on one machine each have a share of the responses: token ids from a vocabulary of 128,000, text,
log-probs of the sampler, the policy and the reference, a reward. Reported are the bytes that a process sends and the
seconds until each has everything (the slowest process), then the seconds until one process has laid everything out:
rows for the model, and the batch with its columns for the loss. Medians over the rounds; CPU seconds stand beside those
of the clock, since other programs on the machine disturb them less.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

WORDS = ("the ", "model ", "reads ", "a ", "sentence ", "of ", "words ", "\n")
COLUMNS = ("behaviour_logp", "old_logp", "ref_logp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[500_000, 1_000_000], help="response tokens")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    print("| response tokens | processes | MB sent by each | exchange, s (CPU) | rows, s (CPU) | batch, s (CPU) |")
    print("|--:|--:|--:|--:|--:|--:|", flush=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    for rank in range(asked.processes):
        context.Process(target=_member, args=(rank, port, asked)).start()


def _member(rank: int, port: int, asked: argparse.Namespace) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": asked.processes, "LOCAL_WORLD_SIZE": asked.processes}
    os.environ |= {k: str(v) for k, v in (place | {"MASTER_PORT": port, "OMP_NUM_THREADS": 1}).items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""}
    import torch

    from alignlab.training.distributed.processes import Processes
    from alignlab.training.settings import DistributedSettings

    torch.set_num_threads(1)
    processes = Processes("no", DistributedSettings(mode="ddp"))
    for tokens in asked.tokens:
        rounds = [_round(processes, tokens, seed) for seed in range(asked.rounds)]
        everyone = processes.gather(rounds)
        if processes.is_main:
            sent = statistics.median(found["bytes"] for each in everyone for found in each) / 1e6
            slowest = [max(each[i]["exchange"] for each in everyone) for i in range(asked.rounds)]
            parts = [slowest, *([found[name] for found in rounds] for name in ("rows", "batch"))]
            seconds = ["{:.3f} ({:.3f})".format(*map(statistics.median, zip(*part, strict=True))) for part in parts]
            print(f"| {tokens:,} | {asked.processes} | {sent:.1f} | {' | '.join(seconds)} |", flush=True)


def _round(processes: Any, tokens: int, seed: int) -> dict[str, Any]:
    """One iteration: each process samples its share, all exchange."""
    from alignlab.core import Algorithm, Batch
    from alignlab.models.packing import lay_out
    from alignlab.training.collect import Collector
    from alignlab.training.settings import SourceSettings

    found: dict[str, Any] = {}
    exchange = Collector._exchange

    def measured(self: Collector, *arguments: Any, **options: Any) -> Any:
        processes.barrier()
        before = _sent()
        with _timed(found, "exchange"):
            result = exchange(self, *arguments, **options)
        found["bytes"] = _sent() - before
        return result

    collector = Collector(
        algorithm=Algorithm(),
        engine=SimpleNamespace(model=None, processes=processes, whole=lambda policy: nullcontext()),  # type: ignore[arg-type]
        source=SourceSettings(kind="rollout", group_size=8),
        scorers=[],
        reference=None,
        rollout=Ready(),
        environment=None,
        max_tokens_per_microbatch=1,
    )
    Collector._exchange = measured  # type: ignore[method-assign]
    groups = collector.collect(_prompts(tokens), seed).sampled
    Collector._exchange = exchange  # type: ignore[method-assign]
    if processes.is_main:
        with _timed(found, "rows"):
            lay_out(groups, "varlen")
        with _timed(found, "batch"):
            batch = Batch(groups)
            for column in COLUMNS:
                assert len(batch[f"{column}_T"]) == len(batch.token_T)
    processes.barrier()
    return found


@contextmanager
def _timed(found: dict[str, Any], name: str) -> Iterator[None]:
    """Seconds on the clock, and of this process's CPU."""
    begun, used = time.perf_counter(), time.process_time()
    yield
    found[name] = time.perf_counter() - begun, time.process_time() - used


def _sent() -> int:
    """Bytes that this process has written so far, to sockets too."""
    return int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0])


def _prompts(tokens: int) -> list[Any]:
    """Prompts of 128 tokens for which 8 responses of 256 to 768 tokens each are to be sampled."""
    from alignlab.core import Group

    rng = np.random.default_rng(0)
    return [
        Group(rng.integers(128_000, size=128).tolist(), [], f"prompts.jsonl:{i}", "".join(rng.choice(WORDS, 128)))
        for i in range(max(1, tokens // (8 * 512)))
    ]


class Ready:
    """A rollout engine and sampler whose responses cost nothing but random numbers."""

    temperature, importance_cap, off_policy, prefetches, generated_tokens = 1.0, None, False, False, 0

    def check(self, config: Any, algorithm: Any) -> None: ...

    def start(self, context: Any) -> Any:
        return nullcontext()

    def sampler(self, policy: Any) -> Ready:
        return self

    def sample(self, groups: Any, n: int, seed: int) -> list[Any]:
        from alignlab.rollout.batching import Row

        rng = np.random.default_rng(seed)
        found = []
        for group in groups:
            responses = []
            for k in range(n):
                count = int(rng.integers(256, 769))
                logps = {name: rng.normal(size=count).astype(np.float32) for name in COLUMNS}
                row = Row(group.prompt_ids, group.origin, b"", k, count, rng.integers(128_000, size=count).tolist())
                row.logp, row.text = logps["behaviour_logp"].tolist(), "".join(rng.choice(WORDS, count))
                responses.append(row.response())
                responses[-1].columns |= {"old_logp": logps["old_logp"], "ref_logp": logps["ref_logp"], "reward": 0.5}
            found.append(group.with_responses(responses))
        return found


if __name__ == "__main__":
    main()
