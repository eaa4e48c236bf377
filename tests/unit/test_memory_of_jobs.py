"""Freed memory of a job is used again."""

import mmap
import subprocess
import sys

import pytest

from support import ROOT

PROGRAM = """
import ctypes, resource, sys
from cluster.memory import keep_freed_memory

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: with huge pages there are few faults to count
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(20):
    bytearray(64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_keep_freed_memory_touches_new_pages_once() -> None:
    kept, returned = (
        int(subprocess.run([sys.executable, "-c", PROGRAM, what], cwd=ROOT, capture_output=True, check=True).stdout)
        for what in ("keep", "return")
    )
    pages = (64 << 20) // mmap.PAGESIZE
    assert returned > 19 * pages  # as glibc does by default
    assert kept < 3 * pages
