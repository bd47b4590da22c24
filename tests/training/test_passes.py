"""Log-probs that the sampler has given need no second pass; wherever they are not the scoring pass's, there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from alignlab.algorithms.grpo import GRPO
from alignlab.core import Group
from alignlab.scoring import fill_outputs
from alignlab.training import collect
from tests.training import runs

EXACT = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("passes")
    runs.prepare(made, hidden_size=64, intermediate_size=64)  # rows that can be quantised
    return made


@dataclass
class Seen:
    """What a run's passes over its groups were.

    Attributes:
        old, reference: responses that the policy and the reference were asked for, in all.
        responses: how many there were.
        off: how far the columns are from what a pass over everything says, at most.
    """

    old: int = 0
    reference: int = 0
    responses: int = 0
    off: dict[str, float] = field(default_factory=dict)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found = Seen()
    ask, ask_reference, fill = collect.fill_outputs, collect.fill_log_probs, collect.Collector._fill

    def counted(model: Any, some: Sequence[Group], columns: Any, *rest: Any) -> None:
        found.old += sum(len(g.responses) for g in some) if columns else 0
        ask(model, some, columns, *rest)

    def counted_reference(model: Any, some: Sequence[Group], column: str, *rest: Any) -> None:
        found.reference += sum(column not in r.columns for g in some for r in g.responses)
        ask_reference(model, some, column, *rest)

    def checked(self: collect.Collector, groups: list[Group], *rest: Any) -> None:
        fill(self, groups, *rest)
        responses = [r for g in groups for r in g.responses]
        found.responses += len(responses)
        for column in {"old_logp", "ref_logp"} & set(self.algorithm.needs):
            fresh = [g.with_responses([replace(r, columns={}) for r in g.responses]) for g in groups]
            if column == "old_logp":
                fill_outputs(self.model, fresh, {"logp": column}, 4096, self.temperature)
            else:
                with self._reference().model() as reference:
                    fill_outputs(reference, fresh, {"logp": column}, 4096, self.temperature)
            pairs = zip(responses, (r for g in fresh for r in g.responses), strict=True)
            off = [abs(a - b) for r, f in pairs for a, b in zip(r.columns[column], f.columns[column], strict=True)]
            found.off[column] = max([found.off.get(column, 0.0), *off])

    monkeypatch.setattr(collect, "fill_outputs", counted)
    monkeypatch.setattr(collect, "fill_log_probs", counted_reference)
    monkeypatch.setattr(collect.Collector, "_fill", checked)
    return found


def trained(folder: Path, name: str, *more: str, algorithm: str = "grpo") -> None:
    words = "training.steps=2", "source.rollout_batch_size=5", "training.resume=never", *more
    runs.train(folder, algorithm, name, *words)


@pytest.mark.parametrize(
    "more", [[], ["adapter=lora"], ["rollout.temperature=0.7"], ["model.dtype=float64"], ["rollout.stop=[a]"]], ids=str
)
def test_what_was_drawn_from_the_policy_is_not_read_again(folder: Path, seen: Seen, more: list[str]) -> None:
    trained(folder, "exact", *more)
    assert (seen.old, seen.reference, seen.responses) == (0, 30, 30)
    assert max(seen.off.values()) < EXACT


def test_what_was_drawn_from_the_reference_is_not_read_by_it_again(folder: Path, seen: Seen) -> None:
    trained(folder, "reference", "source.policy=reference", "source.ref_update_interval=1")
    assert (seen.old, seen.reference, seen.responses) == (30, 0, 30)
    assert max(seen.off.values()) < EXACT


INEXACT = {
    "top_k": ["rollout.top_k=5"],
    "top_p": ["rollout.top_p=0.9"],
    "min_p": ["rollout.min_p=0.01"],
    "suppressed": ["rollout.suppress_tokens=[5]"],
    "not yet the end": ["rollout.min_new_tokens=2"],
    "half precision": ["model.dtype=bfloat16"],
    "mixed precision": ["training.mixed_precision=bf16"],
    "few bits": ["quantization=int8", "adapter=lora"],
    "searched": [
        *("environment=steps", "environment.step_separator=a"),
        "+environment.scorer._target_=alignlab.scoring.FunctionScorer",
        "+environment.scorer.function={_target_:hydra.utils.get_method,path:tests.training.runs.count_of_a}",
    ],
}


@pytest.mark.parametrize("case", INEXACT)
def test_whatever_else_was_drawn_is(folder: Path, seen: Seen, case: str) -> None:
    trained(folder, "inexact", *INEXACT[case])
    assert seen.old == seen.responses == 30
    if case not in ("half precision", "mixed precision", "few bits"):
        assert max(seen.off.values()) < EXACT


def test_records_own_responses_are_read(folder: Path, seen: Seen) -> None:
    more = ["source.keep=true", "data=demonstrations", f"data.path={folder}/demonstrations.jsonl"]
    trained(folder, "kept", *more)
    assert (seen.old, seen.responses) == (10, 40), "one of each prompt beside three samples"
    assert max(seen.off.values()) < EXACT


def test_values_need_the_pass_anyway(folder: Path, seen: Seen) -> None:
    trained(folder, "ppo", "source.ppo_epochs=1", algorithm="ppo")
    assert seen.old == seen.responses == 30
    assert max(seen.off.values()) < EXACT


def test_behind_another_prompt_it_is_another_response(
    folder: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An algorithm that has the policy read something else than what it was asked."""

    def arrange(self: GRPO, groups: Sequence[Group]) -> list[Group]:
        """The first group as it is, a copy of the second's responses, the third without its prompt's first tokens."""
        copied = groups[1].with_responses([replace(r, columns=dict(r.columns)) for r in groups[1].responses])
        return [groups[0], copied, *(replace(g, prompt_ids=[7, *g.prompt_ids]) for g in groups[2:])]

    monkeypatch.setattr(GRPO, "arrange", arrange)
    trained(folder, "behind")
    assert (seen.old, seen.responses) == (24, 30)
    assert max(seen.off.values()) < EXACT


def test_kto_reads_the_mismatched_alone(folder: Path, seen: Seen) -> None:
    online = [w for w in runs.ALGORITHMS["grpo"] if not w.startswith("algorithm=")]
    trained(folder, "kto", *online, f"data.path={folder}/prompts.jsonl", algorithm="kto")
    assert (seen.old, seen.reference, seen.responses) == (10, 40, 40)
    assert max(seen.off.values()) < EXACT
