"""A run's own vLLM servers: how many, where, with how much memory, when they sleep, how weights get into them.

GPUs are imitated: servers by a stand-in that is asked what vLLM would be asked, memory of a GPU by bytes.
"""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from threading import Barrier, Thread, current_thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignlab.core import AlignlabError, ConfigError, RolloutContext
from alignlab.models import LoRA, ModelSettings, PackedModel, load_model, private_api
from alignlab.rollout import RolloutSettings, VllmSettings
from alignlab.rollout.vllm import run as run_module
from alignlab.rollout.vllm import transfer, weights
from alignlab.rollout.vllm.client import Refused, ServerLost
from alignlab.rollout.vllm.engine import VllmSampler
from alignlab.rollout.vllm.layout import Place, Replica, memory_share, own_place, replicas_of
from alignlab.rollout.vllm.run import VllmRun, level_of
from alignlab.rollout.vllm.server import Server
from tests import tiny as letters
from tests.rollout.fake_vllm import FakeVllm, always
from tests.rollout.tiny import ids, prompts


def places(*gpus: str | None, host: str = "a") -> list[Place]:
    return [Place(host, gpu) for gpu in gpus]


# ---------------------------------------------------------------------- where servers are


@pytest.mark.parametrize(
    ("settings", "processes", "expected"),
    [
        ({}, places("0"), [(0, "0", (0,), (0,))]),
        ({}, places("0", "1"), [(0, "0", (0,), (0,)), (1, "1", (1,), (1,))]),
        ({"tensor_parallel": 2}, places(*"0123"), [(0, "01", (0, 1), (0, 1)), (2, "23", (2, 3), (2, 3))]),
        ({"replicas": 1}, places("0", "1"), [(0, "0", (0,), (0, 1))]),
        (
            {},
            [*places("0", "1"), *places("0", "1", host="b")],
            [(r, "01"[r % 2], (r,), (r,)) for r in range(4)],
        ),
        ({"devices": "4,5"}, places("0", "1", "2"), [(0, "4", (), (0, 2)), (0, "5", (), (1,))]),
        ({"devices": "4,5,6"}, places("0"), [(0, d, (), (0,)) for d in "456"]),
        ({"devices": "4,5", "tensor_parallel": 2}, places("0", "1"), [(0, "45", (), (0, 1))]),
        ({}, places(None, None), [(0, "", (), (0, 1))]),
        ({"replicas": 2}, places(None, None), [(0, "", (), (0,)), (0, "", (), (1,))]),
    ],
)
def test_servers_of_a_run(settings: dict[str, Any], processes: list[Place], expected: list[Any]) -> None:
    """Owner, GPUs, processes that share these, processes that draw."""
    found = replicas_of(VllmSettings(**settings), processes)
    assert found == [Replica(owner, tuple(gpus), shares, users) for owner, gpus, shares, users in expected]
    assert {rank for replica in found for rank in replica.users} == set(range(len(processes)))


@pytest.mark.parametrize(
    ("settings", "processes", "said"),
    [
        ({"devices": "1,2"}, places("0", "1"), r"devices=1,2: GPU 1 is the trainer's"),
        ({"devices": "4", "tensor_parallel": 2}, places("0"), r"devices=4: too few for 1 replica"),
        ({"tensor_parallel": 2}, places("0"), r"replicas=1, tensor_parallel=2: 1 process"),
        ({"replicas": 2}, places("0", "1", "2"), r"replicas=2, tensor_parallel=1: 3 process"),
        ({"tensor_parallel": 2}, places("0", "0"), r"tensor_parallel=2: each process sees one GPU"),
        ({"tensor_parallel": 2}, places(None), r"tensor_parallel=2: only on GPUs"),
    ],
)
def test_servers_that_cannot_be(settings: dict[str, Any], processes: list[Place], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"rollout\.vllm\.{said}"):
        replicas_of(VllmSettings(**settings), processes)


def test_a_process_names_its_gpu_as_servers_will(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert own_place(torch.device("cuda", 2)).gpu == "2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,GPU-7f")
    assert own_place(torch.device("cuda", 1)).gpu == "GPU-7f"
    assert own_place(torch.device("cpu")).gpu is None


