"""The batch templates without a Slurm: what their scripts decide, with stand-ins for srun and scontrol."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

import pytest

from alignlab.launch import start as starter
from tests.training import runs

FOLDER = Path(__file__).parents[2] / "slurm"
NAMES = ("one_gpu", "one_node", "many_nodes")
RUN, SIGNALS = "# ---- run\n", "# ---- stop, save, queue again"

JOB = "Requeue=1 JobState={} Reason=None Restarts=0"


def text(name: str) -> str:
    return (FOLDER / f"{name}.sbatch").read_text()


# ------------------------------------------------------------------ as they are written


def test_the_part_about_signals_is_the_same_in_all_three() -> None:
    parts = {text(name).split(SIGNALS)[1] for name in NAMES}
    assert len(parts) == 1
    for name in NAMES:
        assert text(name).count(RUN) == text(name).count(SIGNALS) == 1
        assert text(name).index(RUN) < text(name).index(SIGNALS)


@pytest.mark.parametrize("name", NAMES)
def test_the_body_needs_nothing_of_the_head_but_the_hooks(name: str) -> None:
    """Who changes the head need not read the rest."""
    body = text(name).split(RUN)[1]
    own = {"asked", "command", "first", "job", "preempted", "srun", "state", "status"}
    used = set(re.findall(r"\$\{?([A-Za-z_]\w*)", re.sub(r"#.*", "", body)))
    assert {v for v in used - own if not v.startswith("SLURM")} <= {"PREFIX", "PYTHON", "PROCESSES_PER_NODE", "SECONDS"}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_asked_of_slurm_is_explained(name: str) -> None:
    options = [line for line in text(name).splitlines() if line.startswith("#SBATCH")]
    plain = [line.split("  # ")[0].split()[1] for line in options if "  # " not in line]
    assert {o.split("=")[0] for o in plain} <= {"--job-name", "--nodes"}
    asked = {line.split()[1] for line in options}
    assert {"--signal=B:USR1@120", "--requeue", "--open-mode=append"} <= asked


# ------------------------------------------------------------------ what they decide


class Stage:
    """A folder with stand-ins: srun runs `step`, scontrol says `shown` of a job and writes down what it is asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = folder / "calls"
        self.write(
            "scontrol", f'echo "$*" >>{self.calls}; case "$*" in *"show job"*) echo "JobId=7 $SHOWN x=y" ;; esac'
        )
        self.write("srun", f'printf "%s\\n" "$@" >{folder}/srun.words; . {folder}/step')
        self.write("sleep", "exec /bin/sleep 0.05")

    def write(self, name: str, script: str) -> None:
        (self.folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (self.folder / name).chmod(0o755)

    def start(self, step: str, shown: str, name: str = "one_gpu", head: str = "", **more: str) -> subprocess.Popen[str]:
        (self.folder / "step").write_text(step)
        script = text(name).replace(RUN, f"{head}\n{RUN}")
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SLURM")},
            **{"PATH": f"{self.folder}:{os.environ['PATH']}", "SHOWN": shown, "SLURM_JOB_ID": "7"},
            **more,
        }
        return subprocess.Popen(
            ["bash", "-c", script, name, "train", "out=a b"], env=environment, text=True, stderr=subprocess.PIPE
        )

    def run(self, step: str, shown: str = JOB.format("RUNNING"), **more: str) -> int:
        """To the end; the exit status."""
        script = self.start(step, shown, **more)
        _, self.said = script.communicate(timeout=20)
        return script.returncode

    def queued_again(self) -> list[str]:
        calls = self.calls.read_text().splitlines() if self.calls.exists() else []
        return [c.removeprefix("requeue ") for c in calls if c.startswith("requeue ")]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


PREEMPTED = JOB.format("RUNNING") + " PreemptEligibleTime=2026-01-01T10:00:00 PreemptTime=2026-01-01T10:00:00"
SPARED = JOB.format("RUNNING") + " PreemptEligibleTime=2026-01-01T10:00:00 PreemptTime=None"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("status", "shown", "again"),
    [
        (0, JOB.format("RUNNING"), False),
        (0, PREEMPTED, False),  # done just in time
        (1, JOB.format("RUNNING"), False),  # a failure
        (2, SPARED, False),
        (137, JOB.format("RUNNING"), False),  # killed: no memory
        (138, JOB.format("RUNNING"), True),  # stopped by USR1
        (143, SPARED, True),  # by TERM
        (75, JOB.format("RUNNING"), True),  # asks for a new start
        (138, JOB.format("COMPLETING"), False),  # cancelled, or Slurm queues it again
        (143, JOB.format("CANCELLED"), False),
        (143, JOB.format("RUNNING").replace("Restarts=0", "Restarts=1"), False),  # elsewhere: this node was given up
        (1, PREEMPTED, True),  # torchrun of older PyTorch says 1 whatever happened
    ],
)
def test_when_a_job_is_queued_again(stage: Stage, name: str, status: int, shown: str, again: bool) -> None:
    nodes = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    assert stage.run(f"exit {status}", shown, name=name, **nodes) == status
    assert stage.queued_again() == (["7"] if again else [])
    assert ("goes on from its checkpoint" in stage.said) == again


