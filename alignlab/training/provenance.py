"""Where a run came from: code, data, tokenizer, packages, machine. Enough to tell whether two runs are comparable."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import alignlab
from alignlab.core import ConfigError, DataError
from alignlab.core.files import read_json, write_json
from alignlab.core.secrets import redact, without_secrets
from alignlab.core.storage import storage_errors
from alignlab.training.checkpoints.hashing import files_below, sha256_each

PROVENANCE = "provenance.json"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "datasets", "numpy")


def collect(
    config: Mapping[str, Any],
    data_files: Iterable[Path],
    tokenizer: Any = None,
    seed: int | None = None,
    world_size: int | None = None,
) -> dict[str, Any]:
    """What a run depends on. Holds no environment variables, and nothing that looks like a secret.

    Takes some 0.1 s, the first time in a process, besides reading the data files. Asks torch about GPUs, which claims
    a context on them: call it in the process that trains.

    Args:
        config: the resolved config; only its hash is kept, since the run's folder has the config itself.
        data_files: files, or folders of files, that records are read from.
        tokenizer: of Hugging Face, or anything with `get_vocab()`; None where there is none.
        world_size: number of processes; WORLD_SIZE as torchrun sets it by default, else 1.

    Returns:
        A dict that JSON can hold; sizes in bytes, hashes SHA-256 in hex. Fields without an answer here are None.

    Raises:
        DataError: a data file cannot be read.
    """
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(redact(sys.argv)),
        "seed": seed,
        "world_size": world_size if world_size is not None else int(os.environ.get("WORLD_SIZE", "1")),
        "code": dict(_code()),
        "config_sha256": _digest(json.dumps(without_secrets(config), sort_keys=True, default=str)),
        "data": _data(data_files),
        "tokenizer": None if tokenizer is None else _tokenizer(tokenizer),
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hardware": _hardware(),
    }


def write(folder: Path, provenance: Mapping[str, Any], resumed: bool = False) -> Path:
    """Write `provenance.json`, atomically.

    Args:
        resumed: the run goes on from a checkpoint: what the file says of its start stays, and this is added to its
            list `resumed`.

    Raises:
        AlignlabError: it cannot be written, or the one to be added to cannot be read.
    """
    path = Path(folder) / PROVENANCE
    whole = dict(provenance)
    if resumed and path.exists():
        whole = read_json(path, "move it away to go on without it")
        before = whole.get("resumed", [])
        whole["resumed"] = [*(before if isinstance(before, list) else [before]), dict(provenance)]
    with storage_errors(path.parent, f"{PROVENANCE} could not be written"):
        write_json(path, whole)
    return path


def check_data(folder: Path, data_files: Iterable[Path], resume: str = "auto") -> None:
    """Refuse to go on over other records than a run has been trained on so far, unless that is wanted.

    Args:
        folder: the run's.
        resume: `training.resume`.

    Raises:
        ConfigError: a file of records is another than when the run was last at work.
    """
    known = _last_session(folder).get("data")
    if not isinstance(known, dict) or resume == "despite_changes":
        return
    for path, now in _data(data_files).items():
        if known.get(path) != now:
            what = "has been edited" if path in known else "is new"
            raise ConfigError(
                f"{path}: {what} since the run in {folder} was trained on its data: choose another out=DIR, "
                "training.resume=never to start anew, or training.resume=despite_changes to go on all the same"
            )


def changed_versions(folder: Path) -> list[str]:
    """What has other versions than when the run in a folder was last at work, as in "torch 2.7.0 → 2.8.0"."""
    session, package = _last_session(folder), Path(alignlab.__file__).parent
    code = {"alignlab": alignlab.__version__, "sources_sha256": _tree_digest(package, "*.py")}
    before = {**session.get("packages", {}), "Python": session.get("python")}
    now = {**{name: _version(name) for name in PACKAGES}, "Python": platform.python_version()}
    for name, key in (("alignlab", "alignlab"), ("alignlab's code", "sources_sha256")):
        before[name], now[name] = session.get("code", {}).get(key), code[key]
    return [
        f"{name} {str(before[name])[:12]} → {str(now[name])[:12]}"
        for name in now
        if before.get(name) is not None and before[name] != now[name]
    ]


def _last_session(folder: Path) -> dict[str, Any]:
    """Where the run in a folder came from when it was last at work; nothing where that is unknown."""
    try:
        found = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        return dict([found, *found.get("resumed", [])][-1])
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@cache
def _code() -> dict[str, Any]:
    """Read once in a process: what runs is what was imported, not what may have become of the files since."""
    package = Path(alignlab.__file__).parent
    commit, dirty = _git(package)
    return {
        "alignlab": alignlab.__version__,
        "commit": commit,
        "dirty": dirty,
        "sources_sha256": _tree_digest(package, "*.py"),
    }


def _tree_digest(folder: Path, pattern: str) -> str:
    """Of the names and contents of all matching files."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob(pattern)):
        contents = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(contents)}\0".encode() + contents)
    return digest.hexdigest()


def _git(package: Path) -> tuple[str | None, bool | None]:
    """Commit, and whether anything differs from it; (None, None) if the package is not part of a checkout.

    That git finds a repository is not enough: the package may be installed somewhere inside one of the user's.
    """
    if _run_git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None, None
    commit = _run_git(package, "rev-parse", "HEAD")
    changes = _run_git(package, "status", "--porcelain")
    return commit or None, None if changes is None else bool(changes)


def _run_git(folder: Path, *arguments: str) -> str | None:
    """What git says, or None where it fails or is not there."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _data(data_files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    paths: list[Path] = []
    for path in map(Path, data_files):
        if not path.exists():
            raise DataError(f"{path}: no such file")
        paths.extend(files_below(path) if path.is_dir() else [path])
    try:
        digests = sha256_each(paths, "hashing data")
        return {str(path): {"bytes": path.stat().st_size, "sha256": digest} for path, digest in digests.items()}
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Its class, size and a hash of everything that decides which tokens a text or a chat becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "to_str"):
        # Its first fields, truncation and padding, are those of the last call: what was tokenized, not how.
        text: str = backend.to_str()
        rules = text[max(text.find('"added_tokens"'), 0) :]
    else:
        rules = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    special = {name: str(token) for name, token in getattr(tokenizer, "special_tokens_map", {}).items()}
    template = getattr(tokenizer, "chat_template", None)
    return {
        "class": type(tokenizer).__name__,
        "tokens": len(tokenizer),
        "sha256": _digest(json.dumps([rules, special, template], sort_keys=True)),
    }


@cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hardware() -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if cuda else []
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
    }


@cache
def _cpu_model() -> str | None:
    try:
        found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or None
