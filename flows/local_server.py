"""Find or start a Prefect server on this machine, and serve the reports of runs."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from rich.console import Console

from flows.prefect_api import answers, check_api, check_login, check_proxies
from flows.prefect_server import host_database, starting_server
from montessori_core import layout
from montessori_core.config import RUN_NAME
from montessori_core.errors import UserError
from tasks.studies import PAGE as COMPARISON

_LOOPBACK = "127.0.0.1"
_SERVER_TIMEOUT = 180.0  # seconds; a first start migrates a database


@contextmanager
def prefect_api(port: int, log: Path, console: Console) -> Iterator[str]:
    """Yield the API address of the server in Prefect's settings, of one on this machine, or of one started here."""
    from prefect.context import refresh_global_settings_context
    from prefect.settings import PREFECT_API_URL

    check_proxies()
    configured = (PREFECT_API_URL.value() or "").rstrip("/")
    if configured:
        check_api(configured)
        yield configured
        return
    api = f"http://{_LOOPBACK}:{port}/api"
    os.environ["PREFECT_API_URL"] = api
    refresh_global_settings_context()  # Prefect has read its settings before
    if answers(api):
        check_login(api)
        yield api
        return
    if "PREFECT_SERVER_API_AUTH_STRING" not in os.environ:
        console.print(
            "no login: whoever has an account on this machine can start runs as you. To prevent that, set "
            "PREFECT_SERVER_API_AUTH_STRING and PREFECT_API_AUTH_STRING to the same user:password (docs/security.md)",
            soft_wrap=True,
        )
    server: subprocess.Popen[bytes] | None = None
    try:
        with console.status("starting a Prefect server"), starting_server():
            if not answers(api):  # another command has not started it meanwhile
                server = _start_server(port, log)
                try:
                    wait_for_server(server, api)
                except UserError as error:
                    raise UserError(f"{error}; try another --port, and see {log}") from error
        check_login(api)
        yield api
    finally:
        if server:
            _end(server)


def _start_server(port: int, log: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-P", "-m", "flows.prefect_server", "server", "start"]
    with log.open("w") as output:
        # In a new session Ctrl-C does not reach the server: it must outlive the flow runs.
        return subprocess.Popen(
            [*command, "--host", _LOOPBACK, "--port", str(port)],
            env=server_environment(port) | host_database(claim=True),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def server_environment(port: int) -> dict[str, str]:
    """Environment of a Prefect server on this machine."""
    return {
        **{key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"},  # the UI would use it
        "PREFECT_SERVER_API_HOST": _LOOPBACK,
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # By default any web page in a browser on this machine could start runs; allow the server's origin only.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://{_LOOPBACK}:{port}",
        "PREFECT_SERVER_UI_API_URL": "/api",  # relative to the page: the port may be a tunnel's
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        # The task run recorder drops events under load; batches let it keep up.
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "200",
        # By default a server that restarts forgets which runs hold a slot of their deployment's concurrency limit.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_LOGGING_LEVEL": "WARNING",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    }


def wait_for_server(server: "subprocess.Popen[bytes]", api: str) -> None:
    """Wait until a started server answers.

    Raises:
        UserError: it ended or does not answer in time; it is terminated.
    """
    deadline = time.monotonic() + _SERVER_TIMEOUT
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


@contextmanager
def served_reports(root: Path, port: int) -> Iterator[str]:
    """Serve the reports of runs and studies, and nothing else, to this machine; on another port if `port` is taken."""

    class Report(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            run, _, name = self.path.strip("/").partition("/")
            path = root / run / name
            served = name in (layout.REPORT, COMPARISON) and re.fullmatch(RUN_NAME, run) and ".." not in run
            if not served or not path.is_file():
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
        try:
            yield f"http://{_LOOPBACK}:{server.server_port}"
        finally:
            server.shutdown()
