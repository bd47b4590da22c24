"""What nobody thought of: records, overrides, files of a run and replies of a judge, made up by Hypothesis.

Whatever goes in, a boundary either succeeds or says in one line what was wrong. The same examples each time; `make
fuzz`, or ALIGNLAB_FUZZ=N, tries N times as many, others each time.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from alignlab.cli import main
from alignlab.commands import UNEXPECTED
from alignlab.config import compose, resolve
from alignlab.core import AlignlabError
from alignlab.data import DataSettings, load
from alignlab.data.formats import FIELDS, FORMATS
from alignlab.scoring.judge_answers import Answer, read_choice, read_score
from alignlab.training.run_config import check
from tests import tiny
from tests.hostile.corpus import short
from tests.training import runs

FACTOR = int(os.environ.get("ALIGNLAB_FUZZ", "1"))


def tried(examples: int) -> Any:
    """Settings of a test: so many examples, always the same; with ALIGNLAB_FUZZ more, and others each time."""
    return settings(
        max_examples=examples * FACTOR,
        derandomize=FACTOR == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # an example of a run takes a second: making it smaller would take minutes
    )


def one_line(error: AlignlabError) -> None:
    """A message for people."""
    assert str(error).strip() and len(str(error)) < 5000


# ---------------------------------------------------------------------- strategies

TEXTS = st.text(max_size=12) | st.sampled_from(["", " ", "a b", "\ud800", "\x00", "\n", "{x}", "<s>", "é" * 9, "1e999"])
NUMBERS = st.integers(-3, 3) | st.integers() | st.floats() | st.sampled_from([10**400, -0.0, 2**63, 1e308])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "x"]), "content": TEXTS}
)

GOOD: dict[str, dict[str, Any]] = {
    "demonstrations": {"prompt": "a b", "completion": "c"},
    "chat": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "preferences": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "rankings": {"prompt": "a", "responses": ["b", "c"], "scores": [1.0, 2.0]},
    "unpaired": {"prompt": "a", "completion": "b", "label": True},
    "steps": {"prompt": "a", "steps": ["b", "c"], "labels": [1, -1]},
    "prompts": {"prompt": "a"},
    "text": {"text": "a b c"},
    "groups": {"prompt_ids": [1, 2], "responses": [{"token_ids": [3, 4], "columns": {"reward": 1.0}}]},
}
NAMES = st.sampled_from(sorted({*FIELDS, *(name for record in GOOD.values() for name in record), "columns", "_"}))


@st.composite
def records(draw: Any, kind: str) -> Any:
    """A record of a kind with some fields changed, left out or added; or something that is no record at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(VALUES)
    record = json.loads(json.dumps(GOOD[kind]))
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(GOOD[kind])) | NAMES | TEXTS)
        action = draw(st.sampled_from(["replace", "replace", "delete", "inside", "messages"]))
        if action == "delete":
            record.pop(name, None)
        elif action == "inside" and isinstance(record.get(name), list) and record[name]:
            record[name][draw(st.integers(0, len(record[name]) - 1))] = draw(VALUES)
        elif action == "messages":
            record[name] = draw(st.lists(MESSAGE, max_size=4))
        else:
            record[name] = draw(VALUES)
    return record


