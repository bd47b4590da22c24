"""Runs that are killed, stopped and damaged in earnest end with the very weights of an undisturbed run."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.core import AlignlabError, Interrupted, PeerLost
from alignlab.training.callbacks.progress import ProgressDisplay
from alignlab.training.checkpoints import store as checkpoints_module
from alignlab.training.checkpoints.store import Checkpoints
from tests.training import forks, runs

STEPS = 6
ALGORITHMS = ["dpo", "rejection_sampling"]
"""Trained on data, and on what the policy samples."""

MORE = [
    "adapter=lora",
    "adapter.dropout=0.2",  # uses the random state
    "optimizer=adamw",
    "optimizer.lr=1e-3",
    "training.batch_size=2",
    "++source.rollout_batch_size=5",
    "++source.ppo_epochs=2",
    "training.checkpoint_every=1",
    "training.progress=off",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("faults")
    runs.prepare(made)
    return made


@pytest.fixture
def whole(folder: Path, algorithm: str) -> dict[str, torch.Tensor]:
    """The weights of an undisturbed run of one process."""
    out = f"{algorithm}-whole"
    if not (folder / out / "result.json").exists():
        runs.train(folder, algorithm, out, *MORE)
    return runs.weights(folder, out)


def same_as_whole(folder: Path, algorithm: str, out: str, whole: dict[str, torch.Tensor]) -> None:
    """The same weights, bit for bit, and every step's line once, as if nothing had happened."""
    assert runs.identical(whole, runs.weights(folder, out))
    mine, theirs = runs.metrics(folder, out), runs.metrics(folder, f"{algorithm}-whole")
    names = ("step", "loss", "trained_tokens", "generated_tokens", "lr", "grad_norm", "epoch")
    assert [{n: line[n] for n in names} for line in mine] == [{n: line[n] for n in names} for line in theirs]
    samples = [folder / o / "samples.jsonl" for o in (out, f"{algorithm}-whole")]
    assert [p.exists() for p in samples] == [algorithm == "rejection_sampling"] * 2
    if samples[0].exists():
        assert samples[0].read_text() == samples[1].read_text()


def killed_at(event: int) -> None:
    """SIGKILL this process just before its n-th operation on a file of the run's folder."""
    seen = 0

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if (name == "open" or name.startswith("os.")) and arguments and "-killed/" in str(arguments[0]):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_killed_again_and_again_at_random_moments(folder: Path, algorithm: str, whole: dict) -> None:
    out, chance = f"{algorithm}-killed", random.Random(algorithm)
    words = ["train", *runs.words_for(folder, algorithm, out, *MORE)]
    killed = 0
    for _ in range(8):
        event = chance.randint(10, 100)

        def act(event: int = event) -> None:
            killed_at(event)
            forks.command(words)()

        status = forks.wait(forks.fork(act, folder / "killed.log"))
        assert status in (0, -signal.SIGKILL), (folder / "killed.log").read_text()[-3000:]
        killed += status != 0
    assert killed >= 4
    runs.train(folder, algorithm, out, *MORE)
    same_as_whole(folder, algorithm, out, whole)
    left = sorted(p.name for p in (folder / out / "checkpoints").iterdir())
    assert left == [f"step-{step:08}" for step in (STEPS - 1, STEPS)]


def half_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    save_file = safetensors.torch.save_file

    def torn(tensors: Any, path: Path, *rest: Any) -> None:
        save_file(tensors, path, *rest)
        if ".tmp-step-00000004" in str(path):
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(safetensors.torch, "save_file", torn)


def just_after_the_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    write = checkpoints_module._write_manifest

    def then_die(folder: Path, step: int, metric: float | None) -> None:
        write(folder, step, metric)
        if step == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(checkpoints_module, "_write_manifest", then_die)


def before_the_older_are_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    prune = Checkpoints._prune

    def die(self: Checkpoints, written: Path) -> None:
        if written.name == "step-00000004":
            os.kill(os.getpid(), signal.SIGKILL)
        prune(self, written)

    monkeypatch.setattr(Checkpoints, "_prune", die)


