"""The vLLM engine against a stand-in for the server: what is asked, what is made of the answer, what is refused."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignlab.core import (
    AlignlabError,
    ConfigError,
    ExactSampler,
    Group,
    NonFiniteError,
    PrefetchingSampler,
    RolloutContext,
    RolloutEngine,
    Sampler,
)
from alignlab.core.children import free_port
from alignlab.models import FullFineTuning, LoRA, ModelSettings, PackedModel, QuantizationSettings, load_model
from alignlab.rollout import LocalRollout, MultiTurn, RolloutSettings, StepSearch, VllmSettings
from alignlab.rollout.policy import Policy
from alignlab.rollout.sampling import stream_key
from alignlab.rollout.vllm.client import Client, ServerLost
from alignlab.rollout.vllm.engine import VllmRollout, VllmSampler
from alignlab.rollout.vllm.run import VllmRun
from alignlab.rollout.vllm.server import check_version, interpreter, start
from alignlab.scoring import FunctionScorer
from tests import tiny as letters
from tests.rollout.fake_vllm import FakeVllm, always
from tests.rollout.tiny import END, EOS, ids, model, prompts

REPOSITORY = Path(__file__).parents[2]
FAKE = Path(__file__).with_name("fake_vllm.py")


@pytest.fixture(scope="module")
def policy() -> PackedModel:
    return model("llama")


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    with FakeVllm(always(ids("a|b|c"), [-0.5, -1.0, -0.25])) as server:
        yield server


def context_of(policy: PackedModel, folder: Path, **more: Any) -> RolloutContext:
    """That of a run which trains this policy."""
    base = folder / "base of the run"
    if not base.exists():
        policy.base.config.save_pretrained(base)
        policy.tokenizer.save_pretrained(base)
    peft = getattr(policy.network, "peft_config", None)
    more = {"adapter": LoRA(r=peft["default"].r) if peft else None, "dtype": torch.float32, **more}
    return RolloutContext(ModelSettings(path=str(base)), folder, show_progress=False, **more)


def run_of(fake: FakeVllm, policy: PackedModel, folder: Path, **settings: Any) -> VllmRun:
    server = VllmSettings(**{"url": fake.url, **settings})
    return VllmRun(server, context_of(policy, folder))


def engine_of(fake: FakeVllm, policy: PackedModel, folder: Path, **settings: Any) -> VllmSampler:
    run = run_of(fake, policy, folder)
    run.ready()
    rollout = RolloutSettings(**{"max_new_tokens": 8, **settings})
    return VllmSampler(policy, rollout, run, progress=False)


# ---------------------------------------------------------------------- what is asked


def test_every_setting_is_in_the_request(fake: FakeVllm, policy: PackedModel, tmp_path: Path) -> None:
    settings = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "max_new_tokens": 9, "min_new_tokens": 2}
    more: dict[str, Any] = {"stop": ["ca", "<end>"], "stop_tokens": ["d"], "suppress_tokens": ["e", 0]}
    engine = engine_of(fake, policy, tmp_path, **settings, **more)
    group = prompts(4)[0]
    engine.sample([group], 3, 11)
    (asked,) = fake.completions
    key = stream_key(11, group.origin, group.prompt_ids)
    assert asked.pop("cache_salt")
    assert asked == {
        "model": "base",
        "prompt": group.prompt_ids,
        "n": 3,
        "seed": int.from_bytes(key[:7], "little"),
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": ["ca"],  # <end> is a special token: it has no text
        "stop_token_ids": sorted([EOS, END, *ids("d")]),
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
        "add_special_tokens": False,
        "logit_bias": {"0": -100.0, str(ids("e")[0]): -100.0},
    }


def test_seeds_follow_from_the_prompt_and_the_sample_alone(fake: FakeVllm, policy: PackedModel, tmp_path: Path) -> None:
    engine = engine_of(fake, policy, tmp_path)
    one, two = prompts(4, 6)
    engine.sample([one, two], 3, 0)
    engine.sample([two, one], 3, 0)
    engine.sample([one], 3, 1)
    seeds = {}
    for asked in fake.completions[:4]:
        seeds.setdefault(len(asked["prompt"]), set()).add(asked["seed"])
    assert all(len(s) == 1 for s in seeds.values()) and seeds[4] != seeds[6]
    assert fake.completions[4]["seed"] not in seeds[4]
    fake.asked.clear()
    engine.sample([one, two, one], 2, 0)  # a prompt that occurs again goes on where its samples end
    again = sorted(a["seed"] for a in fake.completions if len(a["prompt"]) == 4)
    assert again == [min(seeds[4]), min(seeds[4]) + 2]


def test_a_response_ends_where_the_positions_end(fake: FakeVllm, policy: PackedModel, tmp_path: Path) -> None:
    engine = engine_of(fake, policy, tmp_path, max_new_tokens=40, min_new_tokens=30)
    engine.sample(prompts(60, 3), 1, 0)  # of 64 positions
    limits = {len(a["prompt"]): (a["max_tokens"], a["min_tokens"]) for a in fake.completions}
    assert limits == {60: (4, 4), 3: (40, 30)}


# ---------------------------------------------------------------------- what is made of it


def test_what_comes_back(fake: FakeVllm, policy: PackedModel, tmp_path: Path) -> None:
    answers = [
        (ids("a|b|<eos>"), [-0.5, -1.0, -0.25], "stop"),
        (ids("a|b|d|a"), [-0.1, -0.2, -0.3, -0.4], "length"),
        (ids("b|ca"), [-2.0, -3.0], "stop"),
    ]
    fake.answer = lambda request: answers
    engine = engine_of(fake, policy, tmp_path, stop=["c"], max_new_tokens=4)
    assert isinstance(engine, Sampler) and isinstance(engine, PrefetchingSampler)
    given = prompts(5)
    (group,) = engine.sample(given, 3, 0)
    assert (group.prompt_ids, group.origin) == (given[0].prompt_ids, given[0].origin)
    assert [r.token_ids for r in group.responses] == [t for t, _, _ in answers]
    assert [[*r.columns] for r in group.responses] == [["behaviour_logp"]] * len(answers)
    assert [list(r.columns["behaviour_logp"]) for r in group.responses] == [p for _, p, _ in answers]
    assert [r.text for r in group.responses] == ["ab", "abda", "b"]
    assert [r.finished for r in group.responses] == [True, False, True]
    assert {r.source for r in group.responses} == {"policy"}
    assert engine.generated_tokens == 9


def test_greedy_is_asked_for_once(fake: FakeVllm, policy: PackedModel, tmp_path: Path) -> None:
    engine = engine_of(fake, policy, tmp_path, temperature=0.0)
    (group,) = engine.sample(prompts(5), 3, 0)
    assert [a["n"] for a in fake.completions] == [1]
    assert [r.token_ids for r in group.responses] == [ids("a|b|c")] * 3
    assert all(list(r.columns) == ["behaviour_logp"] for r in group.responses)
    assert all(list(r.columns["behaviour_logp"]) == [0.0] * 3 for r in group.responses)


def test_log_probs_that_are_no_numbers_stop_it(fake: FakeVllm, policy: PackedModel, tmp_path: Path) -> None:
    fake.answer = always(ids("a|b"), [-0.5, -9999.0])  # what vLLM says for minus infinity and for NaN
    with pytest.raises(NonFiniteError, match=r"prompts.jsonl:1"):
        engine_of(fake, policy, tmp_path).sample(prompts(5), 1, 0)


def test_no_groups_ask_nothing(fake: FakeVllm, policy: PackedModel, tmp_path: Path) -> None:
    assert engine_of(fake, policy, tmp_path).sample([], 3, 0) == []
    assert fake.completions == []


# ---------------------------------------------------------------------- weights


def change(network: Any) -> None:
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))


def test_adapters_are_loaded_under_one_name(fake: FakeVllm, tmp_path: Path) -> None:
    letters.save(tmp_path / "base")
    policy = load_model(ModelSettings(path=str(tmp_path / "base")), LoRA(r=4))
    run = run_of(fake, policy, tmp_path / "run")
    held: list[dict[str, torch.Tensor]] = []

    def read(path: str, body: dict[str, Any]) -> None:
        if path == "/v1/load_lora_adapter":
            held.append(load_file(Path(body["lora_path"]) / "adapter_model.safetensors"))

    fake.seen = read
    with run:
        engine = VllmSampler(policy, RolloutSettings(max_new_tokens=8), run, progress=False)
        for _ in range(2):
            change(policy.network)
            run.push(policy)
            engine.sample(prompts(5), 1, 0)
            trained = {n.replace(".default.", "."): p for n, p in policy.network.named_parameters() if "lora_" in n}
            assert held[-1].keys() == trained.keys()
            assert all(torch.equal(held[-1][n], p) for n, p in trained.items())
    first, second = fake.of("/v1/load_lora_adapter")
    assert first == second and first["load_inplace"] is True
    one, two = fake.completions
    assert one["model"] == two["model"] == first["lora_name"]
    assert one["cache_salt"] != two["cache_salt"], (
        "or the server would go on from what earlier weights made of a prompt"
    )
    assert fake.of("/v1/unload_lora_adapter") == [{"lora_name": first["lora_name"]}]
    assert not Path(first["lora_path"]).exists()


def test_whole_weights_are_read_again(fake: FakeVllm, tmp_path: Path) -> None:
    letters.save(tmp_path / "base")
    policy = load_model(ModelSettings(path=str(tmp_path / "base")))
    shared = tmp_path / "shared"
    held: list[dict[str, torch.Tensor]] = []

    def read(path: str, body: dict[str, Any]) -> None:
        if path == "/collective_rpc":
            held.append(load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors"))

    fake.seen = read
    with run_of(fake, policy, tmp_path / "run", shared_dir=str(shared)) as run:
        change(policy.network)
        run.push(policy)
        assert run.model_name == "base"
    (asked,) = fake.of("/collective_rpc")
    assert asked["method"] == "reload_weights" and Path(asked["kwargs"]["weights_path"]).parent == shared
    state = policy.network.state_dict()
    assert held[0].keys() <= state.keys() and all(torch.equal(t, state[n]) for n, t in held[0].items())


@pytest.mark.parametrize(
    ("adapter", "path", "answer", "said"),
    [
        ("lora", "/v1/load_lora_adapter", (404, "Loading lora x failed: No adapter found for <path>"), "shared_dir"),
        ("lora", "/v1/load_lora_adapter", (404, "Not Found"), "--enable-lora"),
        ("lora", "/v1/load_lora_adapter", (400, "LoRA rank 64 is greater than max_lora_rank 16"), "rank 64"),
        ("none", "/collective_rpc", (404, "Not Found"), "VLLM_SERVER_DEV_MODE=1"),
    ],
)
def test_a_server_that_cannot_take_weights(
    fake: FakeVllm, tmp_path: Path, adapter: Any, path: str, answer: tuple[int, str], said: str
) -> None:
    letters.save(tmp_path / "base")
    policy = load_model(ModelSettings(path=str(tmp_path / "base")), LoRA() if adapter == "lora" else FullFineTuning())
    fake.refuse[path] = answer
    with run_of(fake, policy, tmp_path / "run") as run, pytest.raises(ConfigError, match=said):
        run.push(policy)


def test_new_weights_wait_for_what_is_being_drawn(fake: FakeVllm, policy: PackedModel, tmp_path: Path) -> None:
    """Samples that are drawn ahead come from one policy, though another is to be measured meanwhile."""
    said: list[str] = []

    def slow(request: dict[str, Any]) -> list[Any]:
        time.sleep(0.3)
        said.append("answered")
        return always([5], [-1.0])(request)

    fake.answer = slow
    run = run_of(fake, policy, tmp_path)
    with run:
        run.push(policy)
        fake.seen = lambda path, body: said.append("weights") if path == "/collective_rpc" else None
        take = VllmSampler(policy, RolloutSettings(max_new_tokens=8), run).prefetch(prompts(3, 4), 1, 0)
        salt = run.salt
        run.push(policy)
        assert len(take()) == 2
    assert said == ["answered", "answered", "weights"]
    assert {request["cache_salt"] for request in fake.completions} == {salt} != {run.salt}


# ---------------------------------------------------------------------- an engine of a run


def test_an_engine_makes_samplers_of_the_policy_as_it_is(fake: FakeVllm, policy: PackedModel, tmp_path: Path) -> None:
    """Between start and end of the block from the server, each with new weights; else in this process, and says so."""
    engine = VllmRollout(max_new_tokens=3, vllm=VllmSettings(url=fake.url, asynchronous=True, importance_cap=2.0))
    assert isinstance(engine, RolloutEngine)
    assert (engine.importance_cap, engine.off_policy, engine.prefetches) == (2.0, True, True)
    with engine.start(context_of(policy, tmp_path)):
        for _ in range(2):
            sampler = engine.sampler(policy)
            assert [r.token_ids for r in sampler.sample(prompts(3), 1, 0)[0].responses] == [ids("a|b|c")]
            assert not isinstance(sampler, ExactSampler)
    assert len(fake.of("/collective_rpc")) == 2
    assert len({request["cache_salt"] for request in fake.completions}) == 2


def test_without_a_server_responses_are_drawn_here(policy: PackedModel, caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = (
        kind(max_new_tokens=3).sampler(policy).sample(prompts(3), 2, 0) for kind in (VllmRollout, LocalRollout)
    )
    assert ours == theirs
    assert "no server was started, responses are drawn in this process" in caplog.text


class Turns(MultiTurn):
    """Ends after a number of turns."""

    def start(self, group: Group) -> list[str]:
        return []

    def reply(self, state: list[str], text: str) -> tuple[str | None, float]:
        state.append(text)
        return (None if len(state) == 3 else ""), 1.0


def test_processes_agree_once_however_many_turns_one_of_them_takes(
    fake: FakeVllm, policy: PackedModel, tmp_path: Path
) -> None:
    """Plain sampling is an exchange of all processes each time; within an environment turns are a process's own."""
    engine = engine_of(fake, policy, tmp_path)
    exchanged: list[Any] = []
    gather = engine.run.gather
    engine.run.gather = lambda value: exchanged.append(value) or gather(value)  # type: ignore[func-returns-value]
    engine.sample(prompts(3), 2, 0)
    assert len(exchanged) == 1
    environment = Turns()
    environment.bind(Policy(policy), policy.tokenizer)
    (group,) = environment.rollout(engine, prompts(3), 2, 0)
    assert len(exchanged) == 2
    assert [r.token_ids for r in group.responses] == [ids("a|b|c") * 3] * 2
    fake.broken = True
    with pytest.raises(ServerLost, match="is lost"):
        environment.rollout(engine, prompts(3), 2, 0)
    assert len(exchanged) == 3
    fake.broken = False
    engine.sample(prompts(3), 2, 0)
    assert len(exchanged) == 4, "and afterwards as before"


