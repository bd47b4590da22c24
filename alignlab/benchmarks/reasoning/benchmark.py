"""The reasoning benchmark as comparisons use it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignlab.benchmarks.base import MEASURED, Benchmark, Subject, mean, measure
from alignlab.benchmarks.reasoning.base_model import BaseModelSettings, base_folder, base_model
from alignlab.benchmarks.reasoning.problems import (
    SEPARATOR,
    Teacher,
    TeacherSettings,
    check_steps,
    is_right,
)
from alignlab.build import section
from alignlab.core import ConfigError, DataError, Group, Scorer, require
from alignlab.data import write_jsonl
from alignlab.scoring import FunctionScorer


class ReasoningBenchmark(Benchmark):
    """Arithmetic in several steps, rewarded for the right final answer: 1 or 0.

    The base model imitates a fallible teacher (see `problems`): it knows better than it mostly answers.

    Args:
        demonstrations: how many of the teacher's solutions there are for supervised fine-tuning.
        prompts: how many problems there are to train on.
        solutions: how many of the teacher's solutions there are with a label for each step.
        test_problems: how many held-out problems policies are measured on, >= 2.
        samples_shown: answers kept for the report.
        seed: of the data.
        teacher: how long problems are, how fallible he is; see `TeacherSettings`.
        base: the base model; see `BaseModelSettings`.
    """

    name = "reasoning"
    metrics = (*MEASURED, "solutions_right")
    files = ("demonstrations", "prompts", "steps")
    supports_best_of = True

    def __init__(
        self,
        demonstrations: int = 4096,
        prompts: int = 4096,
        solutions: int = 8192,
        test_problems: int = 1024,
        samples_shown: int = 6,
        seed: int = 0,
        teacher: dict[str, Any] | None = None,
        base: dict[str, Any] | None = None,
    ) -> None:
        counts = {"demonstrations": demonstrations, "prompts": prompts, "solutions": solutions}
        for key, count in counts.items():
            require(count >= 1, f"benchmark.{key}", count, "must be at least 1")
        require(test_problems >= 2, "benchmark.test_problems", test_problems, "must be at least 2, for intervals")
        self.demonstrations, self.prompts, self.solutions = demonstrations, prompts, solutions
        self.test_problems, self.samples_shown, self.seed = test_problems, samples_shown, seed
        settings = section(TeacherSettings, teacher or {}, "benchmark.teacher")
        if settings.most_steps < settings.least_steps:
            raise ConfigError(f"benchmark.teacher.most_steps={settings.most_steps}: less than {settings.least_steps}")
        self.teacher = Teacher(settings)
        self.base = section(BaseModelSettings, base or {}, "benchmark.base")

    def base_model(self) -> str | None:
        return str(base_model(self.teacher, self.base))

    def base_path(self) -> str | None:
        return str(base_folder(self.teacher, self.base))

    def write_data(self, folder: Path, model: str) -> None:
        write_jsonl(
            folder / "demonstrations.jsonl",
            ({"prompt": p, "completion": SEPARATOR.join(s)} for p, s in self._solved("demonstrations")),
        )
        write_jsonl(folder / "prompts.jsonl", ({"prompt": p} for p, _ in self._solved("prompts")))
        write_jsonl(
            folder / "steps.jsonl",
            (
                {"prompt": p, "steps": s, "labels": [int(x) for x in check_steps(p, s, {})]}
                for p, s in self._solved("solutions")
            ),
        )

    def gold(self) -> Scorer:
        return FunctionScorer(is_right)

    def evaluate(self, subject: Subject) -> dict[str, Any]:
        found, mine = measure(subject, self._test_prompts(subject.policy.tokenizer), self.gold())
        labels = [check_steps(g.prompt, g.responses[0].text.split(SEPARATOR), {}) for g in mine]
        found["solutions_right"] = mean([float(all(x > 0 for x in some)) for some in labels])
        found["samples"] = [
            {"prompt": g.prompt, "answer": g.responses[0].text.replace(SEPARATOR, "  ")}
            for g in mine[: self.samples_shown]
        ]
        return found

    def _solved(self, what: str) -> Iterator[tuple[str, list[str]]]:
        """As many problems and solutions of the teacher as are asked for, of a stream of their own."""
        rng = random.Random(f"{what} {self.seed}")
        for _ in range(getattr(self, what)):
            prompt = self.teacher.problem(rng)
            yield prompt, self.teacher.solve(prompt, rng)

    def _test_prompts(self, tokenizer: Any) -> list[Group]:
        """The held-out problems as groups without responses; the same whatever the other settings are."""
        rng = random.Random("test")
        groups = []
        for number in range(1, self.test_problems + 1):
            prompt = self.teacher.problem(rng, test=True)
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            if tokenizer.decode(ids).replace(" ", "") != prompt:
                raise DataError("the model's tokenizer does not know the benchmark's digits and signs")
            groups.append(Group(ids, [], f"test problem {number}", prompt))
        return groups