def test_memory_of_a_server_by_hand() -> None:
    """80 GB of which 70 are free; the trainer will hold 30: 40 are left."""
    share, gpu = memory_share, (70 * 10**9, 80 * 10**9)
    assert share(VllmSettings(), gpu, 30e9, True) == pytest.approx(0.9 * 40 / 80)
    assert share(VllmSettings(), gpu, 30e9, False) == pytest.approx(0.5 * 40 / 80)
    assert share(VllmSettings(), None, 30e9, False) == 0.9
    assert share(VllmSettings(memory=0.7), gpu, 30e9, True) == 0.7
    with pytest.raises(ConfigError, match=r"of 70 GB free on the GPU the trainer will hold about 69 GB: .*memory"):
        share(VllmSettings(), gpu, 69e9, True)


SHARED = [Replica(0, ("0",), (0,), (0,))]
APART = [Replica(0, ("4",), (), (0,))]
ON_CPU = [Replica(0, (), (), (0,))]


def test_how_deep_servers_sleep() -> None:
    auto = VllmSettings()
    assert [level_of(auto, SHARED, by_adapter) for by_adapter in (True, False)] == [1, 2]
    assert level_of(auto, APART, False) == level_of(auto, ON_CPU, False) == 0
    assert level_of(VllmSettings(asynchronous=True), SHARED, False) == 0
    assert level_of(VllmSettings(sleep=1), SHARED, False) == 1
    with pytest.raises(ConfigError, match=r"sleep=2: drops the base"):
        level_of(VllmSettings(sleep=2), SHARED, True)
    with pytest.raises(ConfigError, match=r"sleep=1: vLLM sleeps on GPUs only"):
        level_of(VllmSettings(sleep=1), ON_CPU, True)


def test_how_weights_get_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_api, "nccl_version", lambda: (2, 29, 7))
    monkeypatch.setattr(transfer, "nccl_of", lambda settings: "(2, 29, 7)")

    def chosen(replicas: list[Replica], by_adapter: bool = False, **settings: Any) -> str:
        return transfer.choose(VllmSettings(**settings), replicas, by_adapter)[0]

    url = {"url": "http://there:8000"}
    assert (chosen(SHARED), chosen(APART), chosen(ON_CPU), chosen(ON_CPU, **url)) == ("ipc", "nccl", "disk", "disk")
    assert chosen(ON_CPU, **url, transfer="nccl") == "nccl"
    assert (
        chosen(SHARED, by_adapter=True) == chosen(SHARED, transfer="disk") == chosen(APART, transfer="disk") == "disk"
    )
    assert chosen(SHARED, port=8000) == "disk"
    for replicas, by_adapter, asked, said in [
        (ON_CPU, False, "ipc", "there is no GPU"),
        (SHARED, True, "ipc", "LoRA adapter"),
        (SHARED, False, "nccl", "servers share the trainer's GPUs: leave it out, weights then go by ipc"),
        (APART, False, "ipc", "servers have GPUs of their own"),
    ]:
        with pytest.raises(ConfigError, match=rf"transfer={asked}: .*{said}"):
            chosen(replicas, by_adapter, transfer=asked)
    monkeypatch.setattr(transfer, "nccl_of", lambda settings: "(2, 30, 1)")
    assert chosen(APART) == "disk"
    with pytest.raises(ConfigError, match=r"transfer=nccl: NCCL \(2, 29, 7\) here and \(2, 30, 1\) with vLLM"):
        chosen(APART, transfer="nccl")
    monkeypatch.undo()
    if not torch.cuda.is_available():
        assert transfer.choose(VllmSettings(devices="4"), APART, False) == ("disk", "this PyTorch has no NCCL")


# ---------------------------------------------------------------------- what they are asked, and when


@pytest.fixture
def fakes() -> Iterator[list[FakeVllm]]:
    made = [FakeVllm(always(ids("a|b|c"), [-0.5, -1.0, -0.25])) for _ in range(2)]
    for fake in made:
        fake.__enter__()
    yield made
    for fake in made:
        fake.__exit__()


@pytest.fixture
def started(fakes: list[FakeVllm], monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """Arguments and variables of the servers that a run has started, which are the stand-ins. It has 80 GB free."""
    found: list[tuple[list[str], dict[str, str]]] = []

    def start(settings: Any, arguments: list[str], log: Path, environment: dict[str, str]) -> Server:
        found.append((arguments, environment))
        return Server(fakes[len(found) - 1].url, 30)

    monkeypatch.setattr(run_module, "start", start)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * 10**9, 80 * 10**9))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return found


@pytest.fixture
def base(tmp_path: Path) -> Path:
    letters.save(tmp_path / "base")
    return tmp_path / "base"


def context_of(base: Path, **more: Any) -> RolloutContext:
    more = {"device": "cuda:0", "dtype": torch.bfloat16, "held": 16e9, "show_progress": False, **more}
    return RolloutContext(ModelSettings(path=str(base)), base.parent / "run", **more)


