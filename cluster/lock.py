"""The driver's lock on a run folder: take it, find its holder, end its holder."""

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

_END_TIMEOUT = 240.0  # seconds; Slurm jobs may take two minutes to end


@contextmanager
def only_driver(folder: Path) -> Iterator[None]:
    """Hold the lock of a run: two drivers would submit every job twice.

    Raises:
        UserError: another driver holds it.
    """
    path = folder / layout.DRIVER_LOCK
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refuse_second_driver(folder)
            raise UserError(f"{folder}: another driver of this run has just ended; try again") from None
        lock.truncate(0)
        lock.write(json.dumps({"process": os.getpid(), "host": socket.gethostname()}))
        lock.flush()
        yield


def refuse_second_driver(folder: Path) -> None:
    holder = driver_of(folder)
    if holder is not None:
        raise UserError(
            f"{folder}: this run already has a driver (process {holder['process']} on {holder['host']}); "
            "wait for it, or end it with montessori cancel"
        )


def driver_of(folder: Path) -> dict[str, Any] | None:
    """Return the process id and host of a run's driver; None if no driver is running."""
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
    """Interrupt the driver of a run and wait until it has cancelled its jobs; return whether there was a driver.

    Raises:
        UserError: it runs on another host, or does not exit in time.
    """
    holder = driver_of(folder)
    if holder is None:
        return False
    if holder["host"] != socket.gethostname():
        raise UserError(
            f"{folder}: the driver is process {holder['process']} on {holder['host']}; run this command there, or end that "
            "process first"
        )
    os.kill(holder["process"], signal.SIGINT)
    deadline = time.monotonic() + _END_TIMEOUT
    while driver_of(folder) is not None:
        if time.monotonic() > deadline:
            raise UserError(f"{folder}: process {holder['process']} does not exit; kill it and run this command again")
        time.sleep(0.2)
    return True