# ---------------------------------------------------------------------- records


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, records of all kinds, and a finished run with checkpoints."""
    made = tmp_path_factory.mktemp("fuzz")
    runs.prepare(made)
    assert main(["train", *short("sft", made, made), f"out={made}/run", "training.checkpoint_every=1"]) == 0
    return made


@pytest.mark.parametrize("kind", sorted(GOOD))
@tried(40)
@given(data=st.data())
def test_records(kind: str, folder: Path, data: Any) -> None:
    lines = data.draw(st.lists(records(kind), min_size=1, max_size=3))
    path = folder / "fuzzed.jsonl"
    text = "".join(json.dumps(line) + "\n" for line in lines)
    junk = data.draw(st.binary(max_size=6)) if data.draw(st.integers(0, 9)) == 0 else b""
    path.write_bytes(text.encode() + junk)
    parser = data.draw(st.sampled_from([kind, kind, "auto"]))
    skip = data.draw(st.sampled_from(["stop", "skip"]))
    try:
        load(DataSettings(path=str(path), parser=parser, on_bad_record=skip, max_length=64), TOKENIZER)
    except AlignlabError as error:
        one_line(error)


TOKENIZER = tiny.tokenizer()


def test_each_format_is_tried() -> None:
    assert GOOD.keys() == FORMATS.keys()


# ---------------------------------------------------------------------- overrides


def _keys(values: Any, prefix: str = "") -> list[str]:
    if not isinstance(values, dict):
        return [prefix]
    return [
        k
        for name, v in values.items()
        for k in [*([prefix] if prefix else []), *_keys(v, f"{prefix}.{name}".strip("."))]
    ]


WRITTEN = st.sampled_from(
    """null true [] {} [1,2] {a:1} inf nan -1 0 1e999 '' ${oc.env:NOPE} ${x} a,b ??? [ } ' 1_000 0x10 -0.5 auto x.y
    _target_ ${training.steps} range(1,3) 99999999999999999999999999 os.system""".split()  # noqa: SIM905
)


@st.composite
def overrides(draw: Any, keys: list[str]) -> list[str]:
    words = []
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.integers(0, 7)) == 0:
            words.append(draw(TEXTS | st.text(alphabet="~+=.@:/${}[]',a1 ", max_size=10)))
            continue
        key = draw(st.sampled_from(keys) | st.sampled_from([k.partition(".")[0] for k in keys]))
        value = draw(WRITTEN | NUMBERS.map(repr) | TEXTS)
        words.append(f"{draw(st.sampled_from(['', '', '', '+', '++', '~']))}{key}={value}")
    return words


@pytest.fixture(scope="module")
def base() -> tuple[list[str], list[str]]:
    """Overrides of a good run, and the keys of its config."""
    words = ["model=m", "data=demonstrations", "data.path=d.jsonl", "algorithm=sft"]
    return words, sorted(set(_keys(resolve(compose("train", words)))))


@tried(70)
@given(data=st.data())
def test_overrides(base: tuple[list[str], list[str]], data: Any) -> None:
    words, keys = base
    try:
        check(resolve(compose("train", [*words, *data.draw(overrides(keys))])))
    except AlignlabError as error:
        one_line(error)


# ---------------------------------------------------------------------- folders of runs


@st.composite
def mutations(draw: Any, content: bytes) -> bytes:
    """The bytes of a file, damaged."""
    kind = draw(st.sampled_from(["empty", "cut", "flip", "flip", "insert", "junk", "json"]))
    place = draw(st.integers(0, max(0, len(content) - 1)))
    if kind == "cut":
        return content[:place]
    if kind == "flip" and content:
        return content[:place] + bytes([draw(st.integers(0, 255))]) + content[place + 1 :]
    if kind == "insert":
        return content[:place] + draw(st.binary(min_size=1, max_size=8)) + content[place:]
    if kind == "junk":
        return draw(st.binary(max_size=40))
    return json.dumps(draw(VALUES)).encode() if kind == "json" else b""


COMMANDS = {
    "status": ["status", "{run}"],
    "report": ["report", "{run}"],
    "train": ["train", "{words}"],
    "export": ["export", "run={run}", "out={out}"],
}


@pytest.mark.parametrize("command", sorted(COMMANDS))
@tried(9)
@given(data=st.data())
def test_a_damaged_run(command: str, folder: Path, data: Any) -> None:
    run, out = folder / "damaged", folder / "exported"
    for made in (run, out):
        shutil.rmtree(made, ignore_errors=True)
    shutil.copytree(folder / "run", run)
    files = sorted(p for p in run.rglob("*") if p.is_file() and p.name != "lock")
    chosen = data.draw(st.sampled_from(files))
    damaged = data.draw(mutations(chosen.read_bytes()))
    chosen.write_bytes(damaged)
    again = [*short("sft", folder, folder), f"out={run}", "training.checkpoint_every=1", "training.steps=3"]
    words = [w.format(run=run, out=out) for w in COMMANDS[command] if w != "{words}"]
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        status = main(words + (again if command == "train" else []))
    place = f"{chosen.relative_to(run)} is {damaged[:80]!r}: {said.getvalue()[-1000:]}"
    assert status not in (UNEXPECTED, 1), place
    if status:
        assert sum(line.startswith("alignlab: ") for line in said.getvalue().splitlines()) == 1, place


# ---------------------------------------------------------------------- replies of judges

TOKENS = st.lists(st.fixed_dictionaries({"token": TEXTS | VALUES, "top_logprobs": VALUES}) | VALUES, max_size=3)
ALTERNATIVE = st.fixed_dictionaries({"token": st.sampled_from(["1", "2", "x"]) | VALUES, "logprob": NUMBERS | VALUES})
LABEL = st.sampled_from(["1", "2"])
GOOD_TOKEN = st.fixed_dictionaries({"token": LABEL, "top_logprobs": st.lists(ALTERNATIVE, max_size=4)})
CONTENT = st.sampled_from(["1", "2", "Answer: 1", "7/9"]) | VALUES
LOGPROBS = st.fixed_dictionaries({"content": st.lists(GOOD_TOKEN, max_size=2) | TOKENS | VALUES}) | VALUES
MESSAGES = st.fixed_dictionaries({"content": CONTENT}) | VALUES
CHOICE = st.fixed_dictionaries({"message": MESSAGES}, optional={"logprobs": LOGPROBS})
COUNTS = st.dictionaries(st.sampled_from(["prompt_tokens", "completion_tokens"]), VALUES) | VALUES
CHOICES = st.lists(CHOICE, max_size=2) | VALUES
REPLIES = st.fixed_dictionaries({"choices": CHOICES}, optional={"usage": COUNTS}) | VALUES


@tried(1500)
@given(reply=REPLIES)
def test_replies(reply: Any) -> None:
    try:
        answer = Answer.read(json.dumps(reply))
    except ValueError:
        return
    assert min(answer.prompt_tokens, answer.completion_tokens) >= 0
    assert Answer.kept(json.loads(json.dumps(asdict(answer)))) == answer
    answer.text.encode()
    chance, _ = read_choice(answer, "12")
    assert chance is None or 0 <= chance <= 1
    for soft in (True, False):
        score, _ = read_score(answer, 0, 9, soft)
        assert score is None or (math.isfinite(score) and -1e-9 <= score <= 9 + 1e-9)
