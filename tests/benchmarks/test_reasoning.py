"""Arithmetic in steps: the problems, the teacher, the checker, the base model and the benchmark's figures."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from alignlab.benchmarks.base import Subject
from alignlab.benchmarks.reasoning import ReasoningBenchmark, Teacher, TeacherSettings, check_steps, is_right
from alignlab.benchmarks.reasoning.base_model import BaseModelSettings, base_model
from alignlab.benchmarks.reasoning.problems import OPERATIONS, VOCABULARY, held_out, tokenizer, true_steps
from alignlab.core import ConfigError, DataError, Group, Response
from alignlab.data import DataSettings, load
from alignlab.data.steps import Steps
from alignlab.models import ModelSettings, load_model
from alignlab.rollout import LocalRollout
from alignlab.rollout.policy import Policy

PROMPT = "7+5*3-8="
STEPS = ["7+5=2", "2*3=6", "6-8=8"]
SMALL = {"steps": 3, "batch_size": 4, "width": 32}


# Problems and checks


def test_a_problem_by_hand() -> None:
    assert true_steps(PROMPT) == STEPS
    assert true_steps("9*9=") == ["9*9=1"]
    assert true_steps("0-1-1=") == ["0-1=9", "9-1=8"]
    assert true_steps("7+=") == true_steps("hello") == true_steps("7+5*3-8") == []


@pytest.mark.parametrize(
    ("steps", "labels"),
    [
        (STEPS, [1, 1, 1]),
        (["7+5=3", "3*3=9", "9-8=1"], [-1, -1, -1]),  # all that follows is built on an error
        (["7+5=2", "2*3=7", "6-8=8"], [1, -1, -1]),
        (["7+5=2", "2*4=8", "8-8=0"], [1, -1, -1]),  # a number that is not in the problem
        (["7+5=2", "2*3=6", "6-8=2"], [1, 1, -1]),
        (["7+5=2", "2*3=6"], [1, -1]),  # left unfinished
        ([*STEPS, "8+1=9"], [1, 1, 1, -1]),
        (["nonsense"], [-1]),
        ([], []),
    ],
)
def test_steps_are_checked(steps: list[str], labels: list[int]) -> None:
    assert check_steps(PROMPT, steps, {}) == labels


@pytest.mark.parametrize(
    ("response", "right"),
    [("\n".join(STEPS), 1), ("7+5=2\n2*3=6\n6-8=3", 0), ("=8", 1), ("8", 0), ("", 0), ("6-8=8 ", 1), ("=88", 0)],
)
def test_the_final_answer_is_checked(response: str, right: float) -> None:
    assert is_right(PROMPT, response, {}) == right


# The teacher


def test_the_teacher_is_as_fallible_as_he_is_said_to_be() -> None:
    settings = TeacherSettings(slips=0.05, misbeliefs=0.2, conviction=0.6)
    teacher, rng = Teacher(settings), random.Random(0)
    assert len(teacher.misbelief) == 60
    known = {True: [0, 0], False: [0, 0]}
    for _ in range(4000):
        for step in teacher.solve(teacher.problem(rng), rng):
            fact, result = step.split("=")
            true = true_steps(f"{fact}=")[0][-1]
            count = known[fact in teacher.misbelief]
            count[0] += result != true
            count[1] += 1
            if fact in teacher.misbelief:
                assert str(teacher.misbelief[fact]) != true
    wrong, count = known[False]
    assert wrong / count == pytest.approx(0.05, abs=0.01)
    wrong, count = known[True]
    assert wrong / count == pytest.approx(0.6 + 0.4 * 0.05, abs=0.03)


def test_a_teacher_who_never_errs_gives_the_truth() -> None:
    teacher, rng = Teacher(TeacherSettings(slips=0, misbeliefs=0)), random.Random(0)
    for _ in range(50):
        prompt = teacher.problem(rng)
        assert teacher.solve(prompt, rng) == true_steps(prompt)


def test_held_out_problems_are_never_shown() -> None:
    teacher, rng = Teacher(TeacherSettings(least_steps=2, most_steps=5)), random.Random(0)
    shown = [teacher.problem(rng) for _ in range(2000)]
    tested = [teacher.problem(rng, test=True) for _ in range(300)]
    assert not any(map(held_out, shown))
    assert all(map(held_out, tested))
    assert {len(true_steps(p)) for p in tested} == {2, 3, 4, 5}
    assert all(any(sign in p for p in shown) for sign in OPERATIONS)


def test_the_tokenizer_is_exact() -> None:
    tokens = tokenizer()
    text = PROMPT + "\n".join(STEPS)
    ids = tokens(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokens.decode(ids) == text
    assert tokens("1<end>")["input_ids"] == [1, tokens.eos_token_id] == [1, VOCABULARY.index("<end>")]
    assert Steps(tokens).split([*ids[len(PROMPT) :], tokens.eos_token_id]) == STEPS


# The base model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model(Teacher(TeacherSettings()), BaseModelSettings(**SMALL), tmp_path_factory.mktemp("cache"))


def test_the_base_model_is_made_once_and_is_always_the_same(base: Path, tmp_path: Path) -> None:
    teacher, settings = Teacher(TeacherSettings()), BaseModelSettings(**SMALL)
    made = (base / "model.safetensors").read_bytes()
    stamp = (base / "model.safetensors").stat().st_mtime_ns
    assert base_model(teacher, settings, base.parent) == base
    assert (base / "model.safetensors").stat().st_mtime_ns == stamp
    torch.manual_seed(99)
    again = base_model(teacher, settings, tmp_path)
    assert again.name == base.name
    assert (again / "model.safetensors").read_bytes() == made
    assert [p.name for p in tmp_path.iterdir()] == [again.name], "nothing unfinished is left"
    other = base_model(teacher, BaseModelSettings(**{**SMALL, "seed": 1}), tmp_path)
    assert other.name != again.name
    assert base_model(Teacher(TeacherSettings(seed=1)), settings, tmp_path).name not in (again.name, other.name)


def test_it_learns_the_form_of_a_solution(tmp_path: Path) -> None:
    """One step, two operations' worth of steps: what follows the prompt's digits and sign is copied and ended."""
    teacher = Teacher(TeacherSettings(least_steps=1, most_steps=1, slips=0, misbeliefs=0))
    folder = base_model(teacher, BaseModelSettings(steps=150, batch_size=64), tmp_path)
    model = load_model(ModelSettings(path=str(folder)), trainable=False)
    rng = random.Random(5)
    prompts = [teacher.problem(rng, test=True) for _ in range(40)]
    groups = [Group(model.tokenizer(p)["input_ids"], [], f"p:{i}", p) for i, p in enumerate(prompts)]
    found = LocalRollout(max_new_tokens=12).sampler(model).greedy(groups)
    formed = [g.responses[0].text.startswith(g.prompt) and len(g.responses[0].text) == 5 for g in found]
    assert sum(formed) > 36


# The benchmark


def small(**changes: object) -> ReasoningBenchmark:
    counts = {"demonstrations": 20, "prompts": 30, "solutions": 200, "test_problems": 16}
    return ReasoningBenchmark(**{**counts, **changes}, base=SMALL)  # type: ignore[arg-type]


def test_its_data(base: Path, tmp_path: Path) -> None:
    benchmark = small()
    benchmark.write_data(tmp_path, str(base))
    tokens = tokenizer()
    demonstrations = load(DataSettings(path=str(tmp_path / "demonstrations.jsonl")), tokens).train
    assert len(demonstrations) == 20
    assert all(g.responses[0].token_ids[-1] == tokens.eos_token_id for g in demonstrations)
    assert len(load(DataSettings(path=str(tmp_path / "prompts.jsonl")), tokens).train) == 30
    splits = load(DataSettings(path=str(tmp_path / "steps.jsonl")), tokens)
    assert dict(splits.report.formats) == {"steps": 200}
    for group in splits.train:
        response = group.responses[0]
        steps = Steps(tokens).split(response.token_ids)
        assert list(response.columns["step_label"]) == check_steps(group.prompt, steps, {})
    right = sum(r.columns["step_label"][-1] > 0 for g in splits.train for r in g.responses)  # type: ignore[index]
    assert 60 < right < 140, "some solutions are right, some wrong"
    for file in ("demonstrations", "prompts", "steps"):
        prompts = [json.loads(line)["prompt"] for line in (tmp_path / f"{file}.jsonl").open()]
        assert not any(map(held_out, prompts))
    again = tmp_path / "again"
    small().write_data(again, str(base))
    assert (again / "steps.jsonl").read_bytes() == (tmp_path / "steps.jsonl").read_bytes()
    small(seed=1).write_data(again, str(base))
    assert (again / "steps.jsonl").read_bytes() != (tmp_path / "steps.jsonl").read_bytes()


class Answers:
    """A sampler that answers the first `right` problems rightly, the others with a wrong last step."""

    def __init__(self, right: int) -> None:
        self.right = right

    def sample(self, groups: Sequence[Group], n: int, seed: int) -> list[Group]:
        found = []
        for i, group in enumerate(groups):
            steps = true_steps(group.prompt)
            if i >= self.right:
                steps[-1] = steps[-1][:-1] + str((int(steps[-1][-1]) + 1) % 10)
            text = "\n".join(steps)
            ids = [*tokenizer()(text)["input_ids"], VOCABULARY.index("<end>")]
            logp = [0.0] * len(ids)
            drawn = [Response(ids, None, {"behaviour_logp": logp}, text=text, source="policy") for _ in range(n)]
            found.append(group.with_responses(drawn))
        return found


def test_its_figures(base: Path) -> None:
    policy = load_model(ModelSettings(path=str(base)), trainable=False)
    other = load_model(ModelSettings(path=str(base)), trainable=False)
    with torch.no_grad():
        other.network.lm_head.weight.mul_(2)

    @contextmanager
    def reference() -> Iterator[Policy]:
        yield Policy(other)

    samplers = iter([Answers(12), Answers(4)])
    subject = Subject(Policy(policy), reference, lambda _: next(samplers), base=lambda: Policy(policy))
    found = small().evaluate(subject)
    assert found["reward"] == 12 / 16
    assert found["reward_per_prompt"] == [1.0] * 12 + [0.0] * 4
    assert found["solutions_right"] == 12 / 16
    assert found["win_rate"] == pytest.approx((8 + 0.5 * 8) / 16), "8 of the policy's alone are right, 8 alike"
    assert found["finished"] == 1.0
    assert found["samples"][0]["answer"].count("=") >= 3
    mine = Answers(12).sample(small()._test_prompts(policy.tokenizer), 1, 0)
    sums = [[float(v.sum()) for v in m.outputs(mine, ("logp",))["logp"]] for m in (policy, other)]
    assert found["kl"] == pytest.approx(sum(a - b for a, b in zip(*sums, strict=True)) / 16, rel=1e-4)
    assert found["response_length"] == pytest.approx(sum(len(g.responses[0].token_ids) for g in mine) / 16)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"benchmark\.test_problems=1"):
        small(test_problems=1)
    with pytest.raises(ConfigError, match=r"benchmark\.solutions=0"):
        small(solutions=0)
    with pytest.raises(ConfigError, match=r"benchmark\.teacher\.most_steps=2: less than 3"):
        small(teacher={"most_steps": 2})
    with pytest.raises(ConfigError, match=r"benchmark\.teacher\.slip: unknown key; did you mean 'slips'"):
        small(teacher={"slip": 0.1})
    from tests import tiny

    with pytest.raises(DataError, match="tokenizer does not know"):
        small()._test_prompts(tiny.tokenizer())
