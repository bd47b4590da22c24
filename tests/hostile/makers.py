"""What the cases of the corpus have on disk, beyond files of given content. Each function gets the case's folder and a
folder with a small model (`base`) and records of every kind."""

from __future__ import annotations

import json
import os
import shutil
import socket as sockets
from pathlib import Path
from typing import Any

import yaml


def model(here: Path, prepared: Path) -> None:
    """A copy of the small model, to be damaged."""
    shutil.copytree(prepared / "base", here / "model")


def config_of_model(here: Path, **changes: Any) -> None:
    """Change keys of the copied model's config."""
    path = here / "model/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def pipe(here: Path, prepared: Path) -> None:
    """A FIFO that nobody writes to."""
    os.mkfifo(here / "pipe")
    os.mkfifo(here / "pipe.jsonl")


def socket(here: Path, prepared: Path) -> None:
    """A socket where a file of records should be."""
    former = os.getcwd()
    os.chdir(here)  # a socket's name must be short
    made = sockets.socket(sockets.AF_UNIX)
    made.bind("socket.jsonl")
    made.close()
    os.chdir(former)


def circle(here: Path, prepared: Path) -> None:
    """A link to itself."""
    (here / "circle.jsonl").symlink_to(here / "circle.jsonl")


def dangling(here: Path, prepared: Path) -> None:
    """A link to a file that is not there."""
    (here / "dangling.jsonl").symlink_to(here / "nowhere.jsonl")


def empty_folder(here: Path, prepared: Path) -> None:
    (here / "empty").mkdir()


def folder_like_a_file(here: Path, prepared: Path) -> None:
    (here / "folder.jsonl").mkdir()


def closed_folder(here: Path, prepared: Path) -> None:
    """A folder that may not be read; but by root, for whom it is empty."""
    (here / "closed").mkdir(mode=0o000)


def closed_file(here: Path, prepared: Path) -> None:
    """A file that may not be read; but by root, for whom it is empty."""
    (here / "closed.jsonl").touch(mode=0o000)


def _parquet(path: Path, completions: list[bytes]) -> None:
    """Records whose completions are these bytes, said to be texts."""
    import pyarrow
    from pyarrow import parquet

    texts = pyarrow.array(completions, pyarrow.binary()).cast(pyarrow.string(), safe=False)
    parquet.write_table(pyarrow.table({"prompt": ["a"] * len(completions), "completion": texts}), path)


def parquet_of_bytes(here: Path, prepared: Path) -> None:
    """Parquet of which the second text is not UTF-8."""
    _parquet(here / "r.parquet", [b"b", b"\xff\xfe", b"c", b"d", b"e"])


def cut_parquet(here: Path, prepared: Path) -> None:
    """The first half of a Parquet file."""
    _parquet(here / "r.parquet", [b"b"] * 100)
    content = (here / "r.parquet").read_bytes()
    (here / "r.parquet").write_bytes(content[: len(content) // 2])


def finished_run(here: Path, prepared: Path) -> None:
    """The folder of a finished run of SFT, with checkpoints."""
    shutil.copytree(prepared / "run", here / "run")


def _change_config(here: Path, **sections: Any) -> None:
    path = here / "run/config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **sections}))


def owning_config(here: Path, prepared: Path) -> None:
    """A run whose config would start a program where its algorithm is made."""
    _change_config(here, algorithm={"_target_": "os.system", "command": f"touch {here}/owned"})


def popen_config(here: Path, prepared: Path) -> None:
    """The same by a class."""
    _change_config(here, algorithm={"_target_": "subprocess.Popen", "args": ["touch", f"{here}/owned"]})
