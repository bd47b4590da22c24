"""Batch scripts: a header from the settings, and the body of a template in `slurm/`, which people use by hand too."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from alignlab.core import AlignlabError
from alignlab.launch.slurm.settings import SlurmSettings

BODY = "# ---- run"
"""The line of a template from which on it is taken as it is."""


def templates() -> Path:
    """Where the templates are: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[2]
    for folder in (package / "_slurm", package.parent / "slurm"):
        if folder.is_dir():
            return folder
    raise AlignlabError(f"the batch templates are missing from the installation in {package}: install alignlab again")


def render(
    title: str,
    name: str,
    tasks: Sequence[tuple[int, Sequence[str]]],
    settings: SlurmSettings,
    log: Path,
    folder: Path,
    array: bool = False,
    processes: int | None = None,
) -> str:
    """A batch script.

    Args:
        title: what it does, for whoever reads it.
        name: of the job.
        tasks: (index in the array, words after `alignlab`); one where it is no array.
        log: where it writes; in an array `%a` in it is the index.
        folder: where it works.
        processes: of a run on each node; matters where there are several nodes.
    """
    options: dict[str, object] = {
        "job-name": _quoted(name),
        "output": _quoted(str(log.absolute()).replace("%", "%%").replace("%%a", "%a")),
        "open-mode": "append",
        "chdir": _quoted(str(folder.absolute())),
        "nodes": settings.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": settings.cpus_per_task,
        "mem": f"{round(settings.mem_gb * 1024)}M",
        "time": settings.timeout_min,
        "signal": f"B:USR1@{settings.signal_delay_s}",
        "requeue": None,
    }
    if settings.gpus_per_node:
        options["gpus-per-node"] = settings.gpus_per_node
    for key in ("partition", "account", "qos", "constraint"):
        if (value := getattr(settings, key)) is not None:
            options[key] = _quoted(value)
    if array:
        limit = f"%{settings.array_parallelism}" if settings.array_parallelism < len(tasks) else ""
        options["array"] = f"{_ranges([i for i, _ in tasks])}{limit}"
    for key, value in settings.additional_parameters.items():
        options[key.replace("_", "-")] = None if value is True else _quoted(str(value))
    lines = [
        "#!/bin/bash",
        f"# {title}",
        *(f"#SBATCH --{k}" + ("" if v is None else f"={v}") for k, v in options.items()),
    ]
    lines += ["", "trap asked=yes USR1  # told to stop while the lines below run", *settings.setup]
    lines += [f"PREFIX=({shlex.join(settings.prefix)})", f"PYTHON={shlex.quote(settings.python or sys.executable)}"]
    if processes is not None:
        lines.append(f"PROCESSES_PER_NODE={processes}")
    threads = max(1, settings.cpus_per_task // (processes or 1))
    lines.append(f'export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{threads}}}"')
    if array:
        lines.append('case "$SLURM_ARRAY_TASK_ID" in')
        lines += [f"  {i}) set -- {shlex.join(words)} ;;" for i, words in tasks]
        lines.append("esac")
    else:
        lines.append(f"set -- {shlex.join(tasks[0][1])}")
    return "\n".join(lines) + "\n\n" + _body("many_nodes" if settings.nodes > 1 else "one_node")


def _body(template: str) -> str:
    path = templates() / f"{template}.sbatch"
    _, mark, body = path.read_text().partition(f"\n{BODY}")
    if not mark:
        raise AlignlabError(f"{path}: has no line '{BODY}', where what runs begins")
    return BODY + body


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 → 0-2,5."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def _quoted(value: str) -> str:
    """As sbatch reads it in a script."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"' if set(value) & set(" '\"\\#$&;") else value