def test_what_a_server_cannot_do_with_an_environment() -> None:
    search = StepSearch(FunctionScorer(lambda prompt, response, extra: 0.0))
    with pytest.raises(ConfigError, match=r"environment: responses are drawn step by step"):
        VllmRollout().check({"environment": search}, None)
    VllmRollout().check({"environment": Turns()}, None)
    with pytest.raises(ConfigError, match=r"rollout\.vllm\.asynchronous: responses of an environment"):
        VllmRollout(vllm=VllmSettings(asynchronous=True)).check({"environment": Turns()}, None)
    with pytest.raises(ConfigError, match=r"quantization=nf4: a vLLM server samples from the base as it is"):
        VllmRollout().check({"quantization": QuantizationSettings(kind="nf4")}, None)


# ---------------------------------------------------------------------- refused, broken, gone


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0", "0.9.1", "None"])
def test_versions_not_tested_are_refused(fake: FakeVllm, policy: PackedModel, tmp_path: Path, version: str) -> None:
    fake.version = version
    with pytest.raises(ConfigError, match=rf"vLLM {version}; tested are 0\.32 to below 0\.33: `make vllm`"):
        run_of(fake, policy, tmp_path).ready()


def test_versions_tested() -> None:
    check_version("0.32.0", "here")
    check_version("0.32.3.post1+cpu", "here")


