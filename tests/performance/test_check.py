"""The script that checks a GPU, `experiments/gpu/check.py`: what becomes of a part that fails, hangs, dies or is left
out. All of it runs on a CPU in `make check-gpu DEVICE=cpu`."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

GPU = Path(__file__).parents[2] / "experiments" / "gpu"


@pytest.fixture(scope="module")
def check() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_check", GPU / "check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def line(check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Does a function as a part; its line."""

    def do(function: Any, seconds: float = 30.0) -> dict[str, Any]:
        trial = ModuleType("checks.trial")
        trial.part = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "checks.trial", trial)
        found: dict[str, Any] = check.done(
            check.Part("trial", "trial.part", seconds), check.size_of("cpu", tmp_path), seconds
        )
        return found

    return do


def test_a_part_that_ends_well(line: Any) -> None:
    def part(size: Any, say: Any) -> None:
        say(figure=3)
        say(ok=True, device=size.device)

    found = line(part)
    assert found["result"] == "ok" and "reason" not in found
    assert found["rows"] == [{"figure": 3}, {"ok": True, "device": "cpu"}]


def test_a_row_that_is_wrong_fails_its_part(line: Any) -> None:
    found = line(lambda size, say: (say(ok=True), say(ok=False, reason="far off")))
    assert found["result"] == "failed" and found["reason"] == "1 of 2 rows are not as they must be"


def test_an_error_is_the_reason(line: Any) -> None:
    def part(size: Any, say: Any) -> None:
        say(figure=3)
        raise ValueError("no such kernel")

    found = line(part)
    assert (found["result"], found["reason"]) == ("failed", "ValueError: no such kernel")
    assert found["rows"] == [{"figure": 3}]


def test_a_part_that_hangs_is_ended_with_all_that_it_started(line: Any, tmp_path: Path) -> None:
    def part(size: Any, say: Any) -> None:
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        say(child=child)
        time.sleep(60)

    found = line(part, 1.5)
    assert (found["result"], found["reason"]) == ("failed", "no end after 2 s")
    child = found["rows"][0]["child"]
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("its child goes on")


def test_a_part_that_dies(line: Any) -> None:
    found = line(lambda size, say: os.kill(os.getpid(), signal.SIGSEGV))
    assert (found["result"], found["reason"]) == ("failed", "ended by SIGSEGV")


def test_a_part_that_cannot_be_done_here(line: Any, check: Any) -> None:
    def part(size: Any, say: Any) -> None:
        raise check.Skip("vLLM is not installed")

    found = line(part)
    assert (found["result"], found["reason"]) == ("skipped", "vLLM is not installed")


def test_no_part_begins_when_the_time_is_over(line: Any) -> None:
    found = line(lambda size, say: say(figure=3), 0.5)
    assert (found["result"], found["rows"]) == ("failed", [])


def test_every_part_has_its_function_and_all_fit_on_a_gpu(check: Any) -> None:
    for part in check.PARTS:
        module, function = part.where.split(".")
        assert (GPU / "checks" / f"{module}.py").exists()
        assert f"def {function}(size: Size, say: Say)" in (GPU / "checks" / f"{module}.py").read_text()
