"""Prefect's temporary server, where the terminal's driver has no other: it ends with its driver, however that one ends."""

import os
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from prefect.server.api.server import SubprocessASGIServer, create_app
from prefect.settings import get_current_settings

from flows.prefect_server import collect_beside

if TYPE_CHECKING:
    from fastapi import FastAPI

_DRIVER = "MONTESSORI_DRIVER"


class TemporaryServer(SubprocessASGIServer):
    """As Prefect has it; Prefect's clients in this process find it."""

    def _run_uvicorn_command(self) -> subprocess.Popen[Any]:
        where = ["--host", "127.0.0.1", "--port", str(self.port)]
        return subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "--factory", f"{__name__}:app", *where, "--log-level", "error"],
            env={
                **os.environ,
                **get_current_settings().to_environment_variables(exclude_unset=True),
                "PREFECT_UI_ENABLED": "0",
                _DRIVER: str(os.getpid()),
            },
        )


def app() -> "FastAPI":
    """The server's application, in a process that ends when the driver's has ended."""
    driver = int(os.environ[_DRIVER])

    def end_with_driver() -> None:
        while os.getppid() == driver:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=end_with_driver, daemon=True, name="driver").start()
    collect_beside()
    return create_app(ephemeral=True, final=True)
