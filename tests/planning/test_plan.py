"""`alignlab plan` as a user meets it: any run can be planned, what it recommends can be run, mistakes are one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignlab.cli import main
from alignlab.config import compose, resolve
from alignlab.planning import PlanSettings, plan
from alignlab.planning.memory import GB, MODES
from alignlab.planning.run import PlannedRun, Variant
from alignlab.planning.search import COUNTS, choices, variants
from alignlab.training.run_config import check
from tests import tiny
from tests.training import runs

SHORT = ["prompt_tokens=9", "response_tokens=6", "training.batch_size=4", "training.max_tokens_per_microbatch=64"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config and a tokenizer; a plan needs no weights."""
    folder = tiny.save(tmp_path_factory.mktemp("plan") / "base")
    (folder / "model.safetensors").unlink()
    return folder


def composed(base: Path, *words: str, algorithm: str = "sft") -> dict[str, Any]:
    return resolve(compose("plan", [f"model={base}", *runs.ALGORITHMS[algorithm], *SHORT, *words]))


def planned(base: Path, *words: str, algorithm: str = "sft") -> PlannedRun:
    return PlannedRun(composed(base, *words, algorithm=algorithm), on_cpu=False)


@pytest.mark.parametrize("algorithm", sorted(set(runs.ALGORITHMS) - set(runs.ONE_OF_EACH)))
def test_every_algorithm_can_be_planned(base: Path, algorithm: str) -> None:
    """As it is asked for; those that have between them all that needs memory, in every other way too, below."""
    run = planned(base, algorithm=algorithm)
    assert {choice.mode for choice in choices(run, run.asked) if choice.memory.total > 0} == set(MODES)


@pytest.mark.parametrize("algorithm", runs.ONE_OF_EACH)
def test_every_kind_of_algorithm_in_every_mode_full_and_with_an_adapter(base: Path, algorithm: str) -> None:
    run = planned(base, algorithm=algorithm)
    seen = set()
    for variant in variants(run):
        per_mode: dict[str, list[float]] = {}
        for choice in choices(run, variant):
            assert choice.memory.total > 0
            seen.add((run.name(variant), choice.mode))
            per_mode.setdefault(choice.mode, []).append(choice.memory.total)
        for mode, totals in per_mode.items():
            several = totals[1:] if mode == "zero3_offload" else totals  # NCCL comes with the second device
            assert several == sorted(several, reverse=True), f"{mode}: more devices need more"
    assert seen == {(kind, mode) for kind in ("full", "LoRA", "QLoRA") for mode in MODES}


def test_what_a_run_has_shows(base: Path) -> None:
    """A reference copy without adapters, a critic of its own, longer rows, recomputed activations, sampling."""

    def total(*words: str, algorithm: str = "sft") -> float:
        run = planned(base, *words, algorithm=algorithm)
        return run.memory(run.asked, run.checked.distributed.mode, run.devices).total

    plain = total()
    assert total("algorithm=dpo", algorithm="dpo") > plain
    assert total("algorithm.critic=own", algorithm="ppo") > total(algorithm="ppo")
    assert total("training.max_tokens_per_microbatch=128", "training.batch_size=64") > plain
    assert total("optimizer=sgd") < plain
    assert total("model.dtype=bfloat16") == plain, "trained weights are float32 whatever they were loaded in"
    assert total("model.dtype=bfloat16", "training.mixed_precision=pure") < plain
    assert total("training.mixed_precision=no") > plain, "activations in float32"
    online = planned(base, algorithm="ppo")
    assert online.needs(online.asked).cache > 0


def test_a_model_that_scores_is_counted(base: Path) -> None:
    """Twice in a mixture of two; without its language head, in float32."""
    config = tiny.network("llama", "score")
    weights = sum(p.nbytes for p in config.parameters())
    one = ["scoring=reward_model", f"scoring.path={base}"]
    online = ["algorithm=ppo", "data=prompts", "source=rollout", *one]
    run = PlannedRun(resolve(compose("plan", [f"model={base}", *online, *SHORT])), on_cpu=False)
    assert run.scorers == weights
    assert run.memory(run.asked, "single", 1).held["scorers"] == weights


def test_the_table_is_80_wide_and_what_it_recommends_can_be_run(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"model={base}", "algorithm=dpo", "data=preferences", "adapter=lora", "adapter.r=8", "gpu=24", *SHORT]
    assert main(["plan", *words]) == 0
    out = capsys.readouterr().out
    command = next(line.strip() for line in out.splitlines() if line.startswith("  alignlab train"))
    assert all(len(line) <= 80 for line in out.splitlines() if "alignlab train" not in line)
    for mode in MODES:
        assert mode in out
    again = check(resolve(compose("train", command.split()[2:])))
    assert (again.distributed.mode, again.adapter.r, again.training.max_tokens_per_microbatch) == ("single", 8, 64)


