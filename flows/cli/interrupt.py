"""Drive a flow so that Ctrl-C cancels its jobs and says which command resumes it."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

import psutil

from flows.cli.console import console

_PATIENCE = 60.0  # seconds between Ctrl-C and leaving without having told Prefect
_SERVER_PATIENCE = 180  # seconds; a first start migrates a database


def interruptible(drive: Callable[[], object], again: str) -> None:
    """Drive a flow; after Ctrl-C say which command goes on."""

    def leave(jobs: str) -> None:
        console.print(f"\ninterrupted: {jobs}, what is done is kept. Go on with:\n  {again}", soft_wrap=True)
        _leave()

    def interrupt(number: int, frame: object) -> None:
        left = "some jobs of this run may still be at work"
        signal.signal(signal.SIGINT, lambda number, frame: leave(left))
        patience = threading.Timer(_PATIENCE, leave, [left])
        patience.daemon = True
        patience.start()
        console.print("\ninterrupted: cancelling the jobs of this run (Ctrl-C again leaves at once)")
        raise KeyboardInterrupt

    _start_server()
    signal.signal(signal.SIGINT, interrupt)
    try:
        drive()
    except BaseException as error:
        if not _interrupted(error):
            raise
        leave("the jobs were cancelled")


def _start_server() -> None:
    """Start Prefect's server for this run, if there is no other, where Ctrl-C in the terminal does not reach it.

    Prefect waits for it to take note of how the run ended. A signal that is blocked here is blocked in what is started.
    """
    from prefect.client.base import ServerType, determine_server_type

    if determine_server_type() is not ServerType.EPHEMERAL:
        return
    from flows.temporary_server import TemporaryServer

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        TemporaryServer().start(_SERVER_PATIENCE)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def _leave() -> None:
    sys.stdout.flush()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()  # Prefect's server for this run, and local jobs that are left
    os._exit(130)  # Prefect's threads would report at length that their server is gone


def _interrupted(error: BaseException | None) -> bool:
    """Whether an error is, or came of, Ctrl-C or SIGTERM: what follows them fails in many ways."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "TerminationSignal":
            return True
        error = error.__cause__ or error.__context__
    return False
