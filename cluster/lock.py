"""The driver's lock on a folder: who drives it, and how that process is ended."""

import fcntl
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from montessori_core import layout
from montessori_core.errors import UserError
from montessori_core.files import read_json

_DRIVER_PATIENCE = 240.0  # seconds; Slurm's jobs may take two minutes to end


@contextmanager
def only_driver(folder: Path) -> Iterator[None]:
    """Hold the run's lock; two drivers on one run would submit everything twice.

    Raises:
        UserError: another driver holds it.
    """
    path = folder / layout.DRIVER_LOCK
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refuse_second_driver(folder)
            raise UserError(f"{folder}: another process drove this run until just now; try again") from None
        lock.truncate(0)
        lock.write(json.dumps({"process": os.getpid(), "host": socket.gethostname()}))
        lock.flush()
        yield


def refuse_second_driver(folder: Path) -> None:
    holder = driver_of(folder)
    if holder is not None:
        raise UserError(
            f"{folder}: another process drives this run (process {holder['process']} on {holder['host']}); "
            "wait for it or end it"
        )


def driver_of(folder: Path) -> dict[str, Any] | None:
    """The process that drives a run at present, and its host; None if nobody does."""
    try:
        lock = (folder / layout.DRIVER_LOCK).open()
    except OSError:
        return None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return read_json(folder / layout.DRIVER_LOCK) or {"process": "unknown", "host": "unknown"}
    return None


def end_driver(folder: Path) -> bool:
    """Interrupt the process that drives a run, and wait until it has cancelled its jobs; whether there was one.

    Raises:
        UserError: it runs on another host, or does not leave.
    """
    holder = driver_of(folder)
    if holder is None:
        return False
    if holder["host"] != socket.gethostname():
        raise UserError(
            f"{folder}: driven by process {holder['process']} on {holder['host']}; give this command there, or end that "
            "process first"
        )
    os.kill(holder["process"], signal.SIGINT)
    deadline = time.monotonic() + _DRIVER_PATIENCE
    while driver_of(folder) is not None:
        if time.monotonic() > deadline:
            raise UserError(f"{folder}: process {holder['process']} does not leave; end it and give this command again")
        time.sleep(0.2)
    return True