def test_the_words_reach_alignlab_one_by_one(stage: Stage) -> None:
    stage.run("exit 0", head='PREFIX=(apptainer exec "my image.sif") PYTHON=/opt/python')
    words = (stage.folder / "srun.words").read_text().splitlines()
    expected = ["apptainer", "exec", "my image.sif", "/opt/python", "-m", "alignlab", "train", "out=a b"]
    assert words[-len(expected) :] == expected


def test_of_an_array_one_task_alone_is_queued_again(stage: Stage) -> None:
    """The number of one task is that of the whole array."""
    assert stage.run("exit 138", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3") == 138
    assert stage.queued_again() == ["7_3"]


def test_a_limit_too_short_to_begin_ends(stage: Stage) -> None:
    again = {"SLURM_RESTART_COUNT": "3"}
    assert stage.run("exit 138", SPARED.replace("Restarts=0", "Restarts=3"), **again) == 138
    assert stage.queued_again() == [] and "is --time too short for --signal?" in stage.said
    assert stage.run("exit 138", PREEMPTED.replace("Restarts=0", "Restarts=3"), **again) == 138  # not its fault
    assert stage.queued_again() == ["7"]


LISTEN = """
heard=0
hear() {{ heard=$((heard + 1)); echo $heard >{folder}/heard; if [ $heard = {after} ]; then end; fi; }}
end() {{ trap "" USR1; /bin/sleep 0.3; exit {status}; }}
trap hear USR1
touch {folder}/listening
for _ in {{1..400}}; do /bin/sleep 0.05; done
exit 3
"""
"""A step that ends with a status after the so-many-th signal."""


@pytest.mark.parametrize("status", [138, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_signal_is_passed_on_until_it_is_heard(stage: Stage, name: str, status: int) -> None:
    """Then the script waits for the step, and goes by how that ended: it may have been unable to save."""
    nodes = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    step = LISTEN.format(folder=stage.folder, after=4, status=status)
    script = stage.start(step, JOB.format("RUNNING"), name=name, **nodes)
    while not (stage.folder / "listening").exists():
        time.sleep(0.01)
    script.send_signal(signal.SIGUSR1)
    script.communicate(timeout=60)
    assert script.returncode == status
    assert (stage.folder / "heard").read_text() == "4\n"
    assert stage.queued_again() == (["7"] if status == 138 else [])


def test_a_signal_during_the_set_up_is_not_lost(stage: Stage) -> None:
    step = LISTEN.format(folder=stage.folder, after=1, status=138)
    assert stage.run(step, head="kill -USR1 $$") == 138
    assert stage.queued_again() == ["7"]


def test_term_to_the_script_leaves_the_step_its_time(stage: Stage) -> None:
    """At the end of a preemption's grace and at `scancel` both get it; the step may be saving."""
    begun = stage.folder / "begun"
    script = stage.start(f"touch {begun}; /bin/sleep 0.5; exit 143", JOB.format("COMPLETING"))
    while not begun.exists():
        time.sleep(0.01)
    script.send_signal(signal.SIGTERM)
    script.communicate(timeout=20)
    assert script.returncode == 143 and stage.queued_again() == []


# ------------------------------------------------------------------ torchrun

TORCHRUN = [sys.executable, "-m", "alignlab.launch.torchrun", "--nproc-per-node=1", "--no-python", "bash", "-c"]


@pytest.mark.parametrize(
    ("act", "status"),
    [
        ("exit 2", 2),
        # torchrun is the parent: it hears both and lives; the process ends as alignlab does
        ("kill -USR1 $PPID; kill -TERM $PPID; sleep 2; exit 138", 138),
    ],
)
def test_torchrun_outlives_signals_and_tells_the_status(act: str, status: int) -> None:
    found = subprocess.run([*TORCHRUN, act], capture_output=True, text=True, timeout=60, env=runs.environment())
    assert found.returncode == status, found.stderr
    assert ("FAILED" in found.stderr) == (status != 138)


# ------------------------------------------------------------------ around the training loop


def test_usr1_does_not_end_a_run_that_saves_its_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def dies(number: int, frame: FrameType | None) -> None:
        raise AssertionError("the process would have ended")

    def saves(config: object, out: Path, callbacks: object, checked: object) -> dict[str, int]:
        signal.raise_signal(signal.SIGUSR1)
        return {"step": 1}

    former = signal.signal(signal.SIGUSR1, dies)
    try:
        monkeypatch.setattr("alignlab.training.run.train", saves)
        assert starter.train({"distributed": {"mode": "single"}}, tmp_path) == {"step": 1}
    finally:
        signal.signal(signal.SIGUSR1, former)
