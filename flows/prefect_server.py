"""Prefect's command line, as `python -m prefect` is, for a server whose garbage is collected beside its event loop.

A request that is given up in the middle leaves a cursor of SQLite behind, in a reference cycle. Whoever frees it waits for
its connection, whose own thread may be waiting for a write lock, for up to a minute. If that is the event loop's thread,
for which the holder of that lock waits in turn, the whole server stands still until SQLite gives up.
"""

import gc
import itertools
import runpy
import threading
import time

_FULL = 60
"""Every so many collections, one of all objects."""


def collect_beside(pause: float = 1.0) -> None:
    """Collect garbage in a thread of its own from now on, every `pause` seconds: only that thread waits for a cursor."""

    def collect() -> None:
        for turn in itertools.count(1):
            time.sleep(pause)
            gc.collect(2 if turn % _FULL == 0 else 1)

    gc.disable()
    threading.Thread(target=collect, daemon=True, name="garbage").start()


if __name__ == "__main__":
    collect_beside()
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)
