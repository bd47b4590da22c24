"""Memory that is freed is kept for what comes next."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from alignlab.core.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()

def work():
    for size in (1 << 22, 3 << 20, 1 << 21):  # 16, 12 and 8 MB
        torch.ones(size)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    pieces = [torch.ones(1 << 22) for _ in range(10)]
    del pieces
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is tested is glibc's")
def test_pages_are_asked_for_once() -> None:
    """Ten rounds of 160 MB: the first alone may meet new pages, of 4 KB each."""

    def faults(how: str) -> int:
        # A threshold of one's own, glibc's first one, keeps it from raising the threshold where addresses happen to
        # suit, as it does in every second process. What is set in the process counts for more.
        environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": str(128 << 10)}
        words = [sys.executable, "-c", SCRIPT, how]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout)

    kept, usual = faults("kept"), faults("usual")
    assert kept < 2 * (160 << 20) / 4096
    assert usual > 3 * kept
