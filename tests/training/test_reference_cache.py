"""What a reference says of the data is computed once, kept, and believed only where it was said of the very same."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.core import Group, Response
from alignlab.models import FullFineTuning, LoRA, ModelSettings, Reference, load_model
from alignlab.training import collect
from alignlab.training.reference_cache import ReferenceCache, identity, keys
from tests import tiny
from tests.training import forks, runs

NAME = "a" * 64


def groups(count: int = 6, responses: int = 2) -> list[Group]:
    """Of different tokens, all."""
    made = []
    for i in range(count):
        answers = [Response([10 * i + k, 7, 2], loss_mask=[True, k == 0, True]) for k in range(responses)]
        made.append(Group([1, i], answers, origin=f"data:{i}"))
    return made


def said(prompt_ids: Sequence[int], response: Response) -> list[float]:
    """A number in float32 for each token that bears loss, of prompt and response."""
    first = torch.tensor([prompt_ids[-1] / 3, *(i / 7 for i in response.token_ids)], dtype=torch.float32)
    return (-first.cumsum(0)[[i + 1 for i in response.predicted]]).tolist()


class Model:
    """Stands for a scoring pass.

    Attributes:
        read: how many responses it was asked for.
    """

    def __init__(self, found: Sequence[Group], shift: float = 0.0) -> None:
        self.found, self.shift, self.read = found, shift, 0

    def __call__(self) -> None:
        for group in self.found:
            for response in group.responses:
                if "ref_logp" not in response.columns:
                    self.read += 1
                    values = said(group.prompt_ids, response)
                    response.columns["ref_logp"] = (torch.tensor(values) + self.shift).tolist()


def filled(folder: Path, found: list[Group], name: str = NAME, shift: float = 0.0) -> int:
    """How many responses had to be read."""
    model = Model(found, shift)
    ReferenceCache(folder, name).fill(found, model)
    return model.read


def columns(found: Sequence[Group]) -> list[Any]:
    return [list(r.columns["ref_logp"]) for g in found for r in g.responses]


EXPECTED = [said(g.prompt_ids, r) for g in groups() for r in g.responses]


def test_what_was_said_once_is_not_asked_again_and_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    first, second = groups(), groups()
    assert (filled(tmp_path, first), filled(tmp_path, second, shift=99)) == (12, 0)
    assert columns(first) == columns(second) == EXPECTED


def test_numbers_that_float32_cannot_hold_are_kept_whole(tmp_path: Path) -> None:
    found, again = groups(1, 1), groups(1, 1)
    thirds = [-0.1, -1 / 3, -2 / 3]
    ReferenceCache(tmp_path, NAME).fill(found, lambda: found[0].responses[0].columns.update(ref_logp=thirds))
    assert filled(tmp_path, again) == 0
    assert columns(again) == [thirds]


def test_other_siblings_are_another_question(tmp_path: Path) -> None:
    """Read beside others, a response's log-probs may differ in the last bit."""
    filled(tmp_path, groups(6, 1))
    assert filled(tmp_path, groups(6, 2)) == 12
    assert filled(tmp_path, groups(6, 1)) == filled(tmp_path, groups(6, 2)) == 0


def test_a_response_that_is_there_already_is_no_sibling(tmp_path: Path) -> None:
    """What is read is what lacks the column: here the second responses, by themselves."""
    found = groups(6, 2)
    for group in found:
        group.responses[0].columns["ref_logp"] = [5.0, 5.0, 5.0]
    assert filled(tmp_path, found) == 6
    alone = [g.with_responses(g.responses[1:]) for g in groups(6, 2)]
    assert filled(tmp_path, alone) == 0


def test_columns_that_records_bring_are_left_alone_and_not_kept(tmp_path: Path) -> None:
    own = groups(1)
    for response in own[0].responses:
        response.columns["ref_logp"] = [5.0, 5.0]
    assert filled(tmp_path, own) == 0
    assert columns(own) == [[5.0, 5.0]] * 2
    assert filled(tmp_path, groups(1)) == 2


OTHERS: dict[str, Callable[[Group], None]] = {
    "prompt": lambda g: g.prompt_ids.append(3),
    "token": lambda g: g.responses[0].token_ids.__setitem__(1, 8),
    "longer": lambda g: (g.responses[0].token_ids.append(3), g.responses[0].loss_mask.append(False)),  # type: ignore
    "mask": lambda g: setattr(g.responses[0], "loss_mask", [False, True, True]),
    "border": lambda g: (g.prompt_ids.append(g.responses[0].token_ids.pop(0)), g.responses[0].loss_mask.pop(1)),  # type: ignore
}
"""What may be other about a group's first response."""


