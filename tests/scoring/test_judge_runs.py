"""A judge in whole runs: sampling a data set, training on what it says, in one process and in two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignlab.build import build
from alignlab.config import compose, resolve
from alignlab.core import ConfigError
from alignlab.rollout.produce import produce
from alignlab.scoring import JudgePairs, JudgeScores
from tests.components import need
from tests.scoring.judge_server import completion, more_a, serving
from tests.training import forks, runs

need("openai")

SECRET = "sk-Zq7wv93kLmN2pXbT5rUyHc"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("judged")
    runs.prepare(made)
    return made


def judged(url: str, folder: Path, kind: str = "judge_pairs") -> list[str]:
    return [
        f"scoring={kind}",
        "scoring.endpoint.model=rule",
        f"scoring.endpoint.base_url={url}",
        f"scoring.endpoint.cache={folder}/judge.sqlite",
    ]


def rule(text_i: str, text_j: str) -> float:
    """What `more_a` says in both orders, averaged: of equals it takes the one shown first."""
    i, j = text_i.count("a"), text_j.count("a")
    return 0.5 if i == j else float(i > j)


def sample(folder: Path, out: Path, *words: str) -> list[dict[str, Any]]:
    given = [f"model={folder}/base", f"data.path={folder}/prompts.jsonl", "rollout.max_new_tokens=8", f"out={out}"]
    produce(resolve(compose("sample", [*given, *words])), out)
    return [json.loads(line) for line in (out / "groups.jsonl").read_text().splitlines()]


def written(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_sampled_groups_are_labelled_by_the_rule(folder: Path, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with serving(more_a) as server:
        groups = sample(folder, tmp_path / "one", *judged(server.url, tmp_path))
        assert server.headers[0]["authorization"] == f"Bearer {SECRET}"
    found = [[r["columns"]["preference"] for r in g["responses"]] for g in groups]
    assert len(groups) == 12
    wanted = [rule(*(r["text"] for r in g["responses"])) for g in groups]
    assert found == [[p, 1 - p] for p in wanted]
    assert len({*wanted}) > 1, "the rule has something to say here"
    again = sample(folder, tmp_path / "two", *judged("http://127.0.0.1:9/v1", tmp_path))
    assert again == groups, "from the cache alone"
    out, err = capfd.readouterr()
    assert "judge rule: " in err
    assert SECRET not in out + err
    assert len(written(tmp_path)) >= 3
    assert not any(SECRET.encode() in path.read_bytes() for path in written(tmp_path))


def test_dpo_on_the_policy_s_own_pairs(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Sampled, labelled and trained on in one run; the labels are the rule's, and the key is in none of its files."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    own = ["algorithm=dpo", "data=prompts", "source=rollout", "source.group_size=2"]
    monkeypatch.setitem(runs.ALGORITHMS, "judged", own)
    with serving(more_a) as server:
        more = [*judged(server.url, tmp_path), "rollout.max_new_tokens=8", f"out={tmp_path}/run"]
        result = runs.train(folder, "judged", "x", *more)
        assert server.requests
    assert result["step"] == 6
    lines = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert all({"preference", "score"} <= line.keys() for line in lines)
    for a, b in zip(lines[::2], lines[1::2], strict=True):
        assert a["prompt"] == b["prompt"]
        assert a["preference"] == rule(a["response"], b["response"])
    assert {"config.yaml", "provenance.json"} <= {p.name for p in written(tmp_path)}
    assert not any(SECRET.encode() in path.read_bytes() for path in written(tmp_path))


def test_scores_in_two_processes_share_the_cache(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Each process judges its share, at once into one file; the same run in one process then asks nothing new."""

    def answer(body: dict[str, Any], _: int) -> Any:
        text = body["messages"][0]["content"].split("Response:\n")[1].split("\n\nHow good")[0]
        return completion(str(min(1 + text.count("a"), 9)))

    words = ["rollout.max_new_tokens=8", "training.steps=2"]
    with serving(answer) as server:
        more = [*judged(server.url, tmp_path, "judge_scores"), *words, f"out={tmp_path}/two"]
        own = [w for w in runs.ALGORITHMS["rejection_sampling"] if not w.startswith("scoring")]
        monkeypatch.setitem(runs.ALGORITHMS, "scored", own)
        log = tmp_path / "two.log"
        words = ["train", *runs.words_for(folder, "scored", "x", *more, "distributed=ddp")]
        assert " in this process" in forks.finish(forks.group(words, log), log)
        count = len(server.requests)
        assert count > 0
        runs.train(folder, "scored", "x", *more[:-1], f"out={tmp_path}/one")
        assert len(server.requests) == count, "sampling does not depend on the number of processes, nor do questions"
    assert runs.difference(runs.weights(tmp_path, "one"), runs.weights(tmp_path, "two")) < 1e-5
    for line in (tmp_path / "one/samples.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["reward"] == min(1 + record["response"].count("a"), 9)


def test_configs_are_checked_without_key_or_network(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    for option, kind in (("judge_pairs", JudgePairs), ("judge_scores", JudgeScores)):
        words = ["model.path=m", "data.path=d", f"scoring={option}", "scoring.endpoint.model=m"]
        config = resolve(compose("sample", words))
        assert isinstance(build(config["scoring"], "scoring"), kind)
        words[-1] = f"scoring.endpoint.model={SECRET}"
        with pytest.raises(ConfigError, match=r"^scoring\.endpoint\.model: looks like a secret"):
            build(resolve(compose("sample", words))["scoring"], "scoring")
        with pytest.raises(ConfigError, match=r"api_key: ") as error:
            words[-1] = f"+scoring.endpoint.api_key={SECRET}"
            build(resolve(compose("sample", [*words, "scoring.endpoint.model=m"]))["scoring"], "scoring")
        assert SECRET not in str(error.value)
    assert not list(tmp_path.iterdir()), "nothing is opened"
