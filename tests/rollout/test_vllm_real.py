"""Rollouts from a real vLLM: `make test-vllm` (some minutes; servers take half a minute each to start)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignlab.core import AlignlabError, Group, RolloutContext
from alignlab.core.children import free_port
from alignlab.models import FullFineTuning, LoRA, ModelSettings, PackedModel, load_model, private_api
from alignlab.rollout import LocalRollout, VllmRollout, VllmSettings
from alignlab.rollout.vllm import transfer
from alignlab.rollout.vllm.client import ServerLost
from alignlab.rollout.vllm.engine import VllmSampler
from alignlab.rollout.vllm.run import VllmRun
from alignlab.rollout.vllm.server import Server, interpreter, start
from alignlab.scoring import fill_log_probs
from tests import tiny
from tests.components import missing
from tests.training import runs

pytestmark = [pytest.mark.component, pytest.mark.timeout(900)]

SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 96}
"""vLLM's attention on CPUs wants heads of 32 at least."""

MEMORY = 0.08
"""Share of the host's memory for each server."""

LIMITS = f"rollout.vllm.memory={MEMORY}"


@pytest.fixture(scope="module", autouse=True)
def vllm() -> str:
    """The interpreter that has it."""
    try:
        return interpreter(VllmSettings())
    except AlignlabError as error:
        missing(str(error))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("vllm")
    runs.prepare(made, **SIZES)
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """One that is not a run's own, able to take adapters and whole weights."""
    words = ["--model", str(folder / "base"), "--dtype", "float32", "--enable-lora", "--max-lora-rank", "8"]
    words += ["--gpu-memory-utilization", str(MEMORY), "--enforce-eager"]
    variables = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_SERVER_DEV_MODE": "1"}
    started = start(VllmSettings(port=free_port()), words, folder / "server.log", variables)
    try:
        started.wait(300)
        yield started
    finally:
        started.close()


class Imitated:
    """What a GPU or NCCL would carry to a server that has `gpu_of_cpu` on its path lies in files."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.written = folder, 0
        folder.mkdir()
        monkeypatch.setenv("IMITATED_NCCL", str(folder))
        monkeypatch.setattr(transfer, "export", self.export)
        monkeypatch.setattr(transfer, "nccl_of", lambda settings: "(2, 29)")
        monkeypatch.setattr(private_api, "nccl_version", lambda: (2, 29))
        monkeypatch.setattr(private_api, "nccl_key", lambda: b"k" * 128)
        monkeypatch.setattr(private_api, "nccl_group", lambda world, key: world)
        monkeypatch.setattr(private_api, "nccl_broadcast", self.broadcast)
        monkeypatch.setattr(transfer, "PART", 1 << 14)

    def export(self, packed: torch.Tensor) -> dict[str, tuple[Any, ...]]:
        return {"imitated": (str(self.write(packed)), *range(7))}

    def broadcast(self, tensors: list[torch.Tensor], group: Any) -> Any:
        for tensor in tensors:
            self.write(tensor)
        return SimpleNamespace(query=lambda: True)

    def write(self, tensor: torch.Tensor) -> Path:
        path = self.folder / f"{self.written}.pt"
        torch.save(tensor, path.with_suffix(".part"))
        self.written += 1
        return path.with_suffix(".part").rename(path)


@pytest.mark.parametrize("way", ["ipc", "nccl"])
def test_weight_transfer_as_vllm_documents_it(folder: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Its own endpoints, sleep and loading of layers, with files in the place of CUDA and NCCL: the log-probs are the
    trainer's after each update."""
    carried = Imitated(folder / f"carried-{way}", monkeypatch)
    python = folder / f"python-{way}"
    beside = Path(__file__).parent / "gpu_of_cpu"
    python.write_text(
        f'#!/bin/sh\n[ "$2" = -c ] || shift\nPYTHONPATH={beside} exec "{interpreter(VllmSettings())}" "$@"\n'
    )
    python.chmod(0o755)
    policy, settings = policy_of(folder, "none")
    words: dict[str, Any] = {"python": str(python), "memory": MEMORY, "sleep": 0, "arguments": ["--enforce-eager"]}
    rollout = VllmRollout(max_new_tokens=16, vllm={**words, "devices": None if way == "ipc" else "7"})
    context = RolloutContext(settings, folder / f"run-{way}", device="cuda:0", dtype=torch.float32)
    run = VllmRun(rollout.vllm, context)
    run.level = 2 if way == "ipc" else 0  # its build for CPUs refuses the switch, but takes the requests
    with run:
        assert run.way == way
        for seed in range(2):
            run.push(policy)
            groups = VllmSampler(policy, rollout, run).sample(prompts(), 6, 1)
            run.rest()
            found = differences(policy, groups)
            assert len(found) > 100 and max(found) < 1e-4
            shake(policy, seed)
            assert max(differences(policy, groups_of(groups))) > 1e-2, "the change of weights is one that shows"
    assert carried.written > 10