def test_json_says_the_same(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"model={base}", "gpu=a100", "--json", *SHORT]) == 0
    found = json.loads(capsys.readouterr().out)
    memory = found["memory"]
    phases = {k: sum(v.values()) for k, v in memory["phases"].items()}
    assert memory["total"] == pytest.approx(sum(memory["held"].values()) + memory["overhead"] + max(phases.values()))
    assert phases[memory["peak"]] == max(phases.values())
    assert [r["mode"] for r in found["fits"][: len(MODES)]] == list(MODES)
    assert found["cheapest"]["fits_as_asked"] and found["cheapest"]["devices"] == 1 and found["counts"] == list(COUNTS)
    assert found["speed"]["tokens_per_second_per_device"]["trained"] > 0


def test_what_does_not_fit_says_what_would(base: Path) -> None:
    """0.9 GB hold the framework and this tiny model, but not 40 rows at once; half a GB not even the framework."""
    wide = [
        "prompt_tokens=400",
        "response_tokens=200",
        "training.batch_size=40",
        "training.max_tokens_per_microbatch=24000",
    ]
    found = plan(composed(base, *wide, "gpu=0.9"), [f"model={base}", "algorithm=sft", *wide, "gpu=0.9"])
    assert not found["cheapest"]["fits_as_asked"] and not found["memory"]["fits"]
    assert "training.max_tokens_per_microbatch=600" in found["cheapest"]["command"]
    assert "gpu=" not in found["cheapest"]["command"]
    nothing = plan(composed(base, "gpu=0.5"), [])["cheapest"]
    assert "command" not in nothing
    assert any("Nor does anything else" in line for line in nothing["lines"])


QLORA = [
    *("model=llama-65b", "model.dtype=bfloat16", "model.gradient_checkpointing=true", "adapter=lora", "adapter.r=64"),
    *("quantization=nf4", "quantization.compute_dtype=bfloat16", "optimizer=paged_adamw", "data=demonstrations"),
    *("training.max_tokens_per_microbatch=512", "prompt_tokens=256", "response_tokens=256"),
]
"""The setting of Dettmers et al. 2023 (arXiv:2305.14314), appendix B: adapters of rank 64 on all linear maps, double
quantisation, paged AdamW in 32 bits, activations recomputed; one sequence of 512 tokens at a time."""


def test_qlora_s_published_case() -> None:
    """Section 1: 65B needs "more than 780 GB" in 16 bits (12 bytes a parameter: 2 for the weight, 2 for its gradient, 8
    for Adam), "less than 48 GB" with QLoRA."""
    run = PlannedRun(resolve(compose("plan", QLORA)), on_cpu=False)
    in_16_bits = PlannedRun(resolve(compose("plan", [*QLORA, "training.mixed_precision=pure"])), on_cpu=False)
    whole = in_16_bits.needs(Variant("none", "none", True))
    assert 780 < (2 * whole.trained_weights + 8 * whole.trained) / GB < 800
    memory = run.memory(run.asked, "single", 1)
    assert 33 < (memory.total - memory.paged) / GB < 48
    assert memory.paged == pytest.approx(8 * 65.28e9 * 0.0122, rel=0.05)


def test_optimisers_that_zero_refuses_are_not_offered(base: Path) -> None:
    run = planned(base, "optimizer=adafactor")
    assert {c.mode for c in choices(run, run.asked)} == {"single", "ddp", "fsdp"}


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=lama-7b"], "model.path='lama-7b': there is no such folder; did you mean 'llama-7b'?"),
        (["model=no/such/folder"], "model.path='no/such/folder': there is no such folder"),
        (
            ["model=llama-7b", "gpu=h300"],
            "gpu=h300: not known: give its memory in GB, as in gpu=24; did you mean 'h200'?",
        ),
        (["model=llama-7b", "algoritm=sft"], "algoritm: unknown key; did you mean 'algorithm'?"),
        (["model=llama-7b", "prompt_tokens=0"], "prompt_tokens=0"),
        (["model=llama-7b", "quantization=nf4"], "quantization=nf4"),
        (["model=llama-7b", "distributed=zero4"], "distributed=zero4"),
        (["model=llama-7b", "algorithm=ppo", "source=rollout"], "scoring: PPO needs the column 'reward'"),
        ([], "model.path: must be given"),
        (["model=llama-7b", "--jsn"], "--jsn: unknown option"),
    ],
)
def test_mistakes(words: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"alignlab: {message}") and said.count("\n") == 1


def test_help_names_the_groups_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    out = capsys.readouterr().out
    assert "distributed" in out and "quantization" in out and "peak_tflops" in out


def test_the_config_gives_the_class_s_own_defaults(base: Path) -> None:
    config = resolve(compose("plan", [f"model={base}"]))
    assert PlanSettings(**{k: config[k] for k in PlanSettings.model_fields}) == PlanSettings()
