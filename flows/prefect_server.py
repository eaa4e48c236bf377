"""Prefect's command line (`python -m prefect`) for a server that collects garbage outside its event loop's thread.

An aborted request leaves an SQLite cursor in a reference cycle. The thread that frees the cursor waits for the cursor's
connection, whose thread may wait up to a minute for a write lock. If the event loop's thread frees it while the holder of
the lock waits for the event loop, the server hangs until SQLite times out.
"""

import fcntl
import gc
import itertools
import runpy
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from montessori_core.locks import take_lock

_LOCAL = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "tmpfs", "rootfs", "apfs", "hfs")
"""File systems of one host."""
_DATABASE = {"connection_url", "driver", "host", "name"}
"""Settings that choose a database."""
_FULL_COLLECTION = 60
"""Every 60th collection includes all generations."""


@contextmanager
def starting_server() -> Iterator[None]:
    """Hold a lock while a server starts: two servers that create or migrate one SQLite database at once fail."""
    with (_home() / "montessori-server.lock").open("w") as lock:
        take_lock(lock, fcntl.LOCK_EX)
        yield


def host_database(claim: bool = False) -> dict[str, str]:
    """Return variables for a server of this host, so that it opens no SQLite file that a server of another host may open.

    In a home folder that hosts share, the first host with `montessori up` keeps Prefect's default file with its runs; each
    other has its own.

    Args:
        claim: keep the default file for this host, unless another has it.
    """
    from prefect.settings import get_current_settings

    home, host = _home(), socket.gethostname()
    if not _is_shared(home) or get_current_settings().server.database.model_fields_set & _DATABASE:
        return {}
    record = home / "montessori-database-host"
    owner = record.read_text() if record.exists() else ""
    if claim and not owner:
        record.write_text(host)
    if owner in ("", host):
        return {}
    return {"PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home / f'prefect-{host}.db'}"}


def _home() -> Path:
    """Return Prefect's folder; make it if it is missing."""
    from prefect.settings import get_current_settings

    home = get_current_settings().home
    home.mkdir(parents=True, exist_ok=True)
    return home


def _is_shared(folder: Path) -> bool:
    """Return whether other hosts may have a folder, too."""
    folder = folder.resolve()
    mounts = [mount for mount in psutil.disk_partitions(all=True) if folder.is_relative_to(mount.mountpoint)]
    return bool(mounts) and max(mounts, key=lambda mount: len(mount.mountpoint)).fstype not in _LOCAL


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
