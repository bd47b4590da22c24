"""Keys and passwords reach the run that needs them, and nothing that is written or printed."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from alignlab.cli import main
from alignlab.comparison.graph import local
from alignlab.core import ConfigError
from alignlab.core.secrets import HIDDEN, hide, set_aside, take_back
from tests.comparison import small
from tests.hostile.corpus import short
from tests.training import forks, runs

KEY = "open-sesame-1234"
MINE = """
from alignlab.algorithms.sft import SFT
class Mine(SFT):
    def __init__(self, api_key="", note=""):
        super().__init__()
        with open({got!r}, "a") as file:
            file.write(f"{{api_key}} {{note}};")
"""


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run of an algorithm that takes a key, and writes it to `got`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    runs.prepare(tmp_path)
    name = f"mine_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MINE.format(got=str(tmp_path / "got")))
    return [*short("sft", tmp_path, tmp_path), f"algorithm._target_={name}.Mine"]


def holding(folder: Path, secret: str) -> list[Path]:
    """The files that hold it."""
    return [p for p in folder.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]


def test_a_key_reaches_the_run_alone(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SERVICE_API_KEY", "open-sesame-5678")
    given = ["train", *words, "training.checkpoint_every=1"]
    keys = [f"+algorithm.api_key={KEY}", "+algorithm.note=${oc.env:SERVICE_API_KEY}"]
    monkeypatch.setattr("sys.argv", ["alignlab", *given, *keys])
    assert main([*given, *keys]) == 0
    assert (tmp_path / "got").read_text().startswith(f"{KEY} open-sesame-5678;")
    assert holding(tmp_path / "out", "open-sesame") == []
    assert f"api_key: {HIDDEN}" in (tmp_path / "out/config.yaml").read_text()
    said = "".join(capfd.readouterr())
    assert "open-sesame" not in said
    (tmp_path / "out/result.json").unlink()
    keys = ["+algorithm.api_key=open-sesame-other", "+algorithm.note=${oc.env:SERVICE_API_KEY}"]
    assert main([*given, *keys]) == 0, "a run goes on with another key"


@pytest.mark.parametrize(
    "word",
    [
        f"+algorithm.api_key={KEY}}}",
        f"+nosuch.password={KEY}",
        f"algorithm.api_key={KEY}",
        f"training={{api_key: {KEY}, steps: x}}",
        f"+training.hf_token={KEY}",
    ],
)
@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_errors_do_not_say_it(
    words: list[str], word: str, debug: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ALIGNLAB_DEBUG", raising=False)
    assert main(["train", *words[:-1], word, *debug]) == 2
    monkeypatch.delenv("ALIGNLAB_DEBUG", raising=False)
    assert "open-sesame" not in "".join(capfd.readouterr())


def test_the_shown_config_does_not_say_it(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words, f"+algorithm.api_key={KEY}", "--cfg"]) == 0
    said = capfd.readouterr().out
    assert "open-sesame" not in said
    assert f"api_key: {HIDDEN}" in said


def test_a_written_config_without_its_secrets_is_refused(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *words, f"+algorithm.api_key={KEY}"]) == 0
    capfd.readouterr()
    assert main(["train", f"--from={tmp_path / 'out/config.yaml'}"]) == 2
    assert "algorithm.api_key: this secret was not written down" in capfd.readouterr().err


def test_the_parts_of_a_comparison_get_it(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "NodeProcess", forks.Process)
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    few = {"seeds": [0], "budget": {"steps": 1}, "sft": None, "pairs": None, "reward_model": None, "baseline": None}
    mine = ["algorithm=sft", words[-1], f"+algorithm.api_key={KEY}", "data=demonstrations"]
    algorithms = {"mine": [*mine, "data.path={demonstrations}"]}
    small.write(tmp_path, "tiny", small.changed(**few, algorithms=algorithms))
    assert main(small.command(tmp_path, "comparison")) == 0, small.log_of(tmp_path, "comparison")
    assert set((tmp_path / "got").read_text().split(";")) == {f"{KEY} ", ""}
    assert holding(tmp_path / "comparison", KEY) == []
    assert KEY not in "".join(capfd.readouterr())
    capfd.readouterr()
    algorithms = {"mine": [word.replace(KEY, "another-key-9") for word in algorithms["mine"]]}
    small.write(tmp_path, "tiny", small.changed(**few, algorithms=algorithms))
    forks.Process.started.clear()
    assert main(small.command(tmp_path, "comparison")) == 0
    assert forks.Process.started == [], "another key changes no result"


def test_secrets_are_handed_on_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "open-sesame-9")
    config = {"a": {"password": KEY, "token": "open-sesame-9", "eos_token": "</s>"}, "b": ["x", 1, None]}
    written = set_aside(config)
    assert "sesame" not in json.dumps(written)
    assert written["a"]["token"] == "<secret:MY_TOKEN>"
    assert take_back(written, "node.json") == config
    monkeypatch.delenv("MY_TOKEN")
    with pytest.raises(ConfigError, match=r"node\.json: a\.token: this secret was not written down"):
        take_back(written, "node.json")


def test_logs_and_texts_do_not_say_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("DB_PASSWORD", "hunter2-hunter2")
    assert hide("at hunter2-hunter2.") == f"at {HIDDEN}."
    assert main(["status", "nowhere"]) == 2  # from now on logs are looked through
    logging.getLogger("x").error("with %s", "hunter2-hunter2")
    assert "hunter2" not in caplog.text
    monkeypatch.setenv("DB_PASSWORD", "short")
    assert hide("a short text") == "a short text"


def test_a_plain_word_in_the_environment_takes_nothing_out_of_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SORT_KEY", "objective_score")
    monkeypatch.setenv("CLUSTER_TOKEN", "training")
    monkeypatch.setenv("OTHER_TOKEN", "tr41ning-x")
    assert hide('{"objective_score": 0.5, "training": 1}') == '{"objective_score": 0.5, "training": 1}'
    assert hide("tr41ning-x") == "<secret>"
