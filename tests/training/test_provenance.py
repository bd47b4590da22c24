from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import alignlab
from alignlab.core import AlignlabError, DataError
from alignlab.core.secrets import HIDDEN, redact, without_secrets
from alignlab.training import provenance
from alignlab.training.provenance import collect, write
from tests import tiny

SHA256_OF_ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
SHA256_OF_NOTHING = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
ROOT = Path(__file__).parents[2]


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "init.defaultBranch=main"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


# ------------------------------------------------------------------ what is in it


def test_what_a_run_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["alignlab", "train", "data.path=two words"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    (tmp_path / "a.jsonl").write_bytes(b"abc")
    found = collect({"b": 1, "a": [2]}, [tmp_path / "a.jsonl"], seed=7)
    assert found["data"] == {str(tmp_path / "a.jsonl"): {"bytes": 3, "sha256": SHA256_OF_ABC}}
    assert found["command"] == "alignlab train 'data.path=two words'"
    assert (found["seed"], found["world_size"], found["tokenizer"]) == (7, 1, None)
    assert found["config_sha256"] == hashlib.sha256(b'{"a": [2], "b": 1}').hexdigest()
    assert found["packages"]["torch"] == importlib.metadata.version("torch")
    assert found["python"] == platform.python_version()
    assert found["code"]["alignlab"] == alignlab.__version__
    assert found["hardware"]["cores"] == os.cpu_count()
    assert 1 <= found["hardware"]["usable_cores"] <= os.cpu_count()
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert found["hardware"]["memory_bytes"] == pytest.approx(int(total.split()[1]) * 1024, rel=0.01)
    assert json.loads(json.dumps(found)) == found


def test_the_world_size_is_torchruns_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert collect({}, [])["world_size"] == 4
    assert collect({}, [], world_size=2)["world_size"] == 2


def test_a_missing_package_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "PACKAGES", ("numpy", "no-such-package"))
    assert collect({}, [])["packages"] == {"numpy": importlib.metadata.version("numpy"), "no-such-package": None}


def test_folders_of_data_are_hashed_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "d" / "inner").mkdir(parents=True)
    (tmp_path / "d" / "inner" / "x").write_bytes(b"abc")
    (tmp_path / "d" / "y").write_bytes(b"")
    assert collect({}, [tmp_path / "d"])["data"] == {
        str(tmp_path / "d" / "inner" / "x"): {"bytes": 3, "sha256": SHA256_OF_ABC},
        str(tmp_path / "d" / "y"): {"bytes": 0, "sha256": SHA256_OF_NOTHING},
    }


def test_data_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file"):
        collect({}, [tmp_path / "gone.jsonl"])


