"""What a job of Slurm's runs: the commands of one node, in the processes that submitit has started for them.

A job that comes near its time limit gets USR2, one that is preempted USR2 or TERM, one that is cancelled TERM. The
training loop then saves within its step; other commands, and a process that has only begun, just end. In the first two
cases the batch script has the job queued again (`AFTERWARDS`), and it goes on. submitit would do so from within Python:
too late for a process that does not listen yet, and blind to whether it was cancelled.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from alignlab.core import Interrupted, StartAgain

AFTERWARDS = r"""status=$?
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}  # of an array this task alone
job=${job:-$SLURM_JOB_ID}
slurm() { for _ in 1 2 3; do scontrol "$@" && return; sleep 5; done; return 1; }  # a busy controller may not answer
if [ "$status" = 0 ]; then exit 0; fi
state=$(slurm --oneliner show job "$job") || exit "$status"
if [[ $state != *" JobState=RUNNING "* ]]; then exit "$status"; fi  # cancelled, or queued again already
if [[ $state != *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]; then exit "$status"; fi  # runs elsewhere: node lost
preempted=$(grep -o ' PreemptTime=[0-9]' <<<"$state" || true)
case $status in
  138 | 140 | 143 | 75) ;;  # 75: no memory; to be started again, with a smaller token budget
  *) if [ -z "$preempted" ]; then exit "$status"; fi ;;
esac
if [ "$SECONDS" -lt 60 ] && [ "${SLURM_RESTART_COUNT:-0}" -ge 3 ] && [ -z "$preempted" ]; then
  echo "alignlab: job $job stops within a minute of its start, again and again: is --time too short for --signal?" >&2
  exit "$status"
fi
echo "job $job is queued again and goes on from its checkpoint" >&2
slurm requeue "$job" || echo "job $job could not be queued again; the same command goes on" >&2
exit "$status"
"""
"""The end of the batch script, by what `srun` came to. Its lines are those of the templates in `slurm/`."""


@dataclass(frozen=True)
class Job:
    """Runs the commands of a node in its folder.

    Attributes:
        commands: their names.
    """

    folder: str
    commands: tuple[str, ...]

    def __call__(self) -> None:
        import submitit

        from alignlab.comparison.graph.work import run

        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)  # not submitit's
        restarted = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
        log = Path(submitit.JobEnvironment().paths.stdout)
        try:
            status = run(Path(self.folder), self.commands, log, queued_again=restarted)
        except Interrupted as stop:
            print(f"alignlab: {stop}", file=sys.stderr, flush=True)
            raise SystemExit(128 + getattr(signal, stop.signal)) from stop
        except StartAgain as error:
            print(f"alignlab: {error}", file=sys.stderr, flush=True)
            raise SystemExit(StartAgain.status) from error
        if status:
            raise SystemExit(1)