def policy_of(folder: Path, adapter: str) -> tuple[PackedModel, ModelSettings]:
    settings = ModelSettings(path=str(folder / "base"))
    return load_model(settings, LoRA(r=4) if adapter == "lora" else FullFineTuning()), settings


def context_of(policy: PackedModel, settings: ModelSettings, folder: Path) -> RolloutContext:
    """That of a run which trains this policy."""
    return RolloutContext(settings, folder, adapter=LoRA(r=4) if hasattr(policy.network, "peft_config") else None)


def prompts() -> list[Group]:
    """Of 5, 9 and 40 tokens: the last one is longer than a block of the cache that the server keeps."""
    return [g.with_responses([]) for g in tiny.groups([(5, []), (9, []), (40, [])])]


def shake(policy: PackedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def differences(policy: PackedModel, groups: list[Group], temperature: float = 1.0) -> list[float]:
    """Between the log-probs that came with the samples and the trainer's own."""
    fill_log_probs(policy, groups, "own", 8192, temperature)
    return [
        abs(a - b)
        for g in groups
        for r in g.responses
        for a, b in zip(r.columns["own"], r.columns["behaviour_logp"], strict=True)  # type: ignore[arg-type]
    ]


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_log_probs_are_the_trainer_s_after_every_change_of_weights(folder: Path, server: Server, adapter: str) -> None:
    """Including prompts whose keys and values the server still has of earlier weights."""
    policy, settings = policy_of(folder, adapter)
    rollout = VllmRollout(max_new_tokens=16, vllm={"url": server.url})  # type: ignore[arg-type]
    with VllmRun(rollout.vllm, context_of(policy, settings, folder / f"weights-{adapter}")) as run:
        drawn = []
        for seed in range(3):
            run.push(policy)
            engine = VllmSampler(policy, rollout, run)
            groups = engine.sample(prompts(), 6, 1)
            found = differences(policy, groups)
            assert len(found) > 100 and max(found) < 1e-4
            assert tokens(groups) == tokens(engine.sample(prompts(), 6, 1)), "the seed decides"
            assert tokens(groups) != tokens(engine.sample(prompts(), 6, 2))
            drawn.append(tokens(groups))
            shake(policy, seed)
        assert max(differences(policy, groups_of(groups))) > 1e-2, "the change of weights is one that shows"
        assert drawn[0] != drawn[1] != drawn[2]
        assert run.servers[0].process is None
    if adapter == "none":
        restore(folder, server)


def restore(folder: Path, server: Server) -> None:
    """Give the server the weights that it was started with, for the other tests."""
    policy, settings = policy_of(folder, "none")
    rollout = VllmRollout(vllm={"url": server.url})  # type: ignore[arg-type]
    with VllmRun(rollout.vllm, context_of(policy, settings, folder / "weights-back")) as run:
        run.push(policy)


def groups_of(groups: list[Group]) -> list[Group]:
    for response in (r for g in groups for r in g.responses):
        del response.columns["own"]
    return groups


def tokens(groups: list[Group]) -> list[list[int]]:
    return [r.token_ids for g in groups for r in g.responses]


def test_the_rules_are_the_local_engine_s(folder: Path, server: Server) -> None:
    """Ends, banned tokens, least lengths, temperature and filters: of the same distribution, to sampling error."""
    policy, settings = policy_of(folder, "none")
    some: dict[str, Any] = {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "max_new_tokens": 10, "min_new_tokens": 2}
    some |= {"stop": ["q", "a b"], "stop_tokens": ["r"], "suppress_tokens": ["e", "i"]}
    rollout = VllmRollout(**some, vllm={"url": server.url})
    given = prompts()[:1]
    with VllmRun(rollout.vllm, context_of(policy, settings, folder / "weights-rules")) as run:
        run.push(policy)
        (theirs,) = VllmSampler(policy, rollout, run).sample(given, 400, 0)
    (ours,) = LocalRollout(**some).sampler(policy).sample(given, 400, 0)
    banned = {tiny.VOCABULARY.index(w) for w in "ei"}
    for response in theirs.responses:
        assert not banned & set(response.token_ids)
        assert 2 <= len(response.token_ids) <= 10
        assert response.finished or len(response.token_ids) == 10
        assert "q" not in response.text.split()[2:]
    for measure in (len_of, ended, first_of, log_prob_of):
        mine, other = [measure(r) for r in ours.responses], [measure(r) for r in theirs.responses]
        a, b = torch.tensor([mine, other]).double()
        standard_error = float(((a.var() + b.var()) / len(a)).sqrt())
        assert abs(float(a.mean() - b.mean())) < 4 * standard_error + 1e-9, measure.__name__


def len_of(response: Any) -> float:
    return float(len(response.token_ids))


def ended(response: Any) -> float:
    return float(response.finished)


def first_of(response: Any) -> float:
    return float(response.token_ids[0])


def log_prob_of(response: Any) -> float:
    return float(response.columns["behaviour_logp"][0])


def test_greedy_is_the_local_engine_s(folder: Path, server: Server) -> None:
    policy, settings = policy_of(folder, "none")
    rollout = VllmRollout(max_new_tokens=12, temperature=0, vllm={"url": server.url})  # type: ignore[arg-type]
    with VllmRun(rollout.vllm, context_of(policy, settings, folder / "weights-greedy")) as run:
        run.push(policy)
        theirs = VllmSampler(policy, rollout, run).greedy(prompts())
    assert tokens(theirs) == tokens(rollout.sampler(policy).greedy(prompts()))


def test_a_folder_that_it_does_not_see(folder: Path, server: Server) -> None:
    policy, settings = policy_of(folder, "lora")
    rollout = VllmRollout(max_new_tokens=12, vllm={"url": server.url})  # type: ignore[arg-type]
    with VllmRun(rollout.vllm, context_of(policy, settings, folder / "weights-unseen")) as run:
        seen = run._weights
        run._weights = seen.with_name("written")
        post = run.servers[0].client.post

        def elsewhere(path: str, body: Any = None) -> Any:
            return post(path, {**body, "lora_path": str(seen.with_name("not there"))})

        run.servers[0].client.post = elsewhere  # type: ignore[method-assign]
        with pytest.raises(AlignlabError, match=r"rollout\.vllm\.shared_dir=DIR"):
            run.push(policy)


@pytest.mark.parametrize(("algorithm", "more"), [("grpo", ("adapter=lora",)), ("ppo", ()), ("rloo", ("adapter=lora",))])
def test_training(folder: Path, server: Server, algorithm: str, more: tuple[str, ...]) -> None:
    """Each step's samples come from the weights as they are, and the run learns what the rule wants."""
    words = (
        "rollout=vllm",
        f"rollout.vllm.url={server.url}",
        "source.group_size=8",
        "source.rollout_batch_size=6",
        "source.ppo_epochs=1",
    )
    rest = ("training.batch_size=6", "training.steps=12", "training.max_seconds=200", "adapter.r=8", "optimizer=adamw")
    out = f"run-{algorithm}"
    rest = tuple(w for w in rest if more or not w.startswith("adapter."))
    runs.train(folder, algorithm, out, *words, *rest, "optimizer.lr=0.02", *more)
    if not more:
        restore(folder, server)
    lines = runs.metrics(folder, out)
    assert max(line["rollout_logp_difference_max"] for line in lines) < 1e-3
    assert max(line["rollout_kl"] for line in lines) < 1e-6
    rewards = [line["reward"] for line in lines]
    assert sum(rewards[-3:]) > sum(rewards[:3]), "more of what the rule rewards"


def test_samples_ahead(folder: Path, server: Server) -> None:
    words = ("rollout=vllm", f"rollout.vllm.url={server.url}", "adapter=lora", "adapter.r=8", "optimizer.lr=0.3")
    ahead = ("rollout.vllm.asynchronous=true", "rollout.vllm.importance_cap=2", "training.steps=5")
    runs.train(folder, "grpo", "ahead", *words, *ahead)
    lines = runs.metrics(folder, "ahead")
    assert [line["rollout_staleness"] for line in lines] == [0, 1, 1, 1, 1]
    assert lines[0]["rollout_logp_difference"] < 1e-5 < lines[-1]["rollout_logp_difference"]


# ---------------------------------------------------------------------- servers of a run's own


def processes_of(folder: Path) -> list[int]:
    """Servers, and what they started, of runs in this folder; by what they were started with."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"ALIGNLAB_TEST={folder}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def command(folder: Path, out: str, *more: str, processes: int = 1) -> subprocess.Popen[str]:
    words = runs.command(folder, "grpo", out, "rollout=vllm", LIMITS, "adapter=lora", *more, processes=processes)
    environment = {**runs.environment(), "ALIGNLAB_TEST": str(folder / out)}
    return subprocess.Popen(
        words, env=environment, cwd=runs.REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def until_step(folder: Path, out: str, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    metrics = folder / out / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)


def gone(folder: Path) -> None:
    deadline = time.monotonic() + 40
    while left := processes_of(folder):
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_server_that_is_killed_and_a_run_that_is(folder: Path) -> None:
    """A run whose server is killed saves a checkpoint and says so; one that is killed itself leaves no server; then the
    same command ends what was begun, in two processes."""
    long = ("training.steps=400", "source.rollout_batch_size=5")
    run = command(folder, "faults", *long)
    until_step(folder, "faults", 3, run)
    servers = [
        p for p in processes_of(folder / "faults") if "api_server" in name_of(p) and "children" not in name_of(p)
    ]
    assert servers
    os.kill(servers[0], signal.SIGKILL)
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 69, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("alignlab: rollout.vllm: the server is lost") and "the same command goes on" in last
    assert "Traceback" not in said
    gone(folder / "faults")
    reached = len(runs.metrics(folder, "faults"))
    assert list((folder / "faults" / "checkpoints").glob(f"step-{reached:08}"))

    run = command(folder, "faults", *long)
    until_step(folder, "faults", reached + 3, run)
    run.kill()
    run.communicate(timeout=60)
    gone(folder / "faults")

    steps = ("training.steps=401", "source.rollout_batch_size=5", "training.resume=never", "training.max_seconds=2")
    run = command(folder, "both", *steps, processes=2)
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0, said
    assert max(line["rollout_logp_difference_max"] for line in runs.metrics(folder, "both")) < 1e-3
    gone(folder / "both")


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def test_a_server_that_cannot_start(folder: Path) -> None:
    policy, settings = policy_of(folder, "none")
    words = {"memory": MEMORY, "arguments": ["--max-model-len", "100000"]}
    rollout = VllmRollout(vllm=words)  # type: ignore[arg-type]
    run = VllmRun(rollout.vllm, context_of(policy, settings, folder / "too-long"))
    with pytest.raises(ServerLost, match=r"did not start: vLLM ended with status 1; its log ends .*max_model_len"):
        run.ready()
    run.close()