def test_log_probs_of_another_distribution_are_refused(fake: FakeVllm, policy: PackedModel, tmp_path: Path) -> None:
    fake.raw = True
    with pytest.raises(ConfigError, match="--logprobs-mode processed_logprobs"):
        run_of(fake, policy, tmp_path).ready()


def test_settings_that_it_does_otherwise_are_refused() -> None:
    VllmRollout(min_p=0.1).check({}, None)
    VllmRollout(top_p=0.9, temperature=5).check({}, None)
    with pytest.raises(ConfigError, match=r"rollout\.min_p=0\.1"):
        VllmRollout(min_p=0.1, top_p=0.9).check({}, None)
    with pytest.raises(ConfigError, match=r"rollout\.temperature=3"):
        VllmRollout(temperature=3, suppress_tokens=[1]).check({}, None)


def test_a_search_is_refused(fake: FakeVllm, policy: PackedModel, tmp_path: Path) -> None:
    engine = engine_of(fake, policy, tmp_path)
    with pytest.raises(ConfigError, match="rollout=local"):
        StepSearch(FunctionScorer(lambda prompt, response, extra: 0.0)).rollout(engine, prompts(3), 1, 0)


def test_no_server_there(policy: PackedModel, tmp_path: Path) -> None:
    settings = VllmSettings(url=f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ServerLost, match=r"did not start: http://127\.0\.0\.1:\d+ does not answer"):
        VllmRun(settings, context_of(policy, tmp_path)).ready()


