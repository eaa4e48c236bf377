"""The process that a forked local job is known by: it holds the job's time limit and outlives driver and warm process.

`cluster.warm_start` forks the ranks of a job and then executes this module in their parent, so that the command line names
the submission's folder, the environment names the GPUs, and the job costs no second copy of what its ranks have imported.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

_PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h
_WARNING_SECONDS = 30.0  # between SIGUSR2 and the time limit, as submitit has it for local jobs
_GRACE_SECONDS = 1.0  # between SIGINT and SIGKILL, likewise


def main(folder: Path, gate: int, seconds: float, pids: Sequence[int]) -> None:
    """Tell the driver this job's id, let the ranks begin once it has answered, and end them at the time limit.

    Standard input is a socket to the driver. Without its answer nothing begins: a driver that has died by then can be
    followed by one that looks for jobs before this one could be found.

    Args:
        folder: of the submission; logs are written there.
        gate: pipe that each rank waits for a byte from; at its end ranks leave.
        seconds: time limit.
        pids: of the ranks, children of this process.
    """
    # What a rank that was killed has started (an engine that holds a GPU's memory) becomes a child of this process.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    ranks = [psutil.Process(pid) for pid in pids]
    signal.signal(signal.SIGTERM, lambda number, frame: _forward(ranks, number, frame))
    os.write(0, f"{os.getpid()}:{psutil.Process().create_time()}\n".encode())
    answer = os.read(0, 1)
    if not answer:
        return
    os.write(gate, answer * len(ranks))
    os.close(gate)
    redirect_output(folder / f"{os.getpid()}_0_log.err", folder / f"{os.getpid()}_0_log.err")
    try:
        with suppress(KeyboardInterrupt):
            _wait(ranks, seconds)
    finally:
        _end(ranks)


def redirect_output(out: Path, err: Path) -> None:
    """Append standard output and error to files, and read nothing from standard input."""
    for descriptor, path, mode in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY), (2, err, os.O_WRONLY)):
        opened = os.open(path, mode | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(opened, descriptor)
        os.close(opened)


def kill_family(process: psutil.Process) -> list[psutil.Process]:
    """Kill a process and all that it has started; return them."""
    family = family_of(process)
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    return family


def family_of(process: psutil.Process) -> list[psutil.Process]:
    """All that a process has started, and at the end itself."""
    with suppress(psutil.NoSuchProcess):  # it has ended since it was found
        return [*process.children(recursive=True), process]
    return [process]


def _wait(ranks: list[psutil.Process], seconds: float) -> None:
    warning = min(_WARNING_SECONDS, seconds / 2)
    _, alive = psutil.wait_procs(ranks, seconds - warning, _log_signal)
    for rank in alive:
        with suppress(psutil.NoSuchProcess):
            rank.send_signal(signal.SIGUSR2)
    _, alive = psutil.wait_procs(alive, warning, _log_signal)
    if alive:
        sys.stderr.write(f"the time limit of {seconds / 60:g} minutes is over\n")


def _log_signal(rank: psutil.Process) -> None:
    code = rank.returncode  # type: ignore[attr-defined]  # which wait_procs sets
    if code is not None and code < 0:
        sys.stderr.write(f"process {rank.pid} was ended by signal {-code} ({signal.strsignal(-code)})\n")


def _forward(ranks: list[psutil.Process], number: int, frame: FrameType | None) -> None:
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.send_signal(number)


def _end(ranks: list[psutil.Process]) -> None:
    """End ranks that are left, and what ranks have started."""
    family = psutil.Process().children(recursive=True)
    _forward(ranks, signal.SIGINT, None)
    _, alive = psutil.wait_procs(family, _GRACE_SECONDS)
    for member in alive:
        with suppress(psutil.NoSuchProcess):
            member.kill()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), [int(pid) for pid in sys.argv[4:]])
