"""What comes from names and messages stays text in the files that a comparison and a sweep leave."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from alignlab.cli import main
from alignlab.comparison.report import Cell, Table, csv_text, plain
from tests.hostile import makers_folders as makers

HOSTILE = ['=CMD("x")', "@SUM(A1)", "+1+2", "-1+2", "\t=1", "\r=1", " =1", "\n@x"]


@pytest.mark.parametrize("text", HOSTILE)
def test_formulas_are_texts_in_csv(text: str) -> None:
    found = next(csv.reader(csv_text([[text]]).splitlines(keepends=True)))
    assert found == ["'" + text.translate({ord(c): " " for c in "\t\r\n"})]


@pytest.mark.parametrize("value", ["-1.5", "+3", "-inf", "a=b", "a@b", "", -2.5, None, 3])
def test_numbers_and_usual_texts_stay_in_csv(value: object) -> None:
    assert next(csv.reader([csv_text([["x", value]])])) == ["x", "" if value is None else str(value)]


def test_markdown_is_text() -> None:
    hostile = "<script>a</script>\n| b | `c` ![d](http://e) \x1b[2J"
    shown = Table("t", ["h\n1"], [[Cell(hostile, small="<b>")]]).markdown()
    assert shown.count("\n") == 2
    assert "<script>" not in shown
    assert "<b>" not in shown
    assert "\x1b" not in shown
    assert "\\| b \\|" in shown
    assert plain("![d](http://e)") == "![d\\](http://e)"


def test_a_sweep_of_hostile_names(tmp_path: Path) -> None:
    makers.sweep(tmp_path, tmp_path, name='=CMD("x")', reason="<img src=x>\n\n# no | heading")
    assert main(["report", str(tmp_path / "sweep")]) == 0
    rows = list(csv.reader((tmp_path / "sweep/sweep.csv").open(newline="")))
    assert rows[1][2] == '\'=CMD("x")'
    for name in ("sweep.md", "sweep.html"):
        assert "<img src=x>" not in (tmp_path / "sweep" / name).read_text()
    assert "\n# no" not in (tmp_path / "sweep/sweep.md").read_text()


def test_a_tampered_run_is_marked_everywhere(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    makers.comparison(tmp_path, tmp_path)
    makers.tampered(tmp_path, tmp_path)
    assert main(["report", str(tmp_path / "comparison")]) == 0
    said = capfd.readouterr()
    found = json.loads((tmp_path / "comparison/leaderboard.json").read_text())
    assert [row["algorithm"] for row in found["rows"]] == ["b"]
    assert len(found["left_out"]) == 1
    for text in (said.out, *((tmp_path / f"comparison/{n}").read_text() for n in ("leaderboard.md", "report.html"))):
        assert "LEFT OUT: a-seed0: evaluation.json" in " ".join(text.split())
    assert main(["status", str(tmp_path / "comparison")]) == 0
    assert "evaluation.json is not what the run wrote" in " ".join(capfd.readouterr().out.split())


def test_results_of_an_earlier_version_have_no_checksums(tmp_path: Path) -> None:
    makers.comparison(tmp_path, tmp_path)
    for done in tmp_path.rglob("done.json"):
        done.write_text(json.dumps({"key": makers.KEY, "seconds": 1.0}))
    assert main(["report", str(tmp_path / "comparison")]) == 0
    found = json.loads((tmp_path / "comparison/leaderboard.json").read_text())
    assert {row["algorithm"] for row in found["rows"]} == {"a", "b"}
