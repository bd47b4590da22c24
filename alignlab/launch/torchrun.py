"""torchrun for the nodes of a Slurm job:  python -m alignlab.launch.torchrun --nnodes=2 … -m alignlab train …

Two things differ from `python -m torch.distributed.run`. The signals that ask a run to stop with a checkpoint reach its
processes and leave torchrun alone: it would die of SIGUSR1, and at SIGTERM end the processes 30 seconds later, saved or
not. (Older PyTorch cannot be told so for SIGTERM.) And it ends with the status of the process that failed first, where
torchrun always says 1: 138 and 143, stopped with a checkpoint, are no failures.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun with its own arguments; the exit status: 0, or that of the process that failed first (128 + n where
    signal n ended it)."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    stops = (signal.SIGUSR1, signal.SIGTERM)
    for number in stops:
        signal.signal(number, signal.SIG_IGN)  # and so in the processes until they listen: ask more than once
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGINT,SIGHUP,SIGQUIT")  # torchrun's --signals-to-handle, if any
    if node := os.environ.get("SLURMD_NODENAME"):
        os.environ.setdefault("PET_LOCAL_ADDR", node)  # the name by which other nodes find this one; --local-addr
    try:
        torchrun(list(sys.argv[1:] if arguments is None else arguments))
    except ChildFailedError as failed:
        status = failed.get_first_failure()[1].exitcode
        status = status if status > 0 else 128 - status
        if status not in {128 + number for number in stops}:
            print(failed, file=sys.stderr)
        return status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
