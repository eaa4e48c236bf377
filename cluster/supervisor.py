"""Supervisor process of a forked local job: it enforces the time limit, and ends all ranks when one fails.

It survives the driver and the warm process.

`cluster.warm_start` forks the ranks of a job and then executes this module in their parent. So the command line contains the
submission's folder, the environment contains the GPUs, and the supervisor holds no copy of the ranks' imports.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from cluster.processes import start_time

_PR_SET_CHILD_SUBREAPER = 36  # from linux/prctl.h
_WARNING_SECONDS = 30.0  # between SIGUSR2 and the time limit, as in submitit
_GRACE_SECONDS = 1.0  # between SIGINT and SIGKILL, as in submitit
_FAILURE_GRACE_SECONDS = 5.0  # for ranks whose peer has failed, to end by themselves


class _RankFailed(Exception):
    """A rank was killed, or exited with an error."""


def main(folder: Path, gate: int, seconds: float, pids: Sequence[int]) -> None:
    """Send this job's id to the driver, start the ranks once it has answered, and end them at the time limit.

    Standard input is a socket to the driver. Without its answer the ranks do not start: if the driver has died, the next
    driver may already have searched for jobs and missed this one.

    Args:
        folder: folder of the submission and its logs.
        gate: pipe from which each rank reads one byte before it starts; at end of file ranks exit.
        seconds: time limit.
        pids: process ids of the ranks, children of this process.
    """
    # Adopt children of killed ranks, such as an engine that holds GPU memory.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    ranks = [psutil.Process(pid) for pid in pids]
    signal.signal(signal.SIGTERM, lambda number, frame: _forward(ranks, number))
    os.write(0, f"{os.getpid()}:{start_time(os.getpid())}\n".encode())
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
    """Append standard output and error to files; take standard input from /dev/null."""
    for descriptor, path, mode in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY), (2, err, os.O_WRONLY)):
        opened = os.open(path, mode | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(opened, descriptor)
        os.close(opened)


def kill_tree(process: psutil.Process) -> list[psutil.Process]:
    """Kill a process and its descendants; return them."""
    tree = [process]
    with suppress(psutil.NoSuchProcess):  # it has just ended
        tree = [*process.children(recursive=True), process]
    for member in tree:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    return tree


def _wait(ranks: list[psutil.Process], seconds: float) -> None:
    """Wait until all ranks have ended or the time limit is over; a few seconds more once one has failed."""

    def check_end(rank: psutil.Process) -> None:
        if rank.returncode:  # type: ignore[attr-defined]  # set by wait_procs
            _log_failure(rank, ranks.index(rank))
            raise _RankFailed

    warning = min(_WARNING_SECONDS, seconds / 2)
    try:
        _, alive = psutil.wait_procs(ranks, seconds - warning, check_end)
        _forward(alive, signal.SIGUSR2)
        _, alive = psutil.wait_procs(alive, warning, check_end)
    except _RankFailed:
        # The others may wait for it in a collective operation. srun --kill-on-bad-exit ends the ranks of Slurm jobs likewise.
        psutil.wait_procs(ranks, _FAILURE_GRACE_SECONDS)
        return
    if alive:
        sys.stderr.write(f"the time limit of {seconds / 60:g} minutes is over\n")


def _log_failure(rank: psutil.Process, number: int) -> None:
    """Write to the log of rank 0, which the driver reports, how a rank failed."""
    code: int = rank.returncode  # type: ignore[attr-defined]  # set by wait_procs
    if code < 0:
        sys.stderr.write(
            f"rank {number} (process {rank.pid}) was killed by signal {-code} ({signal.strsignal(-code)})\n"
        )
    elif number:
        sys.stderr.write(f"rank {number} exited with code {code}; see {os.getpid()}_{number}_log.err\n")


def _forward(ranks: list[psutil.Process], number: int) -> None:
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.send_signal(number)


def _end(ranks: list[psutil.Process]) -> None:
    """End the remaining ranks and all descendants."""
    tree = psutil.Process().children(recursive=True)
    _forward(ranks, signal.SIGINT)
    _, alive = psutil.wait_procs(tree, _GRACE_SECONDS)
    for member in alive:
        with suppress(psutil.NoSuchProcess):
            member.kill()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), [int(pid) for pid in sys.argv[4:]])
