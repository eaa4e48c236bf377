"""A temporary Prefect server for a driver in the terminal; it ends with its driver, even if the driver is killed."""

import gc
import os
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    gc.disable()  # a fifth of the time of the imports; the server collects its garbage in a thread

from prefect.server.api.server import SubprocessASGIServer, create_app
from prefect.settings import get_current_settings

from flows.prefect_server import collect_in_thread, host_database

if TYPE_CHECKING:
    from fastapi import FastAPI

_DRIVER = "MONTESSORI_DRIVER"


class TemporaryServer(SubprocessASGIServer):
    """Prefect's temporary server, running `app`; Prefect's clients in this process use it."""

    def _run_uvicorn_command(self) -> subprocess.Popen[Any]:
        # Not by uvicorn's command line, which puts the working directory first on the import path.
        return subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(self.port)],
            env={
                **os.environ,
                **host_database(),
                **get_current_settings().to_environment_variables(exclude_unset=True),
                "PREFECT_UI_ENABLED": "0",
                _DRIVER: str(os.getpid()),
            },
        )


def app() -> "FastAPI":
    """Create the server's application, in a process that ends with the driver."""
    driver = int(os.environ[_DRIVER])

    def end_with_driver() -> None:
        while os.getppid() == driver:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=end_with_driver, daemon=True, name="driver").start()
    collect_in_thread()
    return create_app(ephemeral=True, final=True)


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app(), host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
