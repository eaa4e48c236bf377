"""Prefect's command line (`python -m prefect`) for a server that collects garbage outside its event loop's thread.

An aborted request leaves an SQLite cursor in a reference cycle. The thread that frees the cursor waits for the cursor's
connection, whose thread may wait up to a minute for a write lock. If the event loop's thread frees it while the holder of
the lock waits for the event loop, the server hangs until SQLite times out.
"""

import fcntl
import gc
import itertools
import os
import runpy
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from montessori_core.locks import take_lock

_FULL_COLLECTION = 60
"""Every 60th collection includes all generations."""


@contextmanager
def starting_server() -> Iterator[None]:
    """Hold a lock while a server starts: two servers that create or migrate one SQLite database at once fail."""
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    home.mkdir(parents=True, exist_ok=True)
    with (home / "montessori-server.lock").open("w") as lock:
        take_lock(lock, fcntl.LOCK_EX)
        yield


def collect_in_thread(pause: float = 1.0) -> None:
    """Collect garbage in a separate thread every `pause` seconds: only that thread waits for a cursor."""

    def collect() -> None:
        for turn in itertools.count(1):
            time.sleep(pause)
            gc.collect(2 if turn % _FULL_COLLECTION == 0 else 1)

    gc.disable()
    threading.Thread(target=collect, daemon=True, name="garbage").start()


if __name__ == "__main__":
    collect_in_thread()
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)