def test_no_heavy_package_is_imported_for_it() -> None:
    code = """
import sys
from alignlab.training.provenance import collect
collect({}, [])
print([name for name in ("transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "datasets", "wandb")
       if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------ code


def test_the_commit_and_whether_it_was_changed(tmp_path: Path) -> None:
    package = tmp_path / "checkout" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("a = 1\n")
    assert provenance._git(package) == (None, None)  # no repository
    git(tmp_path / "checkout", "init")
    git(tmp_path / "checkout", "add", ".")
    git(tmp_path / "checkout", "commit", "-m", "first")
    commit = git(tmp_path / "checkout", "rev-parse", "HEAD")
    assert provenance._git(package) == (commit, False)
    (package / "__init__.py").write_text("a = 2\n")
    assert provenance._git(package) == (commit, True)
    git(tmp_path / "checkout", "commit", "-am", "second")
    (package / "new.py").write_text("")
    assert provenance._git(package) == (git(tmp_path / "checkout", "rev-parse", "HEAD"), True)


def test_a_repository_that_it_is_merely_installed_in_is_not_its_own(tmp_path: Path) -> None:
    git(tmp_path, "init")
    (tmp_path / ".gitignore").write_text(".venv/\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "the user's")
    installed = tmp_path / ".venv" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert provenance._git(installed) == (None, None)


def test_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code = provenance._code.__wrapped__()
    assert (code["commit"], code["dirty"]) == (None, None)


def test_the_hash_of_the_sources_notices_contents_names_and_where_files_end(tmp_path: Path) -> None:
    def digest(files: dict[str, str]) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return provenance._tree_digest(folder, "*.py")

    original = digest({"a.py": "1", "b/c.py": "2"})
    assert digest({"b/c.py": "2", "a.py": "1"}) == original
    assert digest({"a.py": "1", "b/c.py": "2", "notes.txt": "3", "b/__pycache__/c.pyc": "4"}) == original
    others = [{"a.py": "1", "b/c.py": "3"}, {"a.py": "1", "b/d.py": "2"}, {"a.py": "1"}, {"a.py": "1b/c.py\0" + "2"}]
    assert original not in [digest(files) for files in others]


# ------------------------------------------------------------------ tokenizer


def tokenizer(words: list[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=words[0], pad_token=words[0])


def tokenizer_hash(of: Any) -> str:
    return collect({}, [], of)["tokenizer"]["sha256"]


def test_a_tokenizers_hash_is_of_how_it_tokenizes() -> None:
    words = ["<unk>", "a", "b", "c"]
    one = tokenizer(words)
    original = tokenizer_hash(one)
    found = collect({}, [], one)["tokenizer"]
    assert found["tokens"] == 4
    assert found["class"] == type(one).__name__
    one(["a b c", "a"], padding=True, truncation=True, max_length=2)  # leaves traces in its state
    assert one.backend_tokenizer.truncation is not None
    assert tokenizer_hash(one) == original
    assert tokenizer_hash(tokenizer(words)) == original

    assert tokenizer_hash(tokenizer(["<unk>", "b", "a", "c"])) != original
    one.chat_template = "{{ messages }}"
    with_template = tokenizer_hash(one)
    assert with_template != original
    one.add_tokens(["d"])
    assert tokenizer_hash(one) not in (original, with_template)
    other_end = tokenizer(words)
    other_end.eos_token = "c"
    assert tokenizer_hash(other_end) != original


def test_a_tokenizer_of_another_make() -> None:
    class Mine:
        def __init__(self, words: str) -> None:
            self.words = words

        def get_vocab(self) -> dict[str, int]:
            return {word: i for i, word in enumerate(self.words)}

        def __len__(self) -> int:
            return len(self.words)

    found = collect({}, [], Mine("abc"))["tokenizer"]
    assert (found["class"], found["tokens"]) == ("Mine", 3)
    assert found["sha256"] == tokenizer_hash(Mine("abc"))
    assert found["sha256"] != tokenizer_hash(Mine("acb"))


@pytest.mark.parametrize("tokenizer", ["made here", pytest.param("real", marks=pytest.mark.real_data)])
def test_a_tokenizer_loaded_twice(tokenizer: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    from transformers import AutoTokenizer

    if tokenizer == "real":
        folder = request.getfixturevalue("stories")
    else:
        folder = tmp_path
        tiny.stories_tokenizer().save_pretrained(folder)
    first, second = (AutoTokenizer.from_pretrained(folder) for _ in range(2))
    second(["Once upon a time", "x"], padding=True, return_tensors="pt")
    assert tokenizer_hash(first) == tokenizer_hash(second)
    assert collect({}, [], first)["tokenizer"]["tokens"] == len(first)


# ------------------------------------------------------------------ secrets


def test_no_secret_gets_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {
        "MY_VARIABLE": "open-sesame-1",
        "WANDB_API_KEY": "open-sesame-2",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["alignlab", "train", "judge.api_key=open-sesame-3", "--token", "open-sesame-4"])
    path = write(tmp_path, collect({"judge": {"api_key": "open-sesame-5"}}, []))
    text = path.read_text()
    assert "sesame" not in text
    assert f"judge.api_key={HIDDEN}" in text


@pytest.mark.parametrize(
    ("argument", "clean"),
    [
        ("judge.api_key=abc", f"judge.api_key={HIDDEN}"),
        ("+hf_token=abc=def", f"+hf_token={HIDDEN}"),
        ("--password=abc", f"--password={HIDDEN}"),
        ("OPENAI_API_KEY=abc", f"OPENAI_API_KEY={HIDDEN}"),
        ("judge={url:x,api_key:abc,model:m}", f"judge={{url:x,api_key:{HIDDEN},model:m}}"),
        ("judge.headers={Authorization: Bearer abc}", f"judge.headers={{Authorization: {HIDDEN}}}"),
        ("url=https://me:abc@example.org/x", f"url=https://{HIDDEN}@example.org/x"),
        ("model=hf_abcdefghijklmnopqrstuvwxyz", f"model={HIDDEN}"),
        # No secrets:
        ("rollout.max_new_tokens=64", "rollout.max_new_tokens=64"),
        ("data.eos_token=</s>", "data.eos_token=</s>"),
        ("training.max_tokens_per_microbatch=8192", "training.max_tokens_per_microbatch=8192"),
        ("model.tokenizer=path/to/it", "model.tokenizer=path/to/it"),
        ("algorithm=reward_model", "algorithm=reward_model"),
        ("url=http://localhost:8000/v1", "url=http://localhost:8000/v1"),
        ("data.key=chosen", "data.key=chosen"),
    ],
)
def test_what_counts_as_a_secret_on_a_command_line(argument: str, clean: str) -> None:
    assert redact(["alignlab", argument]) == ["alignlab", clean]


def test_a_config_without_its_secrets() -> None:
    config = {"a": [{"api_key": "abc", "n": 1}, "https://u:p@h/"], "token": "abc", "eos_token": "</s>", "api_key": None}
    clean = {"a": [{"api_key": HIDDEN, "n": 1}, f"https://{HIDDEN}@h/"], "token": HIDDEN, "eos_token": "</s>"}
    assert without_secrets(config) == {**clean, "api_key": None}
    assert config["token"] == "abc"


# ------------------------------------------------------------------ on disk


def test_a_resumption_is_added_to_what_is_there(tmp_path: Path) -> None:
    path = write(tmp_path / "run", {"seed": 1})
    assert path == tmp_path / "run" / "provenance.json"
    write(tmp_path / "run", {"seed": 2}, resumed=True)
    write(tmp_path / "run", {"seed": 3}, resumed=True)
    assert json.loads(path.read_text()) == {"seed": 1, "resumed": [{"seed": 2}, {"seed": 3}]}
    write(tmp_path / "run", {"seed": 4})
    assert json.loads(path.read_text()) == {"seed": 4}


def test_what_cannot_be_read_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "provenance.json").write_text("{half")
    with pytest.raises(AlignlabError, match=r"provenance\.json: damaged"):
        write(tmp_path, {"seed": 1}, resumed=True)
    assert (tmp_path / "provenance.json").read_text() == "{half"
