"""The project's own pages are true: versions, links, names and examples in them."""

from __future__ import annotations

import re
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

import alignlab
from alignlab import core
from alignlab.core import Group, Response, Scorer
from alignlab.core.settings import RENAMED

ROOT = Path(__file__).parents[1]
PAGES = sorted(p for p in ROOT.rglob("*.md") if not p.relative_to(ROOT).parts[0].startswith((".", "runs")))


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table(page: str, heading: str) -> list[list[str]]:
    """The rows of the first table after a heading, without its head."""
    lines = text(page).partition(f"{heading}\n")[2].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|---"))
    rows = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def test_the_citation_has_the_package_s_version_and_licence() -> None:
    citation = yaml.safe_load(text("CITATION.cff"))
    assert citation["version"] == alignlab.__version__
    assert citation["license"] == tomllib.loads(text("pyproject.toml"))["project"]["license"]


def test_the_changelog_has_a_section_for_the_package_s_version() -> None:
    assert re.findall(r"^## \[(.+)\]", text("CHANGELOG.md"), re.MULTILINE)[:2] == ["Unreleased", alignlab.__version__]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize(
    ("page", "heading"), [("CHANGELOG.md", "### Renamed"), ("docs/glossary.md", "### Config keys")]
)
def test_each_renamed_key_is_in_the_table(page: str, heading: str) -> None:
    rows = table(page, heading)
    missing = [f"| `{old}` | `{new}` |" for old, new in RENAMED.items() if [f"`{old}`", f"`{new}`"] not in rows]
    assert missing == [], f"add these rows to {page}"


def test_a_glossary_term_is_explained_once() -> None:
    terms = [row[0].strip("*").lower() for row in table("docs/glossary.md", "## Terms")]
    assert len(terms) > 50
    assert len(terms) == len(set(terms))
    assert terms == sorted(terms, key=lambda term: (term.startswith("`"), term))


def test_core_has_every_name_that_contributing_tells_to_write() -> None:
    named = re.findall(r"`core\.(\w+)`", text("CONTRIBUTING.md"))
    assert len(named) > 8
    assert [name for name in named if not hasattr(core, name)] == []


def test_the_scorer_of_contributing_works_as_it_stands() -> None:
    blocks = re.findall(r"^```(?:python|yaml)\n(.+?)^```", text("CONTRIBUTING.md"), re.MULTILINE | re.DOTALL)
    code, config = next(pair for pair in pairwise(blocks) if "LetterShare" in pair[0])
    names: dict[str, Any] = {}
    exec(code, names)  # the page's own example
    values = yaml.safe_load(config)
    assert values.pop("_target_") == "my_rewards.LetterShare"
    scorer = names["LetterShare"](**values)
    assert isinstance(scorer, Scorer)
    group = Group([1], [Response([2], text="eel"), Response([2], text="")])
    scorer.score([group])
    assert [r.columns["reward"] for r in group.responses] == [pytest.approx(2 / 3), 0.0]


def test_pre_commit_runs_what_make_lint_runs() -> None:
    (repository,) = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    entries = " ".join(hook["entry"] for hook in repository["hooks"])
    recipe = re.search(r"^lint:.*\n((?:\t.+\n)+)", text("Makefile"), re.MULTILINE)
    assert recipe is not None
    for command in re.findall(r"\$\(BIN\)/(ruff check|ruff format|mypy)", recipe[1]):
        assert f".venv/bin/{command}" in entries


def test_every_folder_of_the_package_is_in_the_layers_of_architecture() -> None:
    listed = re.findall(r"`(\w+)/`", " ".join(row[0] for row in table("ARCHITECTURE.md", "## Layers")))
    there = {p.parent.name for p in (ROOT / "alignlab").glob("*/__init__.py")}
    assert there <= set(listed)
