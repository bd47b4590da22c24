"""A benchmark of the user's own: one file that inherits from nothing of ours, and one config."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from alignlab.benchmarks import Benchmark
from alignlab.benchmarks.evaluate import build_benchmark
from alignlab.benchmarks.exact import ExactWorld, ExactWorldSettings
from alignlab.benchmarks.exact.base_model import BaseModelSettings, base_model
from alignlab.cli import main
from alignlab.core import ConfigError, HasReward, TrainingBenchmark
from tests.comparison.conftest import home  # noqa: F401
from tests.comparison.small import compare, write

FILE = '''
"""How often a policy writes a word."""

import json

from alignlab.core import Group

PROMPTS = ["the the", "the fox", "the sees", "the a"]


class Mentions:
    name = "mentions"
    files = ("demonstrations", "prompts")

    def __init__(self, word):
        self.word = word

    def write_data(self, folder, model):
        demonstrations = [{"prompt": p, "completion": f" {self.word} {self.word}"} for p in PROMPTS * 8]
        for name, records in (("demonstrations", demonstrations), ("prompts", [{"prompt": p} for p in PROMPTS])):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\\n" for r in records))

    def evaluate(self, subject):
        tokenizer = subject.policy.tokenizer
        prompts = [Group(tokenizer(p)["input_ids"], [], f"prompt {i}", p) for i, p in enumerate(PROMPTS)]
        answers = subject.answers(prompts)
        counts = [group.responses[0].text.split().count(self.word) for group in answers]
        with subject.reference() as reference:
            pairs = zip(subject.log_probs(subject.policy, answers), subject.log_probs(reference, answers))
            kl = sum(logp - ref_logp for logp, ref_logp in pairs) / len(answers)
        return {"reward": sum(counts) / len(counts), "kl": kl, "reward_per_prompt": counts}
'''

CONFIG = """
_target_: my_benchmark.Mentions
word: fox
"""

SFT = ["algorithm=sft", "data=demonstrations", "data.path={demonstrations}"]
EXPERIMENT: dict[str, Any] = {
    "defaults": [{"override /benchmark": "mentions"}],
    "name": "mine",
    "model": {"dtype": "float32"},
    "rollout": {"max_new_tokens": 3},
    "comparison": {
        "seeds": [0, 1],
        "budget": {"steps": 4},
        "common": ["training.progress=plain", "training.batch_size=8", "optimizer.lr=1e-2"],
        "sft": SFT,
        "pairs": None,
        "reward_model": None,
        "algorithms": {"more": SFT},
    },
}


@pytest.fixture
def place(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """A folder with the user's file, config and experiment, and a model that knows five words."""
    (home / "my_benchmark.py").write_text(FILE)
    (home / "configs/benchmark").mkdir(parents=True, exist_ok=True)
    (home / "configs/benchmark/mentions.yaml").write_text(CONFIG)
    write(home, "mine", EXPERIMENT)
    monkeypatch.syspath_prepend(str(home))
    if not (home / "model").exists():
        world = ExactWorld(ExactWorldSettings(words=5, max_tokens=3, prompts=4))
        made = base_model(world, BaseModelSettings(layers=1, width=32, steps=30, batch_size=32), home / "made")
        shutil.copytree(made, home / "model")
    yield home
    sys.modules.pop("my_benchmark", None)


def evaluate(place: Path, *overrides: str) -> dict[str, Any]:
    model = f"{place}/model"
    words = [f"run={model}", f"reference={model}", f"out={place}/measured", "rollout.max_new_tokens=3", *overrides]
    assert main(["evaluate", "--config-dir", str(place / "configs"), "benchmark=mentions", *words]) == 0
    return dict(json.loads((place / "measured/evaluation.json").read_text()))


def test_alignlab_evaluate_measures_on_it(place: Path) -> None:
    found = evaluate(place)
    assert found["benchmark"] == "mentions" and found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["reward"] == sum(found["reward_per_prompt"]) / 4
    assert sum(evaluate(place, f"benchmark.word={word}")["reward"] for word in ("the", "fox", "sees", "a", "red")) > 0


