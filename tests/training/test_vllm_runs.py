"""Training on a vLLM server's samples, against a stand-in that samples from the weights it was given."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignlab.config import compose, resolve
from alignlab.core import ConfigError, Group, Response
from alignlab.rollout import VllmSettings
from alignlab.rollout.produce import produce
from alignlab.rollout.vllm.client import ServerLost
from alignlab.rollout.vllm.run import VllmRun
from alignlab.rollout.vllm.server import Server
from alignlab.training import run as training_run
from alignlab.training.distributed.engine import Engine
from alignlab.training.off_policy import compare
from alignlab.training.run_config import check
from alignlab.training.run_folder import fingerprint
from alignlab.training.trainer import Trainer
from tests import tiny
from tests.rollout.fake_vllm import Choice, FakeVllm
from tests.training import runs
from tests.training.many import together

LORA = ("adapter=lora", "adapter.r=4")
SERVED = (
    "rollout=vllm",
    "source.rollout_batch_size=4",
    "training.batch_size=2",
    "training.progress=off",
    "optimizer.lr=0.3",
)
"""Two steps to an iteration."""


class Model:
    """What the server would compute with: transformers' own forward on what is in the folders it was told of."""

    def __init__(self, base: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.base, self.load = base, AutoModelForCausalLM.from_pretrained
        self.network = self.load(base).eval()
        self.requests = 0
        self.last = math.inf

    def told(self, path: str, body: dict[str, Any]) -> None:
        if path == "/v1/load_lora_adapter":
            from peft import PeftModel

            self.network = PeftModel.from_pretrained(self.load(self.base), body["lora_path"]).eval()
        elif path == "/collective_rpc":
            self.network = self.load(body["kwargs"]["weights_path"]).eval()

    @torch.no_grad()
    def answer(self, request: dict[str, Any]) -> list[Choice]:
        self.requests += 1
        if self.requests > self.last:
            raise ConnectionError  # no answer
        return [self.sample(request, request["seed"] + i) for i in range(request["n"])]

    def sample(self, request: dict[str, Any], seed: int) -> Choice:
        generator = torch.Generator().manual_seed(seed)
        tokens: list[int] = []
        logp: list[float] = []
        while len(tokens) < request["max_tokens"]:
            probability = tiny.plain_logits(self.network, request["prompt"] + tokens)[-1].softmax(-1)
            tokens.append(int(torch.multinomial(probability, 1, generator=generator)))
            logp.append(float(probability[tokens[-1]].log()))
            if tokens[-1] in request["stop_token_ids"]:
                return tokens, logp, "stop"
        return tokens, logp, "length"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("vllm")
    runs.prepare(made)
    return made


@pytest.fixture
def serve(folder: Path) -> Iterator[Callable[..., tuple[str, Model]]]:
    """Start a server; the word that has a run use it, and its model."""
    servers: list[FakeVllm] = []

    def start() -> tuple[str, Model]:
        model = Model(folder / "base")
        servers.append(FakeVllm(model.answer).__enter__())
        servers[-1].seen = model.told
        return f"rollout.vllm.url={servers[-1].url}", model

    yield start
    for server in servers:
        server.__exit__()


def of(folder: Path, out: str, name: str) -> list[float]:
    return [line[name] for line in runs.metrics(folder, out)]


@pytest.mark.parametrize(
    ("algorithm", "more"),
    [("grpo", LORA), ("ppo", ()), ("rloo", LORA), ("reinforce_pp", ()), ("expert_iteration", LORA)],
)
def test_samples_are_those_of_the_policy_as_it_is(
    folder: Path, serve: Callable[..., tuple[str, Model]], algorithm: str, more: tuple[str, ...]
) -> None:
    """Its log-probs are the trainer's at every iteration, after updates too."""
    out = f"synchronous-{algorithm}"
    runs.train(folder, algorithm, out, *SERVED, "source.ppo_epochs=1", "training.steps=4", serve()[0], *more)
    assert of(folder, out, "rollout_staleness") == [0] * 4
    if algorithm == "expert_iteration":  # asks nothing of the policy before its updates: there is nothing to compare
        return
    assert max(of(folder, out, "rollout_logp_difference_max")) < 1e-4
    assert all(0 <= k < 1e-6 for k in of(folder, out, "rollout_kl"))


@pytest.mark.parametrize(
    ("adapter", "setting", "expected"),
    [
        ("none", "auto", torch.bfloat16),
        ("none", "no", torch.float32),
        ("none", "pure", torch.bfloat16),
        ("lora", "no", torch.bfloat16),
    ],
)
def test_a_server_computes_in_what_training_computes_in(
    folder: Path, serve: Callable[..., tuple[str, Model]], adapter: str, setting: str, expected: torch.dtype
) -> None:
    """Of a bfloat16 model: what is trained becomes float32, a frozen base does not."""
    more = ("model.dtype=bfloat16", f"adapter={adapter}", f"training.mixed_precision={setting}")
    run = check(runs.config_of(folder, runs.words_for(folder, "grpo", "computes", *SERVED, *more)))
    one = SimpleNamespace(device=torch.device("cpu"), world=1, rank=0, gather=lambda value: [value])
    context = training_run._context(folder / "computes", run, one)  # type: ignore[arg-type]
    assert VllmRun(VllmSettings(url=serve()[0].partition("=")[2]), context).dtype == expected


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "zero3"])
def test_each_of_two_processes_draws_its_share_from_weights_that_are_whole(
    folder: Path, serve: Callable[..., tuple[str, Model]], mode: str
) -> None:
    """Of all weights and of an adapter, also where no process has them whole: the server's log-probs are the trainer's
    own at every iteration."""
    jobs = []
    for out, more in (("whole", ()), ("lora", LORA)):
        word, model = serve()
        words = [*SERVED, f"distributed={mode}", "source.ppo_epochs=1", "training.steps=4", word, *more]
        jobs.append({"algorithm": "grpo", "out": f"{mode}-{out}", "words": words})
    together(folder, jobs)
    for job in jobs:
        assert max(of(folder, job["out"], "rollout_logp_difference_max")) < 1e-4
    assert model.requests == 4 * 2, "one for each prompt: four of two iterations"