def test_a_server_that_is_lost_while_it_samples(fake: FakeVllm, policy: PackedModel, tmp_path: Path) -> None:
    engine = engine_of(fake, policy, tmp_path)

    def lost(request: dict[str, Any]) -> list[Any]:
        fake.broken = True
        raise ConnectionError  # the handler ends without an answer

    fake.answer = lost
    with pytest.raises(ServerLost, match=r"rollout\.vllm: the server is lost: http"):
        engine.sample(prompts(3, 4, 5), 2, 0)
    take = engine.prefetch(prompts(3), 2, 0)
    with pytest.raises(ServerLost, match="is lost"):
        take()


def test_a_server_that_says_it_is_broken(fake: FakeVllm, policy: PackedModel, tmp_path: Path) -> None:
    engine = engine_of(fake, policy, tmp_path)
    fake.refuse["/v1/completions"] = (500, "EngineCore encountered an issue")
    with pytest.raises(ServerLost, match="fails with 500: EngineCore encountered an issue"):
        engine.sample(prompts(3), 2, 0)
    fake.refuse["/v1/completions"] = (400, "prompt too long")
    with pytest.raises(AlignlabError, match="prompt too long") as found:
        engine.sample(prompts(3), 2, 0)
    assert not isinstance(found.value, ServerLost)


