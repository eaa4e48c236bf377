"""A Prefect server on this machine: found or started, and asked for a login; the runs' reports are served beside it."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from rich.console import Console

from montessori_core import layout
from montessori_core.config import RUN_NAME
from montessori_core.errors import UserError

_LOOPBACK = "127.0.0.1"
_SERVER_PATIENCE = 180.0  # seconds; a first start migrates a database


@contextmanager
def prefect_api(port: int, log: Path, console: Console) -> Iterator[str]:
    """The address of the server that Prefect's settings name, of one on this machine, or of one that is started here."""
    # In a process of its own: once settings are read, this one would not heed a server that is named later.
    ask = "from prefect.settings import PREFECT_API_URL; print(PREFECT_API_URL.value() or '')"
    named = subprocess.run([sys.executable, "-c", ask], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    if named:
        if not answers(named):
            raise UserError(f"no Prefect server answers at {named} (PREFECT_API_URL); start it, or unset the variable")
        check_login(named)
        yield named
        return
    api = f"http://{_LOOPBACK}:{port}/api"
    os.environ["PREFECT_API_URL"] = api
    if answers(api):
        check_login(api)
        yield api
        return
    if "PREFECT_SERVER_API_AUTH_STRING" not in os.environ:
        console.print(
            "no login: whoever has an account on this machine can start runs as you. If others do, set "
            "PREFECT_SERVER_API_AUTH_STRING and PREFECT_API_AUTH_STRING to the same user:password (docs/security.md)",
            soft_wrap=True,
        )
    start = ["server", "start", "--host", _LOOPBACK, "--port", str(port)]
    with log.open("w") as output:
        # A session of its own: Ctrl-C is for us, who end it after the flow runs.
        server = subprocess.Popen(
            [sys.executable, "-m", "flows.prefect_server", *start],
            env=server_environment(port),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        try:
            with console.status("starting a Prefect server"):
                wait_for_server(server, api)
        except UserError as error:
            raise UserError(f"{error}; try another --port, and see {log}") from error
        check_login(api)
        yield api
    finally:
        _end(server)


def server_environment(port: int) -> dict[str, str]:
    """Environment of a Prefect server on this machine."""
    return {
        **{key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"},  # it would reach the UI
        "PREFECT_SERVER_API_HOST": _LOOPBACK,
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # By default any page that is open in a browser here may start runs; the UI is of the server's own origin.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://{_LOOPBACK}:{port}",
        "PREFECT_SERVER_UI_API_URL": "/api",  # of the host that the browser sees: the port may be a tunnel's
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        # The recorder of task runs drops what it cannot keep up with; in batches it keeps up.
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "200",
        "PREFECT_LOGGING_LEVEL": "WARNING",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    }


def wait_for_server(server: "subprocess.Popen[bytes]", api: str) -> None:
    """Return when the server that was started answers.

    Raises:
        UserError: it ended, or does not answer in time; it is ended then.
    """
    deadline = time.monotonic() + _SERVER_PATIENCE
    while not answers(api):
        if server.poll() is not None or time.monotonic() > deadline:
            _end(server)
            raise UserError(f"the Prefect server at {api} did not start")
        time.sleep(0.3)


def _end(server: "subprocess.Popen[bytes]") -> None:
    server.terminate()
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(api: str) -> bool:
    try:
        with urllib.request.urlopen(f"{api}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError, ValueError):
        return False


def check_login(api: str) -> None:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError

    with get_client(sync_client=True) as client:
        try:
            client.read_work_pools(limit=1)
        except PrefectHTTPStatusError as error:
            if error.response.status_code not in (401, 403):
                raise
            raise UserError(
                f"the Prefect server at {api} asks for a login; set PREFECT_API_AUTH_STRING=user:password (or "
                "PREFECT_API_KEY for Prefect Cloud)"
            ) from None


@contextmanager
def served_reports(root: Path, port: int) -> Iterator[str]:
    """Serve the runs' reports, and nothing else, to this machine; on another port if that one is taken."""

    class Report(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            run, _, name = self.path.strip("/").partition("/")
            path = root / run / layout.REPORT
            if not re.fullmatch(RUN_NAME, run) or ".." in run or name != layout.REPORT or not path.is_file():
                self.send_error(404, "no such report")
                return
            content = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    try:
        server = ThreadingHTTPServer((_LOOPBACK, port), Report)
    except OSError:
        server = ThreadingHTTPServer((_LOOPBACK, 0), Report)
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{_LOOPBACK}:{server.server_port}"
        server.shutdown()
