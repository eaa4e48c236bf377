"""Start times of processes, which tell apart processes of the same id."""

import os
import sys
import time
from pathlib import Path

import psutil


def start_time(pid: int) -> float:
    """Return when a process started: seconds since boot on Linux, since 1970 elsewhere.

    psutil's `create_time` adds the time of boot, which changes whenever the clock is set: a job's process would then look
    like another one.

    Raises:
        psutil.NoSuchProcess: it has ended.
    """
    if sys.platform != "linux":
        return psutil.Process(pid).create_time()
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise psutil.NoSuchProcess(pid) from error
    return int(stat.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")


def seconds_since(started: float) -> float:
    """Return the seconds since a time that `start_time` returned."""
    return (time.clock_gettime(time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.time()) - started