def test_a_server_is_there_before_the_model_and_sleeps_while_that_trains(
    folder: Path, serve: Callable[..., tuple[str, Model]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the run's own, on its GPU (imitated): each iteration wakes it for weights, draws, and lets it sleep."""
    seen: list[str] = []
    told = Model.told

    def notes(model: Model, path: str, body: dict[str, Any]) -> None:
        seen.append("check" if "logit_bias" in body and path == "/v1/completions" else path)
        told(model, path, body)

    monkeypatch.setattr(Model, "told", notes)
    url = serve()[0].partition("=")[2]
    monkeypatch.setattr("alignlab.rollout.vllm.run.start", lambda *_: Server(url, 30))
    monkeypatch.setattr("alignlab.rollout.vllm.run.level_of", lambda *_: 2)
    moments = ((training_run, "load_model", "load"), (Trainer, "update", "train"), (Engine, "whole", "all at once"))
    for owner, name, said in moments:
        monkeypatch.setattr(owner, name, noting(getattr(owner, name), seen, said))
    runs.train(folder, "grpo", "asleep", *SERVED, "training.steps=4")
    wake = ["/wake_up?tags=weights", "/collective_rpc", "/wake_up?tags=kv_cache"]
    iteration = [*wake, *["/v1/completions"] * 4, "/sleep?level=2", "train", "train"]
    assert seen == ["check", "/sleep?level=2", "load", *iteration, *iteration]
    assert max(of(folder, "asleep", "rollout_logp_difference_max")) < 1e-4


def noting(function: Callable[..., Any], seen: list[str], said: str) -> Callable[..., Any]:
    """The function, which leaves a note before it does its work."""

    def noted(*arguments: Any, **options: Any) -> Any:
        seen.append(said)
        return function(*arguments, **options)

    return noted


def test_samples_ahead_are_one_iteration_old_and_weighed(folder: Path, serve: Callable[..., tuple[str, Model]]) -> None:
    word, _ = serve()
    ahead = ("rollout.vllm.asynchronous=true", "rollout.vllm.importance_cap=1.2", "training.steps=6")
    runs.train(folder, "grpo", "ahead", *SERVED, *LORA, *ahead, word)
    assert of(folder, "ahead", "rollout_staleness") == [0, 0, 2, 2, 2, 2]
    difference = of(folder, "ahead", "rollout_logp_difference")
    assert max(difference[:2]) < 1e-5 and min(difference[2:]) > 1e-4
    weight = of(folder, "ahead", "rollout_importance")
    assert weight[0] == pytest.approx(1, abs=1e-4) and all(0 < w <= 1.2 and w != 1 for w in weight[2:])
    word, _ = serve()
    plain = ("rollout.vllm.importance_cap=null", "training.steps=2")
    runs.train(folder, "grpo", "first", *SERVED, *LORA, *plain, word)
    first = runs.metrics(folder, "first")
    both = zip(runs.metrics(folder, "ahead"), first, strict=False)
    assert [a["reward"] == b["reward"] and abs(a["loss"] - b["loss"]) < 1e-5 for a, b in both] == [True, True]


def test_a_lost_server_loses_nothing(folder: Path, serve: Callable[..., tuple[str, Model]]) -> None:
    """The run is left with a checkpoint; the same command on another server makes the run it would have been."""
    moving = ("source.ref_update_interval=1", "source.ref_update_tau=0.5", "training.steps=6", *LORA)
    runs.train(folder, "grpo", "whole", *SERVED, *moving, serve()[0])
    word, model = serve()
    model.last = 4 * 2  # the third iteration's requests are not answered
    with pytest.raises(ServerLost, match=r"^rollout\.vllm: the server is lost: .*checkpoint of step 4 saved: the same"):
        runs.train(folder, "grpo", "lost", *SERVED, *moving, word)
    assert not (folder / "lost" / "model").exists()
    assert [p.name for p in (folder / "lost" / "checkpoints").glob("step-*")] == ["step-00000004"]
    with pytest.raises(ServerLost, match="is lost"):  # still gone: what there is stays
        runs.train(folder, "grpo", "lost", *SERVED, *moving, word)
    runs.train(folder, "grpo", "lost", *SERVED, *moving, serve()[0])
    assert runs.identical(runs.weights(folder, "whole"), runs.weights(folder, "lost"))
    assert of(folder, "lost", "step") == [1, 2, 3, 4, 5, 6]
    assert of(folder, "lost", "reward") == of(folder, "whole", "reward")


def test_a_server_lost_at_once_leaves_no_checkpoint(folder: Path, serve: Callable[..., tuple[str, Model]]) -> None:
    word, model = serve()
    model.last = 0
    with pytest.raises(ServerLost) as found:
        runs.train(folder, "grpo", "at-once", *SERVED, *LORA, word)
    assert "checkpoint" not in str(found.value)
    assert not list((folder / "at-once").glob("checkpoints/step-*"))


def test_a_stop_with_samples_under_way(
    folder: Path, serve: Callable[..., tuple[str, Model]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was being drawn is drawn again, with newer weights."""
    from alignlab.core import Interrupted
    from alignlab.training.callbacks.progress import ProgressDisplay

    ahead = ("rollout.vllm.asynchronous=true", "rollout.vllm.importance_cap=2", "training.steps=6")
    words = (*SERVED, *LORA, *ahead)
    stop = runs.StopAfter(3)
    monkeypatch.setattr(ProgressDisplay, "update", lambda self, step, metrics: stop(step, metrics))
    with pytest.raises(Interrupted):
        runs.train(folder, "grpo", "stopped", *words, serve()[0])
    monkeypatch.undo()
    runs.train(folder, "grpo", "stopped", *words, serve()[0])
    assert of(folder, "stopped", "step") == [1, 2, 3, 4, 5, 6]
    assert of(folder, "stopped", "rollout_staleness") == [0, 0, 2, 2, 0, 0]


def test_sampling_and_scoring_as_a_command(folder: Path, serve: Callable[..., tuple[str, Model]]) -> None:
    sampling = [w for w in runs.ONLINE if w.startswith(("data=", "rollout.", "scoring"))]
    words = [f"model={folder}/base", *sampling, f"data.path={folder}/prompts.jsonl", "group_size=2", "rollout=vllm"]
    word, model = serve()
    made = produce(resolve(compose("sample", [*words, word])), folder / "made")
    lines = [json.loads(line) for line in (folder / "made" / "groups.jsonl").read_text().splitlines()]
    assert made["groups"] == len(lines) == 12 and model.requests == 12
    assert all(len(line["responses"]) == 2 for line in lines)


# ---------------------------------------------------------------------- what is compared


def response(old: list[float], behaviour: list[float] | None) -> Response:
    columns: dict[str, Any] = {"old_logp": old} | ({"behaviour_logp": behaviour} if behaviour else {})
    return Response([5] * len(old), columns=columns, source="policy" if behaviour else "data")


def test_figures_by_hand() -> None:
    """Differences 0.5, 0 and -1: k3 of KL(π_b‖π_old) is e^d - 1 - d with d = log π_old/π_b."""
    groups = [
        Group([1], [response([-1.0, -2.0], [-1.5, -2.0]), response([-4.0], None)]),
        Group([1], [response([-3.0], [-2.0])]),
    ]
    found = compare(groups, cap=1.25)
    k3 = [math.exp(0.5) - 1.5, 0.0, math.exp(-1.0)]
    assert found == pytest.approx(
        {
            "rollout_logp_difference": 0.5,
            "rollout_logp_difference_max": 1.0,
            "rollout_kl": sum(k3) / 3,
            "rollout_importance": (1.25 + 1.0 + math.exp(-1.0)) / 3,
        }
    )
    weights = [r.columns["importance"] for g in groups for r in g.responses]
    assert weights == [pytest.approx([1.25, 1.0]), [1.0], pytest.approx([math.exp(-1.0)])]


def test_nothing_to_compare() -> None:
    assert compare([Group([1], [response([-1.0], None)])], None) == {}
    apart = Group([1], [response([-1.0, -2.0], [-1.0])])  # an algorithm has put other tokens there
    assert compare([apart], None) == {}
    assert "importance" not in apart.responses[0].columns


# ---------------------------------------------------------------------- what is refused

SEARCH = [
    *("environment=steps", "+environment.scorer._target_=alignlab.scoring.FunctionScorer"),
    "+environment.scorer.function={_target_:hydra.utils.get_method,path:tests.training.runs.count_of_a}",
]


@pytest.mark.parametrize(
    ("algorithm", "words", "said"),
    [
        ("grpo", SEARCH, "environment: "),
        ("grpo", ["source.policy=reference"], r"source\.policy=reference"),
        ("grpo", ["rollout.vllm.asynchronous=true"], r"asynchronous: GRPO .*rollout\.vllm\.importance_cap"),
        ("expert_iteration", ["rollout.vllm.importance_cap=2"], r"importance_cap=2\.0: ExpertIteration does not weigh"),
        ("ppo", ["quantization=nf4", "adapter=lora"], r"quantization=nf4: .*importance_cap"),
        ("ppo", ["rollout.min_p=0.1", "rollout.top_p=0.5"], r"rollout\.min_p"),
        ("ppo", ["rollout.vllm.url=localhost:8000"], r"rollout\.vllm\.url"),
        ("ppo", ["rollout.vllm.memory=1.5"], r"rollout\.vllm\.memory"),
    ],
)
def test_settings_at_odds(algorithm: str, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check(resolve(compose("train", runs.words_for(Path("f"), algorithm, "o", "rollout=vllm", *words))))


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        ("grpo", ["rollout.vllm.asynchronous=true", "rollout.vllm.importance_cap=2"]),
        ("expert_iteration", ["rollout.vllm.asynchronous=true"]),
        ("ppo", ["quantization=nf4", "adapter=lora", "rollout.vllm.importance_cap=2"]),
        ("ppo", ["distributed=ddp"]),
        ("grpo", ["distributed=fsdp"]),
        ("grpo", ["distributed=zero3"]),
    ],
)
def test_settings_that_go_together(algorithm: str, words: list[str]) -> None:
    check(resolve(compose("train", runs.words_for(Path("f"), algorithm, "o", "rollout=vllm", *words))))


def test_a_run_may_go_on_with_another_server_but_not_with_other_weights() -> None:
    def of(*words: str) -> dict[str, Any]:
        return fingerprint(resolve(compose("train", runs.words_for(Path("f"), "grpo", "o", "rollout=vllm", *words))))

    assert of() == of("rollout.vllm.url=http://there:8000", "rollout.vllm.memory=0.5", "rollout.vllm.arguments=[a]")
    assert of() != of("rollout.vllm.importance_cap=2")
    assert of() != of("rollout.vllm.asynchronous=true")