@pytest.mark.parametrize("other", OTHERS)
def test_other_tokens_are_another_question(tmp_path: Path, other: str) -> None:
    filled(tmp_path, groups(1, 1))
    changed = groups(1, 1)
    OTHERS[other](changed[0])
    assert filled(tmp_path, changed) == 1
    assert columns(changed) == [said(changed[0].prompt_ids, changed[0].responses[0])]


def test_a_mask_that_leaves_nothing_out_is_none() -> None:
    assert keys([1, 2], [Response([3, 4], loss_mask=[True, True])]) == keys([1, 2], [Response([3, 4])])


def test_places_in_a_group_are_told_apart() -> None:
    """Of two like responses, too: where one ends and the next begins counts."""
    twice = keys([1], [Response([3]), Response([3])])
    assert (
        len({*twice, *keys([1], [Response([3])]), *keys([1], [Response([3, 3])]), *keys([1, 3], [Response([3])])}) == 5
    )


def test_another_reference_has_another_file(tmp_path: Path) -> None:
    filled(tmp_path, groups())
    assert filled(tmp_path, groups(), name="b" * 64) == 12


# ---------------------------------------------------------------------- which reference it is


def reference(path: Path, adapter: str = "none", **more: Any) -> Reference:
    model = load_model(ModelSettings(path=str(path), **more), LoRA() if adapter == "lora" else FullFineTuning())
    return Reference(model, fresh_adapter=adapter == "lora" and not (path / "adapter_config.json").exists())


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    tiny.save(folder / "base", std=0.15)
    network = load_model(ModelSettings(path=str(folder / "base"))).network
    network.save_pretrained(folder / "moved")
    load_model(ModelSettings(path=str(folder / "base"))).tokenizer.save_pretrained(folder / "moved")
    with torch.no_grad():
        network.get_output_embeddings().weight[-1, -1] += 1e-6
    network.save_pretrained(folder / "nudged")
    load_model(ModelSettings(path=str(folder / "base"))).tokenizer.save_pretrained(folder / "nudged")
    trained = load_model(ModelSettings(path=str(folder / "base")), LoRA(r=4, alpha=8), seed=3)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    for name, alpha in (("adapter", 8), ("stronger", 16)):
        trained.network.peft_config["default"].lora_alpha = alpha
        trained.network.save_pretrained(folder / name)
        trained.tokenizer.save_pretrained(folder / name)
    return folder


def test_the_same_weights_are_the_same_reference_wherever_they_are_and_whatever_is_trained(bases: Path) -> None:
    plain = identity(reference(bases / "base"), 1.0, "no")
    assert identity(reference(bases / "base"), 1.0, "no") == plain
    assert identity(reference(bases / "moved"), 1.0, "no") == plain
    assert identity(reference(bases / "base", "lora"), 1.0, "no") == plain
    assert identity(reference(bases / "base", layout="plain"), 1.0, "no") == plain


def test_whatever_changes_a_log_prob_is_another_reference(bases: Path) -> None:
    base = reference(bases / "base")
    config = base.held_in.base.config
    found = [
        identity(base, 1.0, "no"),
        identity(base, 0.7, "no"),
        identity(base, 1.0, "bf16"),
        identity(reference(bases / "nudged"), 1.0, "no"),
        identity(reference(bases / "base", dtype="float64"), 1.0, "no"),
        identity(reference(bases / "adapter", "lora"), 1.0, "no"),
        identity(reference(bases / "stronger", "lora"), 1.0, "no"),
    ]
    config.rms_norm_eps *= 2
    found.append(identity(base, 1.0, "no"))
    assert len(set(found)) == len(found)


def test_what_is_trained_is_no_part_of_the_reference(bases: Path) -> None:
    """Neither a new adapter, nor one that is trained further, once they differ from what they were."""
    for path in ("base", "adapter"):
        found = reference(bases / path, "lora")
        before = identity(found, 1.0, "no")
        for parameter in found.held_in.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        assert identity(found, 1.0, "no") == before


# ---------------------------------------------------------------------- several, killed, damaged


