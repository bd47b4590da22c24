"""A callback, a schedule, an order of the records and a tracker of the user's: one file and one config each."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from alignlab.cli import main
from alignlab.training.callbacks.progress import ProgressDisplay
from tests.training import runs

CALLBACK = '''
"""Stops a run once its loss is good enough."""

from alignlab import Callback


class StopAtLoss(Callback):
    def __init__(self, below: float):
        self.below = below

    def on_step(self, trainer):
        if trainer.metrics["loss"] < self.below:
            trainer.request_stop(f"the loss is below {self.below}")
'''

PATIENT = '''
"""Ends a run after so many rises of the loss, over all its sessions: what it has counted goes into checkpoints."""

import json

from alignlab import Callback


class StopAfterRises(Callback):
    def __init__(self, rises: int):
        self.rises, self.seen, self.last = rises, 0, None

    def on_step(self, trainer):
        loss = trainer.metrics["loss"]
        self.seen += self.last is not None and loss > self.last
        self.last = loss
        if self.seen >= self.rises:
            trainer.request_stop(f"the loss rose {self.seen} times")

    def on_checkpoint(self, trainer, folder):
        if trainer.processes.is_main:
            (folder / "rises.json").write_text(json.dumps([self.seen, self.last]))

    def on_resume(self, trainer, folder):
        self.seen, self.last = json.loads((folder / "rises.json").read_text())
'''

SCHEDULE = '''
"""Inverse square root, as in "Attention Is All You Need" (Vaswani et al. 2017, arXiv:1706.03762)."""


class InverseSquareRoot:
    def __init__(self, warmup: float = 0.1):
        self.warmup = warmup

    def __call__(self, done: float) -> float:
        return min(1.0, (self.warmup / done) ** 0.5) if done else 1.0
'''

ORDER = '''
"""A curriculum: prompts whose samples got the lowest rewards come again first."""


class HardestFirst:
    def __init__(self, groups, batch_size: int, seed: int, start: float = 0.0):
        self.batch_size, self.rewards = batch_size, [start] * len(groups)
        self.batches_per_epoch = -(-len(groups) // batch_size)

    def batch(self, index):
        order = sorted(range(len(self.rewards)), key=lambda i: (self.rewards[i], i))
        return order[: self.batch_size]

    def observe(self, index, records, groups):
        for record, group in zip(records, groups):
            rewards = [r.columns["reward"] for r in group.responses]
            self.rewards[record] = sum(rewards) / len(rewards)

    @property
    def state(self):
        return {"rewards": self.rewards}

    @state.setter
    def state(self, state):
        self.rewards = list(state["rewards"])
'''

TRACKER = '''
"""Metrics as lines of a table."""

from pathlib import Path


class Table:
    def __init__(self, name: str = "table.tsv"):
        self.name = name

    def start(self, folder, config, lines):
        self.path = Path(folder) / self.name
        self.path.write_text(f"# {config['name']}\\n")
        return 0  # it is told all lines again

    def log(self, step, metrics):
        with self.path.open("a") as file:
            file.write(f"{step}\\t{metrics['loss']}\\n")

    def summarize(self, metrics): ...

    def finish(self, failed):
        with self.path.open("a") as file:
            file.write("failed\\n" if failed else "finished\\n")
'''

FILES = {
    "modules/good_enough.py": CALLBACK,
    "modules/patient.py": PATIENT,
    "modules/square_root.py": SCHEDULE,
    "modules/curriculum.py": ORDER,
    "modules/table.py": TRACKER,
    "configs/schedule/inverse_square_root.yaml": "_target_: square_root.InverseSquareRoot\nwarmup: 0.25\n",
    "configs/order/hardest_first.yaml": "_target_: curriculum.HardestFirst\nstart: -1.0\n",
    "configs/tracker/table.yaml": "_target_: table.Table\nname: losses.tsv\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    made = tmp_path_factory.mktemp("parts")
    runs.prepare(made)
    for name, text in FILES.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(made / "modules")
        yield made


def train(folder: Path, algorithm: str, out: str, *more: str) -> int:
    options = ["--config-dir", str(folder / "configs")]
    return main(["train", *options, *runs.words_for(folder, algorithm, out, "training.progress=off", *more)])


def test_a_callback_stops_a_run(folder: Path) -> None:
    train(folder, "sft", "plain")
    losses = [line["loss"] for line in runs.metrics(folder, "plain")]
    below = losses[2] + 1e-6
    first = next(i for i, loss in enumerate(losses, start=1) if loss < below)
    named = ["callbacks.good._target_=good_enough.StopAtLoss", f"callbacks.good.below={below}"]
    assert train(folder, "sft", "stopped", *named) == 0
    assert [line["loss"] for line in runs.metrics(folder, "stopped")] == losses[:first]
    assert json.loads((folder / "stopped" / "result.json").read_text())["step"] == first


def test_a_callback_keeps_what_it_counted_over_a_resume(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = ["callbacks.patient._target_=patient.StopAfterRises", "callbacks.patient.rises=3", "training.steps=40"]
    assert train(folder, "sft", "patient", *named) == 0
    losses = [line["loss"] for line in runs.metrics(folder, "patient")]
    rises = [i for i in range(1, len(losses)) if losses[i] > losses[i - 1]]
    assert len(rises) == 3 and rises[-1] == len(losses) - 1 < 39

    with monkeypatch.context() as patch:
        stop = runs.StopAfter(rises[0] + 1)  # the first rise is seen before, the others after
        patch.setattr(ProgressDisplay, "update", lambda self, step, metrics: stop(step, metrics))
        assert train(folder, "sft", "patient_resumed", *named) == 143
    assert train(folder, "sft", "patient_resumed", *named) == 0
    assert [line["loss"] for line in runs.metrics(folder, "patient_resumed")] == losses


def test_a_schedule_sets_the_learning_rate(folder: Path) -> None:
    assert train(folder, "sft", "root", "schedule=inverse_square_root", "optimizer.lr=0.01", "training.steps=4") == 0
    expected = [1.0, 1.0, math.sqrt(0.25 / 0.5), math.sqrt(0.25 / 0.75)]
    assert [line["lr"] for line in runs.metrics(folder, "root")] == pytest.approx([0.01 * f for f in expected])


def prompts_of(folder: Path, out: str) -> list[list[str]]:
    """The prompts of each iteration that samples.jsonl shows."""
    found: dict[int, dict[str, None]] = {}
    for line in (folder / out / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        found.setdefault(sample["iteration"], {})[sample["prompt"]] = None
    return [list(found[i]) for i in sorted(found)]


def test_a_curriculum_goes_by_the_last_rewards_and_survives_a_resume(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["order=hardest_first", "source.group_size=2", "training.batch_size=2", "training.steps=8"]
    assert train(folder, "rloo", "curriculum", *more) == 0
    seen = prompts_of(folder, "curriculum")
    records = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    # Every record starts below any reward: the first iterations go through them in order, two at a time.
    assert seen[:6] == [records[2 * i : 2 * i + 2] for i in range(6)]
    rewards: dict[str, list[float]] = {}
    for line in (folder / "curriculum" / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        if sample["iteration"] <= 6:
            rewards.setdefault(sample["prompt"], []).append(sample["reward"])
    ranked = sorted(records, key=lambda p: (sum(rewards[p]) / len(rewards[p]), records.index(p)))
    assert seen[6] == ranked[:2]

    with monkeypatch.context() as patch:
        stop = runs.StopAfter(3)
        patch.setattr(ProgressDisplay, "update", lambda self, step, metrics: stop(step, metrics))
        assert train(folder, "rloo", "resumed", *more) == 143
    assert train(folder, "rloo", "resumed", *more) == 0
    assert runs.identical(runs.weights(folder, "curriculum"), runs.weights(folder, "resumed"))
    assert prompts_of(folder, "resumed") == seen


def test_a_tracker_is_told_every_line(folder: Path) -> None:
    assert train(folder, "sft", "tracked", "tracker=table", "name=mine") == 0
    lines = (folder / "tracked" / "losses.tsv").read_text().splitlines()
    logged = runs.metrics(folder, "tracked")
    assert lines == ["# mine", *(f"{line['step']}\t{line['loss']}" for line in logged), "finished"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "callbacks.bad._target_=square_root.InverseSquareRoot",
            r"callbacks\.bad\._target_.*not a Callback: it has no on_",
        ),
        ("tracker._target_=good_enough.StopAtLoss", r"not a Tracker: it has no finish, log, start, summarize"),
        ("tracker._target_=square_root.InverseSquareRoot", r"not a Tracker: it has no finish, log, start, summarize"),
    ],
)
def test_what_a_part_lacks_is_named(
    folder: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    assert train(folder, "sft", "refused", override) == 2
    assert re.search(message, capsys.readouterr().err)