def test_other_processes_fail_alike(fake: FakeVllm, policy: PackedModel, tmp_path: Path) -> None:
    """This one did well; the second of two says that its server is lost."""
    run = run_of(fake, policy, tmp_path)
    run.gather = lambda value: [value, (True, "rollout.vllm: the server is lost: it is gone")]
    with pytest.raises(ServerLost, match="it is gone"), run.agreed():
        pass


def test_closing_breaks_off_what_is_under_way(fake: FakeVllm) -> None:
    client = Client(fake.url, 30)

    def slow(request: dict[str, Any]) -> list[Any]:
        client.close()
        time.sleep(20)
        return []

    fake.answer = slow
    begun = time.monotonic()
    with pytest.raises(ServerLost):
        client.post("/v1/completions", {"n": 1})
    assert time.monotonic() - begun < 5
    with pytest.raises(ServerLost, match="not asked any more"):
        client.get("/health")


def test_an_answer_that_takes_too_long(fake: FakeVllm) -> None:
    fake.answer = lambda request: time.sleep(3) or []  # type: ignore[func-returns-value]
    with pytest.raises(ServerLost, match=r"has not answered for 0\.3 s"):
        Client(fake.url, 0.3).post("/v1/completions", {"n": 1})


# ---------------------------------------------------------------------- a server of ours