def test_several_at_once_agree_on_the_first_to_write(tmp_path: Path) -> None:
    """Both ask before either has an answer, and their answers differ by rounding."""
    found, late = groups(), groups()
    here = Model(late, shift=1e-3)

    def slower() -> None:
        assert filled(tmp_path, found) == 12
        here()

    ReferenceCache(tmp_path, NAME).fill(late, slower)
    assert here.read == 12
    assert columns(late) == columns(found) == EXPECTED


def test_processes_write_at_the_same_time(tmp_path: Path) -> None:
    def write() -> None:
        for i in range(30):
            filled(tmp_path / "cache", groups(60)[i * 2 % 50 :][:8])

    writers = [forks.fork(write, tmp_path / "log") for _ in range(2)]
    assert [forks.wait(pid) for pid in writers] == [0, 0], (tmp_path / "log").read_text()
    found = groups(56)
    assert filled(tmp_path / "cache", found) == 0
    assert columns(found) == [said(g.prompt_ids, r) for g in groups(56) for r in g.responses]


def test_killed_while_writing(tmp_path: Path) -> None:
    def die() -> None:
        filled(tmp_path, groups(2))
        cache = ReferenceCache(tmp_path, NAME)
        file = cache._open()
        file.execute("PRAGMA cache_size = 1")  # pages go to the file before the end of the transaction
        cache._file = file

        class Rows(list[tuple[bytes, bytes]]):
            def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
                for i in range(5000):
                    yield i.to_bytes(16, "little"), bytes(400)
                os.kill(os.getpid(), signal.SIGKILL)

        cache._run("INSERT OR IGNORE INTO logps VALUES (?, ?)", Rows([(b"", b"")]))

    assert forks.wait(forks.fork(die)) == -signal.SIGKILL
    assert list(tmp_path.glob("*-journal")), "it was killed in the midst of it"
    found = groups()
    assert filled(tmp_path, found) == 8, "the four that were whole are there"
    assert columns(found) == EXPECTED
    with sqlite3.connect(next(tmp_path.glob("*.sqlite"))) as file:
        assert file.execute("SELECT count(*) FROM logps").fetchone() == (12,)


