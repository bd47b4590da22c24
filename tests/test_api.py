"""The public API as a notebook uses it: the lines of the README, what they give, and two models in one loop."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import alignlab as al
from alignlab.core import ConfigError, DataError
from tests import tiny
from tests.training import forks, runs


@pytest.fixture
def base(saved: Callable[..., Path]) -> Path:
    return saved(std=0.15)


def count_of_a(prompt: str, response: str, extra: dict[str, Any]) -> float:
    return float(response.split().count("a"))


def test_the_lines_of_the_readme(base: Path, tmp_path: Path) -> None:
    policy = al.load(base, adapter="lora")
    prompts = al.prompts(["a b", "c d e"], policy)
    groups = policy.sample(prompts, n=8, max_new_tokens=6, seed=0)
    al.score(groups, lambda prompt, response, extra: response.count("e"))
    trainer = al.Trainer(policy, al.GRPO(kl_coef=0.05), lr=1e-5)
    metrics = trainer.step(groups)
    trainer.save(tmp_path / "out")
    assert [len(g.responses) for g in groups] == [8, 8]
    rewards = [r.columns["reward"] for g in groups for r in g.responses]
    assert rewards == [float(r.text.count("e")) for g in groups for r in g.responses]
    assert metrics["reward"] == pytest.approx(sum(rewards) / len(rewards))
    assert metrics["lr"] == 1e-5 and math.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_the_notebook_runs(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNLAB_MODEL", str(base))
    cells = json.loads((Path(__file__).parents[1] / "docs" / "quickstart.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert (tmp_path / "out" / "adapter_config.json").exists()
    assert len(names["logp"]) == 2 and len(names["logp"][0]) == 4


def test_log_probs_are_those_of_plain_transformers(base: Path) -> None:
    import transformers

    policy = al.load(base)
    groups = policy.sample(al.prompts(["a b", "f"], policy), n=2, max_new_tokens=5, seed=1)
    network = transformers.AutoModelForCausalLM.from_pretrained(base)
    for group, found in zip(groups, policy.log_probs(groups), strict=True):
        for response, logp in zip(group.responses, found, strict=True):
            plain = tiny.plain_logits(network, group.prompt_ids + response.token_ids).log_softmax(-1)
            first = len(group.prompt_ids) - 1
            expected = [float(plain[first + i, t]) for i, t in enumerate(response.token_ids)]
            assert logp.tolist() == pytest.approx(expected, abs=1e-5)
            assert logp.tolist() == pytest.approx(list(response.columns["behaviour_logp"]), abs=1e-5)


def test_a_step_is_the_step_of_a_run(base: Path, tmp_path: Path) -> None:
    """DPO on all pairs at once: the same weights from `Trainer.step` as from `alignlab train`."""
    runs.prepare(tmp_path)
    more = ["training.batch_size=12", "training.steps=3", "optimizer.momentum=0", "algorithm.label_smoothing=0.1"]
    runs.train(tmp_path, "dpo", "run", *more)
    policy = al.load(tmp_path / "base")
    pairs = al.records(tmp_path / "preferences.jsonl", policy)
    optimizer = lambda groups: torch.optim.SGD(groups, lr=0.05)  # noqa: E731
    trainer = al.Trainer(policy, al.DPO(beta=0.1, label_smoothing=0.1), optimizer=optimizer)
    metrics = [trainer.step(pairs) for _ in range(3)]
    policy.save(tmp_path / "stepped")
    logged = [line["loss"] for line in runs.metrics(tmp_path, "run")]
    assert [m["loss"] for m in metrics] == pytest.approx(logged, rel=1e-6)
    assert runs.difference(runs.weights(tmp_path, "run"), runs.weights_of(tmp_path / "stepped")) < 1e-6


def test_under_torchrun_every_process_does_the_same(tmp_path: Path) -> None:
    """Two processes, each with a loop of its own: the same weights as from one, to rounding."""
    runs.prepare(tmp_path)

    def loop(out: str) -> None:
        policy = al.load(tmp_path / "base")
        pairs = al.records(tmp_path / "preferences.jsonl", policy)
        trainer = al.Trainer(policy, al.DPO(beta=0.1), optimizer=lambda groups: torch.optim.SGD(groups, lr=0.05))
        for _ in range(2):
            trainer.step(pairs)
        assert trainer.processes.world == (2 if out == "two" else 1)
        trainer.save(tmp_path / out)

    log = tmp_path / "log"
    forks.finish(forks.members(lambda: loop("two"), log), log)
    assert forks.wait(forks.fork(lambda: loop("one"), log)) == 0, log.read_text()
    one, two = runs.weights_of(tmp_path / "one"), runs.weights_of(tmp_path / "two")
    assert runs.difference(one, two) < 1e-5


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_each_trainer_has_a_reference_of_its_own(tmp_path: Path, adapter: str) -> None:
    """DPO's loss is ln 2 at the first step of every trainer, on the very groups that the one before it has read."""
    runs.prepare(tmp_path)
    policy = al.load(tmp_path / "base", adapter=adapter)
    pairs = al.records(tmp_path / "preferences.jsonl", policy)
    for _ in range(3):
        trainer = al.Trainer(policy, al.DPO(beta=0.1), lr=1e-2)
        first, second = (trainer.step(pairs)["loss"] for _ in range(2))
        assert first == pytest.approx(math.log(2), abs=1e-6)
        assert abs(second - math.log(2)) > 1e-3