def test_a_comparison_trains_on_its_data_and_ranks_by_it(place: Path) -> None:
    status, _ = compare(place, "mine", f"model.path={place}/model", experiment="mine")
    assert status == 0
    board = json.loads((place / "mine/leaderboard.json").read_text())
    assert board["benchmark"] == "mentions"
    rows = {row["algorithm"]: row for row in board["rows"]}
    assert rows.keys() == {"sft", "more"} and rows["more"]["seeds"] == [0, 1]
    assert rows["more"]["kl"] > 0 and rows["sft"]["kl"] == pytest.approx(0, abs=1e-6)
    assert "win_rate" not in rows["more"] or rows["more"]["win_rate"] is None  # it does not measure one
    assert "Alignment algorithms on mentions" in (place / "mine/report.html").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"pairs": {"rounds": 1}},
            "comparison.pairs: the benchmark 'mentions' has no reward to label them by: give null",
        ),
        ({"algorithms": {"a": [*SFT, "scoring={gold}"]}}, "'scoring={gold}': {gold} stands for nothing here"),
        ({"best_of": 4}, "comparison.best_of=4: the benchmark 'mentions' does not measure best-of-N sampling"),
    ],
)
def test_what_it_does_not_offer_is_said_where_it_is_asked_for(
    place: Path, capfd: pytest.CaptureFixture[str], more: dict[str, Any], message: str
) -> None:
    write(place, "more", EXPERIMENT | {"comparison": EXPERIMENT["comparison"] | more})
    assert compare(place, "more", f"model.path={place}/model", experiment="more")[0] == 2
    assert message in capfd.readouterr().err


def test_what_is_missing_is_said_in_one_line(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (place / "my_benchmark.py").write_text(FILE.replace("def evaluate", "def assess"))
    target = {"_target_": "my_benchmark.Mentions", "word": "fox"}
    with pytest.raises(
        ConfigError, match=r"^benchmark._target_=my_benchmark.Mentions: not a Benchmark: .* no evaluate$"
    ):
        build_benchmark(target)
    sys.modules.pop("my_benchmark")
    (place / "my_benchmark.py").write_text(FILE.replace("def write_data", "def write"))
    assert compare(place, "bad", f"model.path={place}/model", experiment="mine")[0] == 2
    said = capfd.readouterr().err
    assert "benchmark._target_=my_benchmark.Mentions: not a TrainingBenchmark: it has no write_data" in said


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[1.0]", "evaluate returned [1.0]; it must return metrics by name"),
        ("{'reward': object()}", "reward: evaluate"),
    ],
)
def test_what_is_no_metric_is_said(place: Path, capfd: pytest.CaptureFixture[str], returned: str, message: str) -> None:
    text = FILE[: FILE.index("        tokenizer")] + f"        return {returned}\n"
    (place / "my_benchmark.py").write_text(text)
    model = f"{place}/model"
    words = [f"run={model}", f"reference={model}", f"out={place}/measured"]
    assert main(["evaluate", "--config-dir", str(place / "configs"), "benchmark=mentions", *words]) != 0
    assert message in capfd.readouterr().err


def test_numbers_of_numpy_and_torch_are_numbers(place: Path) -> None:
    text = FILE[: FILE.index("        tokenizer")] + (
        "        import numpy, torch\n"
        "        return {'reward': numpy.float32(0.5), 'kl': torch.tensor(0.25), 'accuracy': float('nan'),\n"
        "                'reward_per_prompt': numpy.array([0.25, 0.75])}\n"
    )
    (place / "my_benchmark.py").write_text(text)
    found = evaluate(place)
    assert (found["reward"], found["kl"], found["accuracy"]) == (0.5, 0.25, None)
    assert found["reward_per_prompt"] == [0.25, 0.75]


def test_the_readmes_example_works_as_it_stands(place: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    found = re.search(r"```python\n# my_benchmark.py\n(.*?)```", readme, re.DOTALL)
    assert found is not None
    prompts = 'PROMPTS = ["Once upon a time", "The weather today"]'
    assert prompts in found[1]
    (place / "my_benchmark.py").write_text(found[1].replace(prompts, 'PROMPTS = ["the the", "the fox"]'))  # five words
    measured = evaluate(place)
    assert measured["benchmark"] == "mentions" and len(measured["reward_per_prompt"]) == 2
    assert measured.keys() >= {"reward", "kl", "win_rate", "response_length", "finished"}


def test_the_base_class_needs_a_name_and_evaluate_alone(tmp_path: Path) -> None:
    class Least(Benchmark):
        name = "least"

    least = Least()
    assert (least.files, least.base_model(), least.base_path(), least.supports_best_of) == ((), None, None, False)
    least.write_data(tmp_path, "")
    assert list(tmp_path.iterdir()) == []
    assert isinstance(least, TrainingBenchmark) and not isinstance(least, HasReward)
    with pytest.raises(NotImplementedError, match="Least does not define evaluate"):
        least.evaluate(None)  # type: ignore[arg-type]