def overwrite(path: Path, start: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(data)


@pytest.mark.parametrize("damage", ["not a database", "torn"])
def test_what_is_damaged_is_computed_again_and_said(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path, groups())
    (path,) = tmp_path.glob("*.sqlite")
    overwrite(path, 0 if damage == "not a database" else 3900, b"nonsense" * 400)
    found = groups()
    with caplog.at_level(logging.WARNING):
        assert filled(tmp_path, found) == 12
    assert columns(found) == EXPECTED
    (told,) = caplog.records
    assert str(path) in told.getMessage() and "delete it" in told.getMessage()


def test_where_nothing_can_be_kept_all_is_computed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    found = groups()
    with caplog.at_level(logging.WARNING):
        assert filled(tmp_path / "file", found) == 12
    assert columns(found) == EXPECTED
    (told,) = caplog.records
    assert "training.reference_cache" in told.getMessage() and str(tmp_path / "file") in told.getMessage()


# ---------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("cached")
    runs.prepare(made)
    return made


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Responses that the reference was asked for, a number for each call."""
    found: list[int] = []
    real = collect.fill_log_probs

    def counted(model: Any, some: Sequence[Group], column: str, *rest: Any) -> None:
        if column == "ref_logp":
            found.append(sum(column not in r.columns for g in some for r in g.responses))
        real(model, some, column, *rest)

    monkeypatch.setattr(collect, "fill_log_probs", counted)
    return found


def cached(folder: Path, algorithm: str, out: str, *more: str) -> list[dict[str, Any]]:
    runs.train(folder, algorithm, out, f"training.reference_cache={folder}/cache-{algorithm}", *more)
    return [{k: v for k, v in line.items() if "second" not in k and k != "time"} for line in runs.metrics(folder, out)]


@pytest.mark.parametrize("algorithm", ["dpo", "kto"])
def test_the_second_run_asks_nothing_and_is_the_same_run(folder: Path, asked: list[int], algorithm: str) -> None:
    first = cached(folder, algorithm, f"{algorithm}-first")
    computed = sum(asked)
    assert computed >= 24, "of 12 pairs"
    second = cached(folder, algorithm, f"{algorithm}-second")
    assert sum(asked) == computed
    assert first == second
    runs.train(folder, algorithm, f"{algorithm}-without")
    assert sum(asked) == 2 * computed
    weights = [runs.weights(folder, f"{algorithm}-{o}") for o in ("first", "second", "without")]
    assert runs.identical(*weights[:2])
    assert runs.difference(weights[0], weights[2]) < 1e-5, "read with other groups, it differs by rounding"


def test_what_is_kept_does_not_depend_on_who_asked_first(folder: Path) -> None:
    """To the last bit: a comparison's figures are the same in whatever order its runs come."""
    kept = []
    for name, words in (("one", ()), ("other", ("training.batch_size=2", "training.seed=5", "training.epochs=1"))):
        where = folder / f"kept-{name}"
        runs.train(folder, "dpo", f"dpo-{name}", f"training.reference_cache={where}", "training.steps=12", *words)
        (file,) = where.glob("*.sqlite")
        with closing(sqlite3.connect(file)) as connection:
            kept.append(dict(connection.execute("SELECT key, logp FROM logps").fetchall()))
    assert len(kept[0]) == 24
    assert kept[0] == kept[1]


def test_runs_that_train_something_else_share_it(folder: Path, asked: list[int]) -> None:
    cached(folder, "dpo", "shared", "algorithm.beta=0.3", "training.seed=0")
    before = sum(asked)
    cached(folder, "dpo", "lora", "adapter=lora", "training.batch_size=3", "training.seed=5", "algorithm.beta=0.5")
    assert sum(asked) == before
    plain = "training.batch_size=3", "training.seed=5", "algorithm.beta=0.5"
    runs.train(folder, "dpo", "lora-without", "adapter=lora", *plain)
    found = [runs.weights(folder, out) for out in ("lora", "lora-without")]
    assert runs.difference(*found) < 1e-3


KINDS = {
    "full": ["adapter=none"],
    "again": ["adapter=none", "training.seed=5"],
    "lora": ["adapter=lora"],
    "frozen": ["adapter=none", "model.freeze_layers=1"],
    "float32": ["adapter=none", "training.mixed_precision=no"],
    "pure": ["adapter=none", "training.mixed_precision=pure"],
    "pure lora": ["adapter=lora", "training.mixed_precision=pure"],
}
"""Runs of a bfloat16 model whose references differ in what tensors are held or multiplied in, but for two pairs."""


def test_runs_share_it_where_they_compute_the_same_numbers(folder: Path) -> None:
    kept: dict[str, tuple[str, dict[bytes, bytes]]] = {}
    for kind, words in KINDS.items():
        where = folder / f"precision-{kind}"
        more = ("model.dtype=bfloat16", "training.steps=1", "training.batch_size=12", *words)
        runs.train(folder, "dpo", where.name, f"training.reference_cache={where}/cache", *more)
        (file,) = (where / "cache").glob("*.sqlite")
        with closing(sqlite3.connect(file)) as connection:
            kept[kind] = (file.name, dict(connection.execute("SELECT key, logp FROM logps").fetchall()))
    assert all(a[1] == b[1] for a, b in itertools.combinations(kept.values(), 2) if a[0] == b[0])
    name = {kind: name for kind, (name, _) in kept.items()}
    assert name["full"] == name["again"] and name["pure"] == name["pure lora"]
    assert len(set(name.values())) == 5


def test_a_reference_that_moves_and_one_of_samples_are_not_kept(folder: Path) -> None:
    cached(folder, "dpo", "moving", "source.ref_update_interval=1", f"training.reference_cache={folder}/none")
    cached(folder, "grpo", "sampled", f"training.reference_cache={folder}/none")
    assert not (folder / "none").exists()


def test_several_processes_share_it(folder: Path, asked: list[int]) -> None:
    """Each keeps what it has read; another run, of one process, need not ask."""
    forks.train(folder, "dpo", "two", f"training.reference_cache={folder}/cache-two")
    (path,) = (folder / "cache-two").iterdir()
    with sqlite3.connect(path) as file:
        assert file.execute("SELECT count(*) FROM logps").fetchone() == (24,)
    runs.train(folder, "dpo", "one", f"training.reference_cache={folder}/cache-two")
    assert sum(asked) == 0
    assert runs.difference(*(runs.weights(folder, out) for out in ("one", "two"))) < 1e-3
