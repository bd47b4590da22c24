"""Many runs in one set of processes, since starting those takes longer than the runs.

A job is `{"algorithm", "out", "words"}`, and `"chunk"` if log-probs are to come in chunks of so many logits, `"flat"`
if groups are to be in a row without padding, however small they are. A run that fails ends all, with its error.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.training import forks, runs


def together(folder: Path, jobs: Sequence[dict[str, Any]], processes: int = 2) -> None:
    """Do jobs in `folder` with so many processes, which are forks, all in one go; raises with what failed."""
    forks.import_for([word for job in jobs for word in job["words"]])
    for job in jobs:  # composed here, once for all processes
        runs.config_of(folder, words_of(folder, job))
    log = folder / "jobs.log"
    forks.finish(forks.members(lambda: act(folder, jobs), log, processes), log)


def words_of(folder: Path, job: dict[str, Any]) -> list[str]:
    return runs.words_for(folder, job["algorithm"], job["out"], "training.progress=off", *job["words"])


def act(folder: Path, jobs: Sequence[dict[str, Any]]) -> None:
    from alignlab.launch import quiet
    from alignlab.models import log_probs, packed_model
    from alignlab.training.run import train

    quiet()
    usual, worthwhile = log_probs.CHUNK_ELEMENTS, packed_model.worthwhile
    for job in jobs:
        log_probs.CHUNK_ELEMENTS = job.get("chunk", usual)
        packed_model.worthwhile = (lambda groups, device: True) if job.get("flat") else worthwhile
        try:
            config = runs.config_of(folder, words_of(folder, job))
            train(config, Path(config["out"]))
        except Exception:  # the others may be waiting for this process: nothing can go on
            print(f"process {os.environ['RANK']}: {job}: {traceback.format_exc()}", flush=True)
            os._exit(1)