def while_the_model_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    from alignlab.training import run

    def half(model: Any, where: Path, **options: Any) -> None:
        where.with_name(".model.tmp").mkdir(exist_ok=True)
        (where.with_name(".model.tmp") / "adapter_model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(run, "save_model", half)


@pytest.mark.parametrize("algorithm", ["dpo"])
@pytest.mark.parametrize(
    ("moment", "last"),
    [
        (half_of_the_weights, 3),
        (just_after_the_manifest, 3),
        (before_the_older_are_deleted, 4),
        (while_the_model_is_saved, STEPS),
    ],
)
def test_killed_in_the_middle_of_saving(
    folder: Path,
    algorithm: str,
    whole: dict,
    moment: Callable[[pytest.MonkeyPatch], None],
    last: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = f"{algorithm}-{moment.__name__}"
    words = ["train", *runs.words_for(folder, algorithm, out, *MORE)]

    def act() -> None:
        moment(monkeypatch)
        forks.command(words)()

    assert forks.wait(forks.fork(act, folder / "saving.log")) == -signal.SIGKILL
    found = Checkpoints(folder / out / "checkpoints", is_main=False).latest()
    assert found is not None and found.name == f"step-{last:08}"
    assert not (folder / out / "model").exists()
    runs.train(folder, algorithm, out, *MORE)
    same_as_whole(folder, algorithm, out, whole)
    assert not (folder / out / ".model.tmp").exists()


def test_a_process_of_the_command_line_killed_from_outside(folder: Path) -> None:
    """Started and killed as on a machine that is taken away, then resumed by another process."""
    more = [*MORE, "training.steps=40"]
    runs.train(folder, "sft", "sft-whole", *more, "training.checkpoint_every=null")
    process = subprocess.Popen(
        runs.command(folder, "sft", "sft-parts", *more),
        env=runs.environment(),
        cwd=runs.REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for_step(folder / "sft-parts", 3, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "sft-parts/model").exists()
    runs.train(folder, "sft", "sft-parts", *more)
    assert runs.identical(runs.weights(folder, "sft-whole"), runs.weights(folder, "sft-parts"))


def wait_for_step(out: Path, step: int, process: subprocess.Popen[Any]) -> None:
    """Until the run has recorded a step."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended by itself"
        path = out / "metrics.jsonl"
        if path.exists() and path.read_text().count("\n") >= step:
            return
        time.sleep(0.01)
    raise AssertionError("it never began to train")


# ------------------------------------------------------------------ damage


def interrupted(folder: Path, algorithm: str, out: str, step: int, *more: str) -> None:
    """A run that was asked to stop after a step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressDisplay, "update", lambda self, s, m: runs.StopAfter(step)(s, m))
        with pytest.raises(Interrupted, match="SIGTERM"):
            runs.train(folder, algorithm, out, *MORE, *more)


@pytest.mark.parametrize("algorithm", ["dpo"])
def test_a_truncated_newest_checkpoint_is_said_and_the_one_before_used(
    folder: Path, algorithm: str, whole: dict, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"{algorithm}-truncated"
    interrupted(folder, algorithm, out, 4)
    newest = folder / out / "checkpoints/step-00000004"
    shard = newest / "trained-00001-of-00001.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    steps: list[int] = []
    monkeypatch.setattr(ProgressDisplay, "update", lambda self, step, metrics: steps.append(step))
    with caplog.at_level(logging.ERROR):
        runs.train(folder, algorithm, out, *MORE)
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(said) == 1
    found = r"damaged checkpoint, not used: \S*step-00000004/trained-00001-of-00001\.safetensors: \d+ bytes instead"
    assert re.search(found, said[0])
    assert steps == [4, 5, 6]
    same_as_whole(folder, algorithm, out, whole)


@pytest.mark.parametrize("algorithm", ["dpo"])
def test_when_every_checkpoint_is_damaged_nothing_is_thrown_away(folder: Path, algorithm: str, whole: dict) -> None:
    """Training anew from the beginning would look like a resumption, and would drop what was recorded."""
    out = f"{algorithm}-should_prune"
    interrupted(folder, algorithm, out, 4)
    before = (folder / out / "metrics.jsonl").read_text()
    for path in (folder / out / "checkpoints").glob("step-*/state.pt"):
        path.write_bytes(b"")
    with pytest.raises(AlignlabError, match=r"no checkpoint in \S+ is whole: .*state\.pt.*training\.resume=never"):
        runs.train(folder, algorithm, out, *MORE)
    assert (folder / out / "metrics.jsonl").read_text() == before
    runs.train(folder, algorithm, out, *MORE, "training.resume=never")
    same_as_whole(folder, algorithm, out, whole)


@pytest.mark.parametrize("algorithm", ["rejection_sampling"])
def test_half_lines_of_a_killed_process_do_not_matter(folder: Path, algorithm: str, whole: dict) -> None:
    out = f"{algorithm}-half-lines"
    interrupted(folder, algorithm, out, 3)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (folder / out / name).open("a") as file:
            file.write('{"iteration": 1, "step": 2, "ti')
    runs.train(folder, algorithm, out, *MORE)
    same_as_whole(folder, algorithm, out, whole)


@pytest.mark.parametrize("algorithm", ["dpo"])
def test_a_checkpoint_of_another_model_is_refused(folder: Path, algorithm: str) -> None:
    """Where the same settings lead to other tensors, as after an update of a library."""
    out = f"{algorithm}-changed"
    interrupted(folder, algorithm, out, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alignlab.training.run_folder.fingerprint", lambda config: {})
        with pytest.raises(AlignlabError, match=r"step-00000002: this checkpoint does not fit the run: it holds"):
            runs.train(folder, algorithm, out, *MORE, "adapter.targets=[q_proj]")


# ------------------------------------------------------------------ several processes


LONG = ["distributed=ddp", "training.steps=40", "training.checkpoint_every=4"]


@pytest.fixture(scope="module")
def pair(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of an undisturbed run of two processes."""
    forks.train(folder, "dpo", "pair-whole", *MORE, *LONG)
    return runs.weights(folder, "pair-whole")


def test_sigterm_to_torchrun(folder: Path, pair: dict) -> None:
    """What a scheduler does: all processes stop after the same step, the checkpoint is there, the rest is as ever."""
    words = runs.command(folder, "dpo", "pair-parts", *MORE, *LONG, "training.checkpoint_every=null", processes=2)
    process = subprocess.Popen(
        words, env=runs.environment(), cwd=runs.REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_for_step(folder / "pair-parts", 3, process)
    process.terminate()
    _, said = process.communicate(timeout=240)
    # torchrun sends the signal on, and ends with a status of its own.
    assert process.returncode != 0
    stopped = re.findall(
        r"alignlab: stopped by SIGTERM; checkpoint of step (\d+) saved: the same command goes on", said
    )
    assert len(stopped) == 2 and len(set(stopped)) == 1, said
    kept = Checkpoints(folder / "pair-parts/checkpoints", is_main=False).folders()
    assert [k.name for k in kept] == [f"step-{int(stopped[0]):08}"]
    assert not (folder / "pair-parts/model").exists()
    forks.train(folder, "dpo", "pair-parts", *MORE, *LONG)
    assert runs.identical(pair, runs.weights(folder, "pair-parts"))
    mine, theirs = (runs.metrics(folder, out) for out in ("pair-parts", "pair-whole"))
    assert [(m["step"], m["loss"]) for m in mine] == [(m["step"], m["loss"]) for m in theirs]


def test_a_signal_to_one_process_stops_all(folder: Path, pair: dict) -> None:
    """It may reach them at different steps, or only one; each ends with 128 + 15."""
    words = ["train", *runs.words_for(folder, "dpo", "pair-one", *MORE, *LONG)]
    pids = forks.group(words, folder / "pair-one.log")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list((folder / "pair-one/checkpoints").glob("step-*")):
        time.sleep(0.01)
    os.kill(pids[1], signal.SIGTERM)
    said = "\n".join((folder / f"pair-one.log.{rank}").read_text() for rank in (0, 1))
    assert [forks.wait(pid) for pid in pids] == [143, 143], said
    forks.train(folder, "dpo", "pair-one", *MORE, *LONG)
    assert runs.identical(pair, runs.weights(folder, "pair-one"))


def fails_on_one_prompt(prompt: str, response: str, extra: dict[str, Any]) -> float:
    if os.environ.get("RANK") == "1":
        raise ZeroDivisionError("this rule divides")
    return 1.0


def test_the_error_of_a_failing_process_is_told(folder: Path) -> None:
    """The others say where to look, instead of waiting for ever or burying it under a traceback."""
    more = ["distributed=ddp", "scoring.function.path=tests.training.test_faults.fails_on_one_prompt"]
    words = ["train", *runs.words_for(folder, "rejection_sampling", "pair-failing", *MORE, *more)]
    pids = forks.group(words, folder / "failing.log")
    assert [forks.wait(pid) for pid in pids] == [PeerLost.status, 2]
    others, its = ((folder / f"failing.log.{rank}").read_text() for rank in (0, 1))
    last = its.strip().splitlines()[-1]
    assert re.fullmatch(
        r"alignlab: \S+prompts\.jsonl:\d+: fails_on_one_prompt failed: ZeroDivisionError: this .*", last
    )
    assert "alignlab: another process of this run has stopped: see its message" in others
    assert "Traceback" not in its + others
    assert not (folder / "pair-failing/model").exists()


def test_both_processes_go_by_what_the_first_one_finds(folder: Path, pair: dict) -> None:
    """A process that clears away what a killed one left, while another already looks, must not part them."""
    words = ["train", *runs.words_for(folder, "dpo", "pair-looking", *MORE, *LONG)]

    def blind() -> None:
        latest = Checkpoints.latest
        Checkpoints.latest = lambda self: latest(self) if self.is_main else None  # type: ignore[method-assign]

    pids = forks.group(words, folder / "looking.log")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list((folder / "pair-looking/checkpoints").glob("step-*")):
        time.sleep(0.01)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert [forks.wait(pid) for pid in pids] == [-signal.SIGKILL] * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "latest", Checkpoints.latest)
        blind()
        forks.train(folder, "dpo", "pair-looking", *MORE, *LONG)
    assert runs.identical(pair, runs.weights(folder, "pair-looking"))


def test_a_result_is_written_last(folder: Path) -> None:
    """Whoever finds result.json finds the model too, and the figures are those of the run."""
    runs.train(folder, "sft", "sft-result", "training.progress=off")
    result = json.loads((folder / "sft-result/result.json").read_text())
    last = runs.metrics(folder, "sft-result")[-1]
    assert result["step"] == last["step"] == STEPS
    assert result["trained_tokens"] == last["trained_tokens"] > 0
    assert (folder / "sft-result/model/model.safetensors").exists()
    assert (folder / "sft-result/result.json").stat().st_mtime_ns >= (folder / "sft-result/model").stat().st_mtime_ns