@pytest.fixture
def python(tmp_path: Path) -> str:
    """An interpreter that seems to have vLLM."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)


def test_a_server_of_ours_starts_and_ends_with_us(python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    settings = VllmSettings(python=python, arguments=["--max-model-len", "64"])
    server = start(settings, ["--model", "m"], tmp_path / "vllm" / "server.log", {})
    assert server.process is not None
    server.wait(30, show=False)
    place = Path(server.url.removeprefix("unix:")).parent
    assert stat.S_IMODE(place.stat().st_mode) == 0o700, "nobody else can ask it"
    log = (tmp_path / "vllm" / "server.log").read_text()
    assert "'--logprobs-mode', 'processed_logprobs'" in log and "'--max-model-len', '64'" in log
    server.close()
    assert server.process.returncode is not None and not place.exists()
    with pytest.raises(ServerLost):
        Client(server.url, 5).get("/health")


def test_a_server_that_does_not_start_says_why(python: str, tmp_path: Path) -> None:
    settings = VllmSettings(python=python, arguments=["--fail"])
    (tmp_path / "log").write_text("RuntimeError: of another sitting\n")
    server = start(settings, [], tmp_path / "log", {})
    with pytest.raises(ServerLost, match=r"ended with status 1; its log ends with: ValueError: No available memory"):
        server.wait(30, show=False)
    server.close()


def test_a_server_that_takes_too_long_to_start(tmp_path: Path) -> None:
    """One that never listens."""
    path = tmp_path / "python"
    path.write_text('#!/bin/sh\ncase "$2" in -c) echo 0.32.1;; *) echo loading; exec sleep 60;; esac\n')
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    (tmp_path / "log").write_text("RuntimeError: of another sitting\n")
    server = start(VllmSettings(python=str(path)), [], tmp_path / "log", {})
    with pytest.raises(ServerLost, match=r"within 2 s \(rollout.vllm.start_timeout\).*log ends with: loading"):
        server.wait(2, show=False)
    server.close()


def test_interpreters_without_vllm_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNLAB_VLLM_PYTHON", sys.executable)
    with pytest.raises(ConfigError, match=r"rollout\.vllm\.python: no vLLM in .*make vllm"):
        interpreter(VllmSettings())
    with pytest.raises(ConfigError, match=r"rollout\.vllm\.python=/nowhere/python: cannot be run"):
        interpreter(VllmSettings(python="/nowhere/python"))
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\necho 0.9.2\n")
    old.chmod(old.stat().st_mode | stat.S_IEXEC)
    with pytest.raises(ConfigError, match=r"is vLLM 0\.9\.2; tested are 0\.32"):
        interpreter(VllmSettings(python=str(old)))


# ---------------------------------------------------------------------- children


def children(tmp_path: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A process that guards a command which has a child that heeds no SIGTERM; it, and the child's number."""
    pid = tmp_path / "pid"
    command = f'trap "" TERM; sh -c \'trap "" TERM; echo $$ > {pid}; sleep 60\' & wait'
    starter = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-m', 'alignlab.core.children', 'sh', '-c', sys.argv[1]],"
        " stdin=subprocess.PIPE, start_new_session=True)\n"
        "time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    parent = subprocess.Popen([sys.executable, "-c", starter, command], env=environment, cwd=REPOSITORY)
    deadline = time.monotonic() + 30
    while not (pid.exists() and pid.read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return parent, int(pid.read_text())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_outlives_a_process_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, grandchild = children(tmp_path)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 25
    while _alive(grandchild):
        assert time.monotonic() < deadline, "a grandchild lives on"
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
