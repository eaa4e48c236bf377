"""A PostgreSQL server of this machine, which can be stopped and started."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.prefect_server import free_port

ACCOUNT = "nobody"  # PostgreSQL refuses to run as root


class Database:
    """A server with an empty database."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_port()
        self.url = f"postgresql+asyncpg://prefect@127.0.0.1:{self._port}/postgres"
        if os.geteuid() == 0:
            shutil.chown(folder, ACCOUNT)
        self._call("initdb", "--pgdata", str(folder / "data"), "--username", "prefect", "--auth", "trust")

    def start(self) -> None:
        """Start the server; return when it accepts connections."""
        self._control("start", "--options", f"-p {self._port} -k {self._folder}")

    def stop(self) -> None:
        """Close all connections and stop the server."""
        self._control("stop", "--mode", "fast")

    def _control(self, *words: str) -> None:
        files = ("--pgdata", str(self._folder / "data"), "--log", str(self._folder / "log"))
        self._call("pg_ctl", *words, "--wait", *files)

    def _call(self, *command: str) -> None:
        account = ["setpriv", "--reuid", ACCOUNT, "--clear-groups"] if os.geteuid() == 0 else []
        subprocess.run([*account, *command], check=True, cwd=self._folder, stdout=subprocess.DEVNULL, timeout=120)


@contextmanager
def postgresql() -> Iterator[Database]:
    """Start a server in a temporary folder, which its account can reach."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        database = Database(Path(folder))
        database.start()
        try:
            yield database
        finally:
            database.stop()