def test_two_models_and_a_loop_of_ones_own(base: Path) -> None:
    """A policy and a reward model, trained in turns; each `step` with a learning rate of its own."""
    policy, judge = al.load(base), al.load(base, kind="score")
    learner = al.Trainer(policy, al.RLOO(kl_coef=0.0), lr=1e-3)
    rater = al.Trainer(judge, al.RewardModel(), lr=1e-3)
    prompts = al.prompts(["a", "b c"], policy)
    losses = []
    for step in range(3):
        groups = policy.sample(prompts, n=4, max_new_tokens=4, seed=step)
        al.score(groups, lambda prompt, response, extra: response.count("a") + 0.01 * len(response))
        rated = [g for g in groups if len({r.columns["reward"] for r in g.responses}) > 1]
        losses.append(rater.step(rated)["loss"])
        metrics = learner.step(groups, lr=1e-3 / (1 + step))
        assert metrics["lr"] == pytest.approx(1e-3 / (1 + step))
    assert learner.state.step == rater.state.step == 3
    assert all(math.isfinite(loss) for loss in losses)


class Remember(al.Callback):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def on_start(self, trainer: al.Trainer) -> None:
        self.told.append("start")

    def on_step(self, trainer: al.Trainer) -> None:
        self.told.append(f"step {trainer.state.step}")
        if trainer.state.step == 2:
            trainer.request_stop("enough")

    def on_evaluate(self, trainer: al.Trainer, metrics: Mapping[str, float]) -> None:
        self.told.append("evaluate")

    def on_end(self, trainer: al.Trainer, error: BaseException | None) -> None:
        self.told.append(f"end {error}")


def test_a_whole_run(tmp_path: Path) -> None:
    runs.prepare(tmp_path)
    watching = Remember()
    result = al.train(
        algorithm=al.DPO(beta=0.2),
        model=tmp_path / "base",
        data=tmp_path / "preferences.jsonl",
        callbacks=[watching],
        lr=1e-4,
        out=tmp_path / "run",
        training={"steps": 5, "batch_size": 4, "progress": "off"},
        adapter="lora",
    )
    assert watching.told == ["start", "step 1", "step 2", "end None"]
    assert (result["step"], result["out"]) == (2, str(tmp_path / "run"))
    assert (tmp_path / "run" / "model" / "adapter_config.json").exists()
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "_target_: alignlab.algorithms.dpo.DPO" in config and "beta: 0.2" in config


def test_a_run_with_a_function_as_reward(tmp_path: Path) -> None:
    runs.prepare(tmp_path)
    result = al.train(
        algorithm="rloo",
        model=tmp_path / "base",
        data=tmp_path / "prompts.jsonl",
        scoring=count_of_a,
        source="rollout",
        rollout={"max_new_tokens": 4},
        training={"steps": 2, "batch_size": 4, "progress": "off"},
        out=tmp_path / "run",
    )
    assert result["step"] == 2 and result["generated_tokens"] > 0
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert all(s["reward"] == s["response"].split().count("a") for s in samples)


def test_a_whole_run_under_torchrun_uses_all_processes(tmp_path: Path) -> None:
    runs.prepare(tmp_path)

    def run() -> None:
        training = {"steps": 1, "batch_size": 4, "progress": "off"}
        data = tmp_path / "preferences.jsonl"
        result = al.train(algorithm="dpo", model=tmp_path / "base", data=data, training=training, out=tmp_path / "run")
        assert (result["processes"], result["engine"]) == (2, "DistributedDataParallel")

    log = tmp_path / "log"
    forks.finish(forks.members(run, log), log)


def test_a_run_on_records(tmp_path: Path) -> None:
    """They are kept in its folder, so that it can be gone on with, and not with others."""
    runs.prepare(tmp_path)
    given = [{"prompt": f"a {i}", "completion": "b"} for i in range(4)]
    training = {"steps": 1, "batch_size": 2, "progress": "off"}
    common = {"algorithm": "sft", "model": tmp_path / "base", "training": training, "out": tmp_path / "run"}
    assert al.train(data=given, **common)["step"] == 1
    (kept,) = (tmp_path / "run").glob("records-*.jsonl")
    assert [json.loads(line) for line in kept.read_text().splitlines()] == given
    with pytest.raises(ConfigError, match=r"holds a run with another data\.path"):
        al.train(data=given[1:], **common)
    with pytest.raises(DataError, match=r"^records:1: cannot be written as JSON: .* type object"):
        al.train(data=[{"prompt": object()}], **common)


