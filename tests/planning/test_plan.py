"""`alignlab plan` as a user meets it: any run can be planned, what it recommends can be run, mistakes are one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignlab.cli import main
from alignlab.config import compose, resolve
from alignlab.core import ConfigError
from alignlab.planning import plan
from alignlab.planning.devices import KNOWN, find_device, speed
from alignlab.planning.fit import COUNTS, choices, variants
from alignlab.planning.memory import MODES
from alignlab.planning.published import published_case
from alignlab.planning.settings import PlanSettings
from alignlab.planning.study import Study
from alignlab.training.run import check
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


def study(base: Path, *words: str, algorithm: str = "sft") -> Study:
    config = composed(base, *words, algorithm=algorithm)
    settings = PlanSettings(**{k: config[k] for k in PlanSettings.model_fields})
    return Study(check(config), config["optimizer"], settings, on_cpu=False)


@pytest.mark.parametrize("algorithm", sorted(runs.ALGORITHMS))
def test_every_algorithm_in_every_mode_full_and_with_an_adapter(base: Path, algorithm: str) -> None:
    run = study(base, algorithm=algorithm)
    seen = set()
    for variant in variants(run):
        per_mode: dict[str, list[float]] = {}
        for choice in choices(run, variant):
            assert choice.memory.total > 0
            seen.add((variant.name, choice.mode))
            per_mode.setdefault(choice.mode, []).append(choice.memory.total)
        for mode, totals in per_mode.items():
            several = totals[1:] if mode == "zero3_offload" else totals  # NCCL comes with the second device
            assert several == sorted(several, reverse=True), f"{mode}: more devices need more"
    assert seen == {(kind, mode) for kind in ("full", "LoRA", "QLoRA") for mode in MODES}


def test_what_a_run_has_shows(base: Path) -> None:
    """A reference copy without adapters, a critic of its own, longer rows, recomputed activations, sampling."""

    def total(*words: str, algorithm: str = "sft") -> float:
        run = study(base, *words, algorithm=algorithm)
        return run.memory(run.asked, run.checked.distributed.mode, run.asked_devices).total

    plain = total()
    assert total("algorithm=dpo", algorithm="dpo") > plain
    assert total("algorithm.critic=own", algorithm="ppo") > total(algorithm="ppo")
    assert total("training.max_tokens_per_microbatch=128", "training.batch_size=64") > plain
    assert total("optimizer=sgd") < plain
    assert total("model.dtype=bfloat16") < plain
    assert study(base, algorithm="ppo").needs(study(base, algorithm="ppo").asked).generation is not None


def test_a_model_that_scores_is_counted(base: Path) -> None:
    """Twice in a mixture of two; without its language head, in float32."""
    config = tiny.network("llama", "score")
    weights = sum(p.nbytes for p in config.parameters())
    one = ["scoring=reward_model", f"scoring.path={base}"]
    online = ["algorithm=ppo", "data=prompts", "source=rollout", *one]
    settings = resolve(compose("plan", [f"model={base}", *online, *SHORT]))
    run = Study(check(settings), settings["optimizer"], PlanSettings(), on_cpu=False)
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
    assert found["cheapest"]["asked"]["devices"] == 1 and found["counts"] == list(COUNTS)
    assert found["speed"]["tokens_per_second_per_device"]["trained"] > 0


def test_what_does_not_fit_says_what_would(base: Path) -> None:
    """0.9 GB hold the framework and this tiny model, but not 400 rows at once; half a GB not even the framework."""
    wide = [
        "prompt_tokens=40",
        "response_tokens=20",
        "training.batch_size=400",
        "training.max_tokens_per_microbatch=24000",
    ]
    found = plan(composed(base, *wide, "gpu=0.9"), [f"model={base}", "algorithm=sft", *wide, "gpu=0.9"])
    assert found["cheapest"]["asked"] is None and not found["memory"]["fits"]
    assert "training.max_tokens_per_microbatch=60" in found["cheapest"]["instead"]["command"]
    assert "gpu=" not in found["cheapest"]["instead"]["command"]
    should_prune = plan(composed(base, "gpu=0.5"), [])["cheapest"]
    assert should_prune["asked"] is should_prune["any"] is should_prune["instead"] is None
    assert any("Nor does anything else" in line for line in should_prune["lines"])


def test_qlora_s_published_case() -> None:
    """Dettmers et al. 2023, section 1: 65B needs more than 780 GB in 16 bits, less than 48 GB with QLoRA."""
    found = published_case()
    assert 780 < found["full_gb"] < 800
    assert 33 < found["qlora_gb"] - found["paged_gb"] < 48
    assert found["paged_gb"] == pytest.approx(8 * 65.28e9 * 0.0122 / 1e9, rel=0.05)


def test_optimisers_that_zero_refuses_are_not_offered(base: Path) -> None:
    run = study(base, "optimizer=adafactor")
    assert {c.mode for c in choices(run, run.asked)} == {"single", "ddp", "fsdp"}


# ------------------------------------------------------------------ devices and speed


def test_devices() -> None:
    assert find_device("H100") == KNOWN["h100"] and find_device("a100-80gb") == KNOWN["a100"]
    assert find_device(24).memory == 24e9 and find_device("40gb").memory == 40e9
    assert find_device("cpu").name == "cpu"
    for wrong in ("h300", -3, 0, "inf"):
        with pytest.raises(ConfigError, match="gpu="):
            find_device(wrong)


def test_speed_by_hand() -> None:
    """6 operations a parameter and token, 4 with an adapter, 2 more for a reference or recomputing; sampling reads the
    weights once for all rows."""
    a100 = KNOWN["a100"]
    full = speed(a100, 7e9, 7e9, 14e9, checkpointing=False, reference=False, rows=4)
    assert full.trained == pytest.approx(0.4 * 312e12 / (6 * 7e9))
    assert full.sampled == pytest.approx(4 * 0.4 * 2.039e12 / 14e9)
    assert speed(a100, 7e9, 0, 14e9, checkpointing=False, reference=False).operations == 4 * 7e9
    assert speed(a100, 7e9, 7e9, 14e9, checkpointing=True, reference=True).operations == 10 * 7e9
    many = speed(a100, 7e9, 7e9, 14e9, checkpointing=False, reference=False, rows=10**6)
    assert many.sampled == pytest.approx(0.4 * 312e12 / (2 * 7e9))
    assert speed(find_device(24), 7e9, 7e9, 14e9, checkpointing=False, reference=False, rows=4).trained is None


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