def paths(fake: FakeVllm) -> list[str]:
    """What it was asked, without the question that only looks whether it is one to work with."""
    return [path for path, body in fake.asked if body.get("logit_bias") != {"0": 100.0}]


def drawn(run: VllmRun, policy: PackedModel) -> None:
    sampler = VllmSampler(policy, RolloutSettings(max_new_tokens=8), run, progress=False)
    sampler.sample(prompts(5), 1, 0)
    sampler.rest()
    with pytest.raises(AlignlabError, match="the servers sleep"):
        sampler.sample(prompts(5), 1, 0)


UPDATE = ["/start_weight_update", "/update_weights", "/finish_weight_update"]


def test_whole_weights_by_the_memory_of_the_gpu(
    started: list[Any], fakes: list[FakeVllm], base: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The server sleeps from its start on, wakes up for weights, gets all of them in bfloat16 though the trainer's are
    float32, and sleeps again once nothing more is drawn."""
    monkeypatch.setattr(transfer, "export", lambda packed: {"uuid": (packed.numpy().tobytes(),)})
    policy = load_model(ModelSettings(path=str(base), dtype="float32"))
    got: dict[str, torch.Tensor] = {}

    def read(path: str, body: dict[str, Any]) -> None:
        if path != "/update_weights":
            return
        told = body["update_info"]
        (packed,) = pickle.loads(base64.b64decode(told["ipc_handles_pickled"]))["uuid"]
        sizes = zip(told["names"], told["dtype_names"], told["shapes"], told["tensor_sizes"], strict=True)
        for name, dtype, shape, size in sizes:
            part, packed = packed[:size], packed[size:]
            got[name] = torch.frombuffer(bytearray(part), dtype=getattr(torch, dtype)).view(shape)
        assert not packed

    fakes[0].seen = read
    with VllmRun(VllmSettings(), context_of(base)) as run:
        assert paths(fakes[0]) == ["/sleep?level=2"]
        for _ in range(2):
            run.push(policy)
            drawn(run, policy)
    init = ["/init_weight_transfer_engine"]
    awake, draw = ["/wake_up?tags=kv_cache"], ["/v1/completions", "/sleep?level=2"]
    first = ["/wake_up?tags=weights", *init, *UPDATE, *awake, *draw]
    assert paths(fakes[0])[1:] == first + [path for path in first if path not in init]
    assert fakes[0].of("/init_weight_transfer_engine") == [{"init_info": {"packed": True}}]
    trained = dict(policy.network.named_parameters())
    assert got.keys() == trained.keys()
    assert all(got[n].dtype == torch.bfloat16 and torch.equal(got[n], p.bfloat16()) for n, p in trained.items())
    ((arguments, environment),) = started
    options = dict(pairwise(arguments))
    assert options["--dtype"] == "bfloat16" and options["--model"] == str(base)
    assert options["--gpu-memory-utilization"] == "0.72"  # 0.9 of the 64 GB that the trainer leaves
    assert options["--tensor-parallel-size"] == "1" and "--enable-sleep-mode" in arguments
    assert json.loads(options["--weight-transfer-config"]) == {"backend": "ipc"}
    assert environment["CUDA_VISIBLE_DEVICES"] == "0"
    assert environment["VLLM_SERVER_DEV_MODE"] == environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "1"
    assert (
        "the trainer's GPUs (0), bfloat16, asleep at level 2 while training, weights by ipc" in capsys.readouterr().err
    )


def test_parts_are_sent_one_after_the_other(
    started: list[Any], fakes: list[FakeVllm], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A portion holds what fits; one tensor that is larger goes alone."""
    some = [(str(n), torch.zeros(n, dtype=torch.float32)) for n in (2, 3, 9, 1, 1)]
    assert [[name for name, _ in part] for part in transfer.parts(some, 20)] == [["2", "3"], ["9"], ["1", "1"]]
    monkeypatch.setattr(transfer, "export", lambda packed: {"uuid": (len(packed),)})
    monkeypatch.setattr(transfer, "PART", 1)
    policy = load_model(ModelSettings(path=str(base)))
    with VllmRun(VllmSettings(), context_of(base)) as run:
        run.push(policy)
    sent = [body["update_info"] for body in fakes[0].of("/update_weights")]
    assert [told["names"] for told in sent] == [[name] for name, _ in policy.network.named_parameters()]
    assert paths(fakes[0]).count("/start_weight_update") == paths(fakes[0]).count("/finish_weight_update") == 1


def test_a_server_on_two_gpus_gets_a_handle_of_each(
    fakes: list[FakeVllm], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes, here threads: the first asks the server, once both have a part where it can be read, and neither
    goes on before the server has it."""
    order: list[str] = []
    monkeypatch.setattr(transfer, "PART", 1)
    monkeypatch.setattr(transfer, "export", lambda packed: {f"gpu of {current_thread().name}": order.append("there")})
    fakes[0].seen = lambda path, body: order.append("read") if path == "/update_weights" else None
    meeting, values = Barrier(2, timeout=30), dict[str, Any]()

    def gather(value: Any) -> list[Any]:
        values[current_thread().name] = value
        meeting.wait()
        found = [values["0"], values["1"]]
        meeting.wait()
        return found

    def process(rank: int) -> None:
        owned = [(Replica(0, ("0", "1"), (0, 1), (0, 1)), Server(fakes[0].url, 30))] if not rank else []
        transfer.Ipc(owned, gather).send(load_model(ModelSettings(path=str(base))), torch.bfloat16)

    threads = [Thread(target=process, args=(rank,), name=str(rank)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sent = [body["update_info"]["ipc_handles_pickled"] for body in fakes[0].of("/update_weights")]
    assert [pickle.loads(base64.b64decode(s)) for s in sent] == [{"gpu of 0": None, "gpu of 1": None}] * len(sent)
    assert order == ["there", "there", "read"] * len(sent) and len(sent) > 10


def test_an_adapter_by_a_file_over_a_base_that_is_kept(
    started: list[Any], fakes: list[FakeVllm], base: Path, capsys: Any
) -> None:
    policy = load_model(ModelSettings(path=str(base)), LoRA(r=4))
    with VllmRun(VllmSettings(), context_of(base, adapter=LoRA(r=4))) as run:
        run.push(policy)
        drawn(run, policy)
    assert paths(fakes[0]) == [
        *("/sleep?level=1", "/wake_up?tags=weights", "/v1/load_lora_adapter", "/wake_up?tags=kv_cache"),
        *("/v1/completions", "/sleep?level=1"),
    ]
    arguments, environment = started[0]
    assert arguments[arguments.index("--max-lora-rank") + 1] == "8" and "--weight-transfer-config" not in arguments
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in environment
    assert "weights by disk (a LoRA adapter is small" in capsys.readouterr().err


class Nccl:
    """What NCCL would have done: which tensors went out after which request."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fakes: list[FakeVllm]) -> None:
        self.world, self.sent = 0, dict[str, torch.Tensor]()
        monkeypatch.setattr(transfer, "nccl_of", lambda settings: "(2, 29)")
        monkeypatch.setattr(private_api, "nccl_version", lambda: (2, 29))
        monkeypatch.setattr(private_api, "nccl_key", lambda: b"k" * 128)
        monkeypatch.setattr(private_api, "nccl_group", self.group)
        monkeypatch.setattr(private_api, "nccl_broadcast", self.broadcast)
        self.fakes = fakes
        reply = FakeVllm.reply

        def with_size(fake: FakeVllm, path: str, body: Any) -> Any:
            return (200, {"world_size": 2}) if path == "/get_world_size" else reply(fake, path, body)

        monkeypatch.setattr(FakeVllm, "reply", with_size)

    def group(self, world: int, key: bytes) -> str:
        self.world = world
        return "group"

    def broadcast(self, tensors: list[torch.Tensor], group: str) -> Any:
        (told, again) = [fake.of("/update_weights")[-1]["update_info"] for fake in self.fakes]
        assert told == again and group == "group"
        assert told["shapes"] == [list(t.shape) for t in tensors]
        assert told["dtype_names"] == [str(t.dtype).removeprefix("torch.") for t in tensors]
        self.sent |= dict(zip(told["names"], tensors, strict=True))
        return SimpleNamespace(query=lambda: True)


def test_whole_weights_to_gpus_of_their_own(
    started: list[Any], fakes: list[FakeVllm], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two servers of two GPUs each: one communicator of five. They do not sleep: nobody else wants their memory."""
    nccl = Nccl(monkeypatch, fakes)
    policy = load_model(ModelSettings(path=str(base)))
    with VllmRun(VllmSettings(devices="4,5,6,7", tensor_parallel=2), context_of(base)) as run:
        for _ in range(2):
            run.push(policy)
        VllmSampler(policy, RolloutSettings(max_new_tokens=8), run, progress=False).sample(prompts(3, 4, 5, 6), 1, 0)
    assert nccl.world == 5
    for fake, offset in zip(fakes, (1, 3), strict=True):
        assert paths(fake) == ["/init_weight_transfer_engine", *UPDATE, *UPDATE, *["/v1/completions"] * 2]
        (init,) = fake.of("/init_weight_transfer_engine")
        key = base64.b64encode(b"k" * 128).decode()
        wanted = {"nccl_unique_id_b64": key, "rank_offset": offset, "world_size": 5, "packed": False}
        assert init == {"init_info": wanted}
    trained = dict(policy.network.named_parameters())
    assert nccl.sent.keys() == trained.keys()
    assert all(torch.equal(nccl.sent[n], p.bfloat16()) for n, p in trained.items())
    assert [e["CUDA_VISIBLE_DEVICES"] for _, e in started] == ["4,5", "6,7"]
    assert [a[a.index("--gpu-memory-utilization") + 1] for a, _ in started] == ["0.9", "0.9"]
    assert [a[a.index("--tensor-parallel-size") + 1] for a, _ in started] == ["2", "2"]
    assert not any("--enable-sleep-mode" in a for a, _ in started)


def test_a_server_that_refuses_weights_is_not_waited_for(
    started: list[Any], fakes: list[FakeVllm], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL would wait for it for ever."""
    nccl = Nccl(monkeypatch, fakes[:1] * 2)
    policy = load_model(ModelSettings(path=str(base)))
    fakes[0].refuse["/init_weight_transfer_engine"] = (500, "no weight_transfer_config")
    with VllmRun(VllmSettings(devices="4"), context_of(base)) as run:
        with pytest.raises(ServerLost, match="no weight_transfer_config"):
            run.push(policy)
        assert nccl.world == 0, "the other end was not opened"
        fakes[0].refuse = {"/update_weights": (400, "Invalid update_info")}
        with pytest.raises(ConfigError, match=r"rollout\.vllm: the server does not take .*Invalid update_info"):
            run.push(policy)
        assert not nccl.sent
        fakes[0].refuse.clear()
        monkeypatch.setattr(private_api, "nccl_broadcast", lambda *_: SimpleNamespace(query=lambda: False))

        def dies(path: str, body: dict[str, Any]) -> None:
            fakes[0].broken = path == "/update_weights"
            if fakes[0].broken:
                raise ConnectionError

        fakes[0].seen = dies
        with pytest.raises(ServerLost, match="is lost"):
            run.push(policy)


def test_all_weights_are_gathered_even_where_a_server_takes_none(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other processes wait in each gathering: one that stopped would leave them there."""
    monkeypatch.setattr(transfer, "PART", 1)
    policy = load_model(ModelSettings(path=str(base)))
    asked: list[torch.Tensor] = []
    policy.gathered = lambda tensor: asked.append(tensor) or tensor  # type: ignore[func-returns-value]

    class Refuses(transfer.Transfer):
        def _connect(self) -> None:
            raise Refused(400, "no")

    with pytest.raises(Refused):
        Refuses([], lambda value: [value]).send(policy, torch.float32)
    assert len(asked) == len(list(policy.network.parameters()))


def test_names_that_differ_in_memory_go_by_files(
    started: list[Any], fakes: list[FakeVllm], base: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    policy = load_model(ModelSettings(path=str(base)))
    policy.base._weight_conversions = ["experts are one tensor"]
    monkeypatch.setattr(weights, "write", lambda *_: None)
    with VllmRun(VllmSettings(), context_of(base)) as run:
        run.push(policy)
    assert "/collective_rpc" in paths(fakes[0]) and "/update_weights" not in paths(fakes[0])
    assert "weights by disk (the model's weights have other names in memory)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": "http://a:1", "replicas": 2}, "replicas is about servers that the run starts"),
        ({"url": "http://a:1", "tensor_parallel": 2}, "tensor_parallel is about"),
        ({"url": "http://a:1", "sleep": 1}, "sleep is about"),
        ({"url": "http://a:1", "transfer": "ipc"}, "leave url out"),
        ({"asynchronous": True, "sleep": 2}, "sleep=2: with asynchronous"),
        ({"devices": "1", "transfer": "ipc"}, "leave out devices"),
        ({"port": 8000, "transfer": "ipc"}, "leave port out"),
        ({"port": 8000, "replicas": 2}, "2 replicas cannot share it"),
        ({"devices": "1,2", "replicas": 2, "tensor_parallel": 2}, "need 4 GPUs"),
        ({"devices": "1, 2"}, "devices"),
        ({"sleep": 3}, "sleep"),
    ],
)
def test_settings_at_odds(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        VllmSettings(**settings)