def test_records_say_what_to_do_as_arguments(base: Path) -> None:
    with pytest.raises(DataError, match=r"\(parser=…\) and map them \(fields=…\); .*with on_bad_record=\"skip\"$"):
        al.records([{"foo": 1}], al.load(base))


def test_what_the_package_shows_is_its_api() -> None:
    assert {*dir(al)} == {*al.__all__, "__version__"}


def test_without_a_network_a_model_that_is_not_here_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its files would be tried for again and again, for three quarters of a minute."""
    import huggingface_hub

    def no_network(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    with pytest.raises(
        ConfigError, match=r"^model\.path='nobody/nothing': there is no such folder, nor .*\(no network\)"
    ):
        al.load("nobody/nothing")


QUIET = """
import alignlab as al
policy = al.load({base!r}, adapter="lora", gradient_checkpointing=True)
al.Trainer(policy, al.SFT(), lr=1e-3).step(al.records([{{"prompt": "a", "completion": "b"}}], policy))
"""


def test_a_script_hears_nothing_from_libraries(base: Path, tmp_path: Path) -> None:
    done = runs.spawn([sys.executable, "-c", QUIET.format(base=str(base))])
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


def test_a_bad_record_is_named_by_its_number(base: Path) -> None:
    given = [{"prompt": "a", "chosen": "b", "rejected": r} for r in ("c", "")]
    with pytest.raises(DataError, match=r"^records:2: 'rejected' is empty"):
        al.records(given, al.load(base))


class NoCallback:
    def on_step(self, trainer: al.Trainer) -> None: ...


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda base, out: al.train(algorithm=al.DPO, model=base, data="x", out=out),  # type: ignore[arg-type]
            r"algorithm: DPO is a class; an object is wanted: DPO\(…\)",
        ),
        (
            lambda base, out: al.train(algorithm="dpo", model=base, data="x", out=out, callbacks=[NoCallback()]),  # type: ignore[list-item]
            "callbacks: NoCallback: not a Callback: it has no on_checkpoint, on_end, on_evaluate, on_iteration",
        ),
        (
            lambda base, out: al.train(algorithm="dpo", model=base, data="x", out=out, callbacks=[Remember]),  # type: ignore[list-item]
            "callbacks: Remember is a class",
        ),
        (lambda base, out: al.load(base, adapter="lorra"), "adapter=lorra"),
        (
            lambda base, out: al.train(algorithm="dpo", model=base, data="x", out=out, steps=3),
            r"^steps: unknown section; give training=\{'steps': 3\}",
        ),
        (
            lambda base, out: al.train(algorithm="dpo", model=base, data="x", out=out, max_new_tokens=3),
            r"^max_new_tokens: unknown section; give rollout=\{'max_new_tokens': 3\}",
        ),
        (
            lambda base, out: al.train(algorithm="dpo", model=base, data="x", out=out, trainig={"steps": 3}),
            "^trainig: unknown section; did you mean 'training'",
        ),
        (lambda base, out: al.train(algorithm="dpo", model=base, data=[], out=out), "^data: no paths and no records"),
        (
            lambda base, out: al.prompts("a b", al.load(base)),
            r"there is no such file; texts are given as a list: \['a b'",
        ),
        (lambda base, out: al.Trainer(al.load(base), al.SFT(), lr=-1), "^lr=-1: must be a number >= 0"),
        (
            lambda base, out: al.Trainer(al.load(base), al.SFT(), lr=1, callbacks=[Remember]),  # type: ignore[list-item]
            "^callbacks: Remember is a class",
        ),
        (
            lambda base, out: al.Trainer(al.load(base), al.SFT(), lr=1, callbacks=[NoCallback()]),  # type: ignore[list-item]
            "^callbacks: NoCallback: not a Callback: it has no on_checkpoint",
        ),
        (lambda base, out: al.load(base, drpout=True), r"model\.drpout: unknown key"),
        (lambda base, out: al.Trainer(al.load(base), al.RewardModel(), lr=1e-3), "kind='score'"),
        (lambda base, out: al.Trainer(al.load(base), al.SFT()), "lr: must be given"),
        (lambda base, out: al.Trainer("base", al.SFT(), lr=1e-3), "policy: a model from alignlab.load is wanted"),
        (lambda base, out: al.load(base).sample(al.prompts(["a"], al.load(base)), top_q=1), "top_q: unknown key"),
        (
            lambda base, out: al.train(algorithm="sft", model=base, data="x", traning={}, out=out),
            "traning: unknown section; did you mean 'training'",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_line(base: Path, tmp_path: Path, call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(base, tmp_path / "out")


def test_importing_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'hydra', 'pydantic'}"
    code = f"import sys, alignlab; print(sorted({{m.split('.')[0] for m in sys.modules}} & {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_every_public_name_is_there() -> None:
    for name in al.__all__:
        assert getattr(al, name) is not None
    assert set(al.__all__) <= set(dir(al))
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        al.nosuch  # noqa: B018
