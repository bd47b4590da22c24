"""What the study of performance makes of measurements: counts, ratios, verdicts. Nothing is timed here."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import study
import torch
from measuring import flops, gauge, guard, ours, processes
from measuring.parts import PARTS, growth, rollout
from measuring.processes import Case, Failed
from measuring.report import Measured, Target, Wanted, comparison, rows, target_lines
from measuring.work import END, Scale, Shape, Words, describe, model_folder, pair_batches, scale, set_trained, text_of

from alignlab.core import Group, Response
from alignlab.models.packing import lay_out

SHAPE = Shape(vocabulary=10, hidden=4, layers=2, heads=2, key_value_heads=1, intermediate=6)


def group(prompt: int, *responses: int) -> Group:
    return Group([5] * prompt, [Response([6] * count) for count in responses])


def test_attention_pairs_are_those_of_the_mask_of_trunk_and_branches() -> None:
    groups = [group(5, 3, 2), group(1, 4), group(7, 1, 1, 6)]
    rows_ = lay_out(groups)
    allowed = rows_.attention()[:, 0] & (rows_.group_RL >= 0)[:, :, None]  # padding attends to itself in a mask
    assert flops.attention_entries(groups) == int(allowed.sum())


def test_useful_arithmetic_by_hand() -> None:
    groups = [group(3, 2)]  # 5 tokens, 2 with loss; 15 pairs of attention
    # q, o: 16 each; k, v: 4·2 = 8 each; gate, up, down: 24 each. 120 in a layer, 240 in two. The last layer's o, gate,
    # up and down (88) are read at 2 of the 5 tokens: the prompt's last one and the response's first.
    linear, attention, logits = 2 * (240 * 5 - 88 * 3), 4 * 15 * 4 * 2, 2 * 4 * 10 * 2
    assert flops.step_flops(SHAPE, groups, lora=False) == 3 * (linear + attention + logits)
    # r = 16: (4+4)·16 for q and o, (4+2)·16 for k and v, (4+6)·16 for gate, up and down: 928 in a layer. The base's
    # weights get no gradient, the first layer's q, k and v (32 weights) none with respect to their input.
    adapter = 3 * 2 * (2 * 928 * 5 - 608 * 3)
    with_lora = 2 * linear - 2 * 32 * 5 + 3 * attention + 2 * logits + adapter
    assert flops.step_flops(SHAPE, groups, lora=True) == with_lora
    assert flops.step_flops(SHAPE, groups, lora=True, reference=True) == with_lora + linear + attention + logits


def test_linear_maps_are_counted_as_transformers_has_them(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    shape = replace(SHAPE, hidden=8)
    model = AutoModelForCausalLM.from_pretrained(model_folder(tmp_path, shape))
    counted = [p.numel() for n, p in model.named_parameters() if "layers.0" in n and p.dim() == 2]
    assert sum(flops.linear_parameters(shape).values()) == sum(counted)


def test_matmul_peak_is_positive_and_finite() -> None:
    wall, _ = flops.matmul_peak("cpu", "float32", seconds=0.001)
    assert 0 < wall < 1e15


def test_exponent_of_a_power_law() -> None:
    sizes = [1.0, 2.0, 4.0, 16.0]
    assert growth.exponent(sizes, [3 * s**1.5 for s in sizes]) == pytest.approx(1.5)
    assert growth.exponent(sizes, [7.0] * 4) == pytest.approx(0)


def nothing(scale: Scale) -> dict[str, Any]:
    return {}


def figures(seconds: float, above: float, losses: list[float]) -> dict[str, Any]:
    return {
        "seconds": [seconds, 9 * seconds, seconds],
        "cpu_seconds": [2 * seconds, seconds, 4 * seconds],
        "above_mb": above,
        "loaded_mb": 1.0,
        "losses": losses,
        "cores_of_others": 0.0,
        "tokens": 100.0,
    }


CASES = [
    Case("ours", "ours", "w", nothing, base=True),
    Case("theirs", "theirs", "w", nothing, slow=True),
    Case("gone", "gone", "w", nothing),
]
MEASURED = [
    Measured("w", "ours", 0, figures(1.0, 10.0, [0.5, 0.4])),
    Measured("w", "ours", 1, figures(3.0, 30.0, [0.5, 0.4])),
    Measured("w", "theirs", 0, figures(8.0, 100.0, [0.5, 0.4 + 1e-6])),
    Measured("w", "gone", 0, {"failed": "Traceback\nOSError: no such thing"}),
]


def test_medians_and_ratios_to_the_base() -> None:
    mine, theirs, gone = rows(CASES, MEASURED)
    assert (mine.seconds, mine.low, mine.high, mine.cpu_seconds, mine.above_mb) == (2.0, 1.0, 3.0, 4.0, 20.0)
    assert mine.tokens_per_second == 50
    assert (theirs.seconds_ratio, theirs.cpu_ratio, theirs.memory_ratio) == (4.0, 4.0, 5.0)
    assert (mine.least_cpu, theirs.least_ratio) == (1.0, 8.0)
    assert theirs.loss_difference == pytest.approx(1e-6, rel=1e-3)
    assert gone.failed == "OSError: no such thing" and math.isnan(gone.seconds)


def test_targets_of_a_comparison() -> None:
    summary = comparison("part", rows(CASES, MEASURED), [Wanted("w", "theirs", 3.9, 0.19), Wanted("w", "gone", 2.0)])
    speed, memory, unknown = summary.targets
    assert (speed.measured, speed.met) == (4.0, True)
    assert (memory.measured, memory.met) == (0.2, False)
    assert unknown.met is None
    assert [p for p in summary.problems if "OSError" in p] == summary.problems
    assert "4.00×" in summary.table[3] and "**failed**" in summary.table[4]
    shown = target_lines(summary.targets)
    assert [line.split("|")[-2].strip() for line in shown[2:]] == ["met", "**missed**", "not measured"]


@pytest.mark.parametrize(("loss", "same"), [(0.4 + 2e-4, False), (0.4 + 5e-5, True), (math.nan, False)])
def test_other_losses_are_other_work(loss: float, same: bool) -> None:
    measured = [*MEASURED[:2], Measured("w", "theirs", 0, figures(8.0, 100.0, [0.5, loss]))]
    problems = comparison("part", rows(CASES, measured), []).problems
    assert ("NOT THE SAME WORK" in "".join(problems)) is not same


def test_a_large_loss_may_differ_in_proportion() -> None:
    measured = [
        Measured("w", key, 0, figures(1.0, 1.0, [value])) for key, value in (("ours", 200.0), ("theirs", 200.01))
    ]
    assert not comparison("part", rows(CASES[:2], measured), []).problems


def test_slow_cases_are_measured_in_the_first_round_alone() -> None:
    part = replace(PARTS["dpo"], cases=lambda _: CASES)
    problems: list[str] = []
    plan = study._plan(part, Scale("small", ""), 3, problems)
    assert [(repeat, case.key) for repeat, case in plan] == [
        *((0, "ours"), (0, "theirs"), (0, "gone")),
        *((1, "ours"), (1, "gone")),
        *((2, "ours"), (2, "gone")),
    ]
    assert not problems


def test_what_is_not_installed_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PPO_PYTHON", Path("/nowhere/bin/python"))
    problems: list[str] = []
    plan = study._plan(PARTS["ppo"], Scale("small", ""), 1, problems)
    assert [case.key for _, case in plan] == ["ours", "own"]
    assert len(problems) == 1 and "make peers-ppo" in problems[0]


def test_every_part_has_one_base_to_divide_by() -> None:
    for sizes in (scale(True, "cpu", "21m", Path("f"), 1, None), scale(False, "cuda", "1b", Path("f"), 2, 5)):
        for part in PARTS.values():
            cases = part.cases(sizes)
            assert len({(c.work, c.key) for c in cases}) == len(cases)
            for work in {c.work for c in cases}:
                assert sum(c.base for c in cases if c.work == work) <= 1


def test_no_length_is_beyond_the_positions_of_the_model() -> None:
    sizes = scale(False, "cuda", "1b", Path("f"), 2, None)
    _, responses, prompt, length = sizes.growth
    assert responses > 1 and max(16 * prompt + length, prompt + 16 * length, max(sizes.prompts)) < 8192


def test_guard_tells_what_has_fallen() -> None:
    targets = [
        {"part": "dpo", "quantity": "speed", "measured": 9.0, "least": 8.0, "key": "a"},
        {"part": "dpo", "quantity": "memory", "measured": 0.25, "least": None, "key": "b"},
        {"part": "startup", "quantity": "seconds", "measured": 1.0, "least": None, "key": "c"},
    ]
    now = guard.ratios({"targets": targets, "parts": {}})
    assert now == {"a": 8.0, "b": 4.0}
    assert not guard.fallen(now, {"a": 8.0 / 0.66, "b": 1.0})
    wrong = guard.fallen(now, {"a": 8.0 / 0.64, "d": 1.0})
    assert set(wrong) == {"a", "d"} and "fallen by 36 %" in wrong["a"]


def test_recorded_ratios_are_those_of_the_small_study() -> None:
    import json

    recorded = json.loads((Path(study.__file__).parent / "guard.json").read_text())["ratios"]
    sizes = scale(True, "cpu", "21m", Path("f"), 1, None)
    known = set()
    for part in (PARTS[name] for name in guard.PARTS):
        cases = part.cases(sizes)
        failed = [Measured(case.work, case.key, 0, {"failed": "not measured"}) for case in cases]
        known |= {target.key for target in part.summarise(sizes, cases, failed).targets}
    assert {name for name in recorded if not name.startswith("ablation")} == known


def test_tables_go_to_their_place_in_the_readme() -> None:
    readme = (Path(study.__file__).parent / "README.md").read_text()
    once = study.inserted(readme, "| a table |")
    assert study.inserted(once, "| a table |") == once
    assert once.index("## What was found") < once.index("| a table |") < once.index("## Notes")
    with pytest.raises(SystemExit, match="no place"):
        study.inserted("nothing here", "x")


def test_figures_without_a_value_are_null_in_json() -> None:
    assert '"a": null' in study._json({"a": math.nan, "b": [1.0, (math.inf,)]})


def test_text_becomes_the_ids_that_it_was_made_from(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model_folder(tmp_path, replace(SHAPE, vocabulary=50))))
    ids = Words(50, seed=3).ids(40)
    assert tokenizer(text_of([*ids, END]))["input_ids"] == ids


def test_pairs_are_the_same_each_time_and_within_their_lengths() -> None:
    sizes = scale(True, "cpu", "21m", Path("f"), 1, 2)
    batches = pair_batches(sizes, 9)
    assert batches == pair_batches(sizes, 9) and len(batches) == 3
    for pair in batches[0]:
        assert len(pair["prompt"]) == 9 and pair["chosen"][-1] == END
        assert 16 <= len(pair["rejected"]) <= sizes.response


def test_step_n_of_the_loop_draws_batch_n() -> None:
    from alignlab.training.order import Shuffled

    batches = [[Group([10 * i + k]) for k in range(4)] for i in range(3)]
    placed = ours.placed(batches, seed=7)
    order = Shuffled(range(12), 4, 7)
    assert [[placed[i] for i in order.batch(n)] for n in range(3)] == batches


def test_lengths_far_apart_are_within_their_bounds_and_mostly_short() -> None:
    sizes = Scale("full", "")
    lengths = rollout.skewed_lengths(sizes)
    count, _, low, high = sizes.skewed
    assert len(lengths) == count and min(lengths) >= low and max(lengths) == high
    assert sum(lengths) / count < (low + high) / 2 * 0.75


def test_generate_ends_each_row_where_it_should(tmp_path: Path) -> None:
    from measuring.generate import policy, sample

    sizes = Scale("small", str(tmp_path), model=Shape(50, 16, 1, 2, 2, 16))
    network = policy(sizes)
    lengths = [3, 1, 7]
    drawn = sample(network, [[5, 6], [7, 8], [9, 9]], 7, ends=lengths)
    assert [len(ids) for ids in drawn] == lengths
    assert all(ids[-1] == END and END not in ids[:-1] for ids in drawn)


def test_both_sides_get_the_same_adapter() -> None:
    """By the module's name, whatever is around it."""

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"self_attn": torch.nn.ModuleDict({})})])
            self.layers[0]["self_attn"]["q_proj"] = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(3, 2, bias=False)})
            self.layers[0]["self_attn"]["k_proj"] = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(3, 2, bias=False)})

    inner, wrapped = Layer(), torch.nn.ModuleDict({"base_model": Layer()})
    set_trained(inner)
    set_trained(wrapped)
    mine, theirs = list(inner.parameters()), list(wrapped.parameters())
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert not torch.equal(mine[0], mine[1])


def test_the_gauge_sees_memory_and_leaves_out_the_first_step() -> None:
    watch = gauge.Gauge()
    watch.loaded()
    for loss in (3.0, 2.0, 1.0):
        held = torch.ones(20_000_000)
        del held
        watch.step(loss)
    found = watch.result(layout="packed")
    assert 75 < found["above_mb"] < 110  # 80 MB, and what else the process may do
    assert len(found["seconds"]) == 2 and found["losses"] == [3.0, 2.0, 1.0] and found["layout"] == "packed"


def test_a_measurement_is_a_process_of_its_own(tmp_path: Path) -> None:
    sizes = scale(True, "cpu", "21m", tmp_path, 1, None)
    assert processes.measure(Case("k", "label", "w", describe), sizes) == describe(sizes)
    with pytest.raises(Failed, match=r"(?s)label: ended with status 1.*TypeError"):
        processes.measure(Case("k", "label", "w", describe, {"nonsense": 1}), sizes)


def test_a_target_is_missed_on_the_wrong_side() -> None:
    assert Target("p", "w", "a", "seconds", 8.0, 8.1, at_least=False).met is False
    assert Target("p", "w", "a", "speed", 8.0, 8.1).met is True
