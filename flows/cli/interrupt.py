"""Commands that are interrupted: Ctrl-C cancels the jobs of a flow and prints the command that resumes it."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from cluster.backends.base import JobsRemain
from cluster.backends.held import end_held_jobs
from cluster.backends.sbatch import DRIVER_JOB
from cluster.lock import driven_folder, no_driver
from cluster.status import cancel_jobs
from flows.cli.console import console
from flows.prefect_api import check_proxies, driver_settings, problem_of, wait_for_api
from montessori_core.config import Cluster
from montessori_core.errors import UserError

_EXIT_TIMEOUT = 60.0  # seconds from Ctrl-C until the process exits without Prefect's acknowledgement
_REMAINING = "some jobs of this run may still be running; montessori cancel ends them"
STOPPED = (
    "Slurm ends the driver's job; the jobs of this run continue. If Slurm does not start the driver again, resume with"
)
_OUTAGE = 600.0  # seconds for which a driver's job waits for Prefect's server
_SERVER_TIMEOUT = 600  # seconds; a first start migrates a database, slowly on a busy machine


@contextmanager
def cancelled_by_signals() -> Iterator[None]:
    """Have SIGHUP, when the terminal closes, and SIGTERM end the block with SystemExit, so that it cancels its jobs.

    For a command that cannot be resumed: nobody would need the results of its jobs.
    """
    numbers = [number for number in (signal.SIGHUP, signal.SIGTERM) if signal.getsignal(number) == signal.SIG_DFL]

    def end(number: int, frame: object) -> None:
        for again in numbers:
            signal.signal(again, signal.SIG_IGN)  # a shell sends SIGHUP, too, and scancel must not receive it
        raise SystemExit(128 + number)

    for number in numbers:  # not SIGHUP under nohup, which ignores it
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def interruptible(run_flow: Callable[[], object], folder: Path, cluster: Cluster, command: str) -> None:
    """Run a flow that drives `folder`; after Ctrl-C end all jobs in it, and print the command that resumes it."""

    def stop(jobs: str) -> None:
        console.print(f"\ninterrupted: {jobs}, finished work is kept. Resume with:\n  {command}", soft_wrap=True)
        _exit()

    def stop_at_once() -> None:
        driven = driven_folder()
        with suppress(JobsRemain):
            if driven is not None:
                end_held_jobs(driven, patience=0.0)
        stop(_REMAINING)

    def interrupt(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, lambda number, frame: stop_at_once())
        timer = threading.Timer(_EXIT_TIMEOUT, stop_at_once)
        timer.daemon = True
        timer.start()
        console.print("\ninterrupted: cancelling the jobs of this run (Ctrl-C again exits at once)")
        raise KeyboardInterrupt

    api = _open_api()
    signal.signal(signal.SIGINT, interrupt)
    try:
        with driver_settings():
            run_flow()
    except BaseException as error:
        if _cause(error, "DriverStopped"):
            console.print(f"\n{STOPPED}:\n  {command}", soft_wrap=True)
            _exit(end_steps=False)
        if _cause(error, "KeyboardInterrupt", "TerminationSignal"):
            stop(_end_jobs(folder, cluster))
        if (problem := problem_of(api)) is not None:
            raise UserError(
                f"the run lost its Prefect server at {api}: {problem}; finished work is kept. Resume with:\n  {command}"
            ) from error
        if (refusal := _cause(error, "Abort", "PrefectHTTPStatusError")) is not None:
            reason = str(refusal).partition("\n")[0]
            raise UserError(
                f"Prefect's server could not record the run ({reason}); see whether the disk with its database is full. "
                f"Finished work is kept. Resume with:\n  {command}"
            ) from error
        raise


def _end_jobs(folder: Path, cluster: Cluster) -> str:
    """End the jobs of an interrupted flow, and those of other stages that an earlier driver left; say whether they ended."""
    try:
        with no_driver(folder):
            cancel_jobs(folder, cluster)
    except (UserError, OSError) as error:  # also another driver, whose jobs they are
        return f"{_REMAINING} ({error})"
    return "the jobs were cancelled"


def _open_api() -> str:
    """Check the server of Prefect's settings, or start one for this run if they name none; return its address.

    It starts with SIGINT blocked, which child processes inherit: the server must outlive Ctrl-C, because Prefect waits for
    it to record how the run ended.
    """
    from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE

    check_proxies()
    api: str | None = PREFECT_API_URL.value()
    if api is not None:
        # Nobody would start a driver's job again that ends because the server restarts.
        wait_for_api(api, _OUTAGE if DRIVER_JOB in os.environ else 0.0)
        return api
    if not PREFECT_SERVER_ALLOW_EPHEMERAL_MODE.value():
        raise UserError(
            "PREFECT_API_URL is not set, and PREFECT_SERVER_ALLOW_EPHEMERAL_MODE forbids a server for this run; set "
            "the first or unset the second"
        )
    from flows.prefect_server import starting_server
    from flows.temporary_server import TemporaryServer

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        server = TemporaryServer()
        with starting_server():
            server.start(_SERVER_TIMEOUT)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    return server.api_url


def _exit(end_steps: bool = True) -> None:
    """End this process at once, with Prefect's server for this run and remaining local jobs.

    srun ends its step after SIGTERM. A step whose srun is killed continues, and `montessori cancel` does not find it.
    """
    sys.stdout.flush()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if end_steps and child.name() == "srun":
                child.terminate()
            else:
                child.kill()
    os._exit(130)  # skip the long error reports of Prefect's threads about the missing server


def _cause(error: BaseException | None, *names: str) -> BaseException | None:
    """Return the first exception of one of these types in an error's chain of causes, the error included."""
    while error is not None and type(error).__name__ not in names:
        error = error.__cause__ or error.__context__
    return error
