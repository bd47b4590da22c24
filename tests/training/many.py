"""Many runs in one set of processes, since starting those takes longer than the runs: `torchrun … many.py JOBS.json`.

A job is `{"folder", "algorithm", "out", "words"}`, and `"chunk"` if log-probs are to come in chunks of so many logits,
`"flat"` if groups are to be in a row without padding, however small they are.
A run that fails leaves its error in `OUT.error`, and ends all.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.training import runs


def spawn(folder: Path, jobs: list[dict[str, Any]], processes: int = 2, timeout: float = 900) -> None:
    """Do jobs in `folder` with `processes` processes, all in one go; raises with what failed."""
    import subprocess

    file = folder / "jobs.json"
    file.write_text(json.dumps([{"folder": str(folder), **job} for job in jobs]))
    words = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    words += [f"--master-port={runs.free_port()}", str(Path(__file__)), str(file)]
    done = subprocess.run(
        words, env=runs.environment(), cwd=runs.REPOSITORY, capture_output=True, text=True, timeout=timeout
    )
    errors = [p.read_text() for j in jobs if (p := folder / f"{j['out']}.error").exists()]
    assert done.returncode == 0 and not errors, "\n".join([*errors, done.stderr[-3000:]])


def main(file: Path) -> None:
    import os

    import torch

    from alignlab.launch import quiet
    from alignlab.models import log_probs, packed_model

    quiet()
    torch.set_num_threads(1)
    usual, worthwhile = log_probs.CHUNK_ELEMENTS, packed_model.worthwhile
    for job in json.loads(file.read_text()):
        log_probs.CHUNK_ELEMENTS = job.get("chunk", usual)
        packed_model.worthwhile = (lambda groups, device: True) if job.get("flat") else worthwhile
        folder = Path(job["folder"])
        try:
            runs.train(folder, job["algorithm"], job["out"], "training.progress=off", *job["words"])
        except Exception:  # the others may be waiting for this process: nothing can go on
            with (folder / f"{job['out']}.error").open("a") as error:
                error.write(f"process {os.environ['RANK']}: {job}: {traceback.format_exc()}\n")
            os._exit(1)


if __name__ == "__main__":
    sys.path.insert(0, str(runs.REPOSITORY))
    main(Path(sys.argv[1]))
