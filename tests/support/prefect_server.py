"""`montessori up` on a free port, and a client of Prefect's API."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import yaml

import support
from flows.local_server import server_environment, wait_for_server
from support import ROOT
from support.killed_jobs import jobs_of

CANARY = "hf_canary-that-nobody-should-write-down"
ENDS = ("Completed", "Failed", "Cancelled", "Crashed")

wait_until = partial(support.wait_until, pause=0.3)  # conditions ask the server


def free_port() -> int:
    """Return a free port below those that the system gives to clients' connections: none takes it before its server."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextmanager
def prefect_server(
    home: Path,
    port: int | None = None,
    kill: bool = False,
    python: str = sys.executable,
    host: str = "127.0.0.1",
    **settings: str,
) -> Iterator[dict[str, str]]:
    """Start a Prefect server with its database in `home`; yield the environment variables for drivers.

    When the block ends, the server is asked to end, or killed. `python` may be that of another version of Prefect.
    """
    port = port or free_port()
    api = f"http://{host}:{port}/api"
    environment = server_environment(port) | {"PREFECT_HOME": str(home), "PREFECT_SERVER_UI_ENABLED": "false"}
    command = [python, "-m", "prefect", "server", "start", "--host", host, "--port", str(port)]
    with (home / "server.log").open("a") as log:
        server = subprocess.Popen(command, env=environment | settings, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for_server(server, api)
        yield {"PREFECT_API_URL": api}
    finally:
        with suppress(ProcessLookupError):  # it did not start
            os.killpg(server.pid, signal.SIGKILL if kill else signal.SIGTERM)
        server.wait(60)


class Inbox:
    """A server that receives the messages of a notification block."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        messages = self.messages

        class Post(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                messages.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
                self.send_response(200)
                self.end_headers()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Post)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop the server."""
        self._server.shutdown()


class Server:
    """`montessori up` in a folder, and a client of Prefect's API: of its own server, or of one at an address."""

    def __init__(self, folder: Path, deployments: list[dict[str, Any]], api: str | None = None) -> None:
        self.folder, self.runs = folder, folder / "runs"
        (folder / "prefect.yaml").write_text(yaml.safe_dump({"name": "test", "deployments": deployments}))
        self.deployments = len(deployments)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}" if api is None else api.removesuffix("/api")
        self.environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "PREFECT_HOME": str(folder / "prefect"),
            "HF_TOKEN": CANARY,
            "COLUMNS": "200",
            **({} if api is None else {"PREFECT_API_URL": api}),
        }
        self.process = self.up()

    def up(self) -> subprocess.Popen[str]:
        """Start the server; return when it responds."""
        log = (self.folder / "up.log").open("a")
        begun = (self.folder / "up.log").stat().st_size
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "up", "--port", str(self.port)],
            cwd=self.folder,
            env=self.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        wait_until(lambda: b"press Run" in (self.folder / "up.log").read_bytes()[begun:], process=process)
        wait_until(lambda: len(self.ask("deployments/filter", {})) >= self.deployments, process=process)
        return process

    def ask(self, path: str, content: dict[str, Any] | list[Any] | None = None, method: str | None = None) -> Any:
        """Return the API's response to a GET, or to a POST (or another method) of `content`."""
        data = None if content is None else json.dumps(content).encode()
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/api/{path}", data, kind, method=method)
        while True:
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    body = answer.read()
                return json.loads(body) if body else None
            except urllib.error.HTTPError as error:
                if error.code != 503:  # database busy: clients retry
                    raise
                time.sleep(1)

    def deployment(self, name: str, flow: str = "montessori") -> dict[str, Any]:
        """Return a deployment by its name."""
        found: dict[str, Any] = self.ask(f"deployments/name/{flow}/{name}")
        return found

    def start(self, deployment: str, run: str, **parameters: Any) -> str:
        """Start a run by the API; return its id."""
        preset = self.deployment(deployment)
        experiment = preset["parameters"]["experiment"] | {"name": run} | parameters.pop("experiment", {})
        content = {"parameters": {"experiment": experiment, **parameters}, "state": {"type": "SCHEDULED"}}
        return str(self.ask(f"deployments/{preset['id']}/create_flow_run", content)["id"])

    def run_named(self, name: str) -> str | None:
        """Return the flow run with an experiment's name."""
        for run in self.ask("flow_runs/filter", {"sort": "START_TIME_DESC"}):
            if run["parent_task_run_id"] is None and run["parameters"].get("experiment", {}).get("name") == name:
                return str(run["id"])
        return None

    def state(self, run: str) -> str:
        """Return the name of a flow run's state."""
        return str(self.ask(f"flow_runs/{run}")["state"]["name"])

    def wait_for(self, run: str, *names: str, seconds: float = 300.0) -> None:
        """Wait until a flow run is in one of the named states."""

        def reached() -> bool:
            state = self.state(run)
            assert state in names or state not in ENDS, f"{state}: {self.logs(run)[-3000:]}"
            return state in names

        wait_until(reached, seconds, lambda: f"{self.state(run)}: {self.logs(run)[-3000:]}")

    def unfinished_runs(self, deployment: str) -> list[str]:
        """Return the unfinished runs of a deployment."""
        content = {"deployments": {"id": {"any_": [deployment]}}}
        found = self.ask("flow_runs/filter", content)
        return [run["id"] for run in found if run["state"]["name"] in ("Pending", "Running")]

    def set_state(self, run: str, state: str) -> None:
        """Set a flow run's state, as the UI's buttons do."""
        self.ask(f"flow_runs/{run}/set_state", {"state": {"type": state, "name": state.capitalize()}, "force": True})

    def logs(self, run: str) -> str:
        """Return the messages of a flow run and of its subflows."""
        ids = [run, *self.subflows(run)]
        content = {"logs": {"flow_run_id": {"any_": ids}}, "sort": "TIMESTAMP_ASC", "limit": 200}
        found: list[str] = []
        while page := self.ask("logs/filter", content | {"offset": len(found)}):
            found += [entry["message"] for entry in page]
        return "\n".join(found)

    def subflows(self, run: str) -> list[str]:
        """Return the ids of a flow run's subflows, at any depth."""
        found = self.ask("flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}})
        return [identity for flow in found for identity in (flow["id"], *self.subflows(flow["id"]))]

    def task_runs(self, run: str) -> list[dict[str, Any]]:
        """Return the task runs of a flow run's subflows."""
        content = {"task_runs": {"flow_run_id": {"any_": [run, *self.subflows(run)]}}, "limit": 200}
        found: list[dict[str, Any]] = self.ask("task_runs/filter", content)
        return found

    def wait_for_tasks(self, run: str, names: set[str]) -> None:
        """Wait until named tasks of a finished flow run are recorded as completed: Prefect does so a little later."""

        def completed() -> set[str]:
            return {str(task["name"]) for task in self.task_runs(run) if task["state_name"] == "Completed"}

        wait_until(lambda: names <= completed(), 60, lambda: str(completed()))

    def artifacts(self, run: str) -> list[dict[str, Any]]:
        """Return the artifacts of a flow run and of its subflows."""
        ids = [run, *self.subflows(run)]
        content = {"artifacts": {"flow_run_id": {"any_": ids}}, "limit": 200}
        found: list[dict[str, Any]] = self.ask("artifacts/filter", content)
        return found

    def counts(self, run: str) -> dict[str, tuple[int, int, int]]:
        """Return the shards done before, computed now and failed, by stage, in the last attempt."""
        counts = {}
        for artifact in sorted(self.artifacts(run), key=lambda a: str(a["created"])):
            if artifact["type"] == "table" and ": shards of " in str(artifact["description"]):
                [row] = json.loads(artifact["data"])
                stage = Path(artifact["description"].rpartition(": shards of ")[2])
                name = str(stage.relative_to(self.runs.resolve())).partition("/")[2]
                counts[name] = (row["done before"], row["computed now"], row["failed"])
        return counts

    def copy_of(self, finished: str, name: str, *missing: str) -> Path:
        """Copy the run `finished` without the stages `missing` of its iteration; return the new run."""
        folder = self.runs / name
        shutil.copytree(self.runs / self.ask(f"flow_runs/{finished}")["name"], folder)
        for stage in missing:
            shutil.rmtree(folder / "iteration-1" / stage)
        return folder

    def python(self, program: str) -> str:
        """Run a Python program that uses this server; return its output."""
        environment = self.environment | {"PREFECT_API_URL": f"{self.url}/api"}
        command = [sys.executable, "-c", program]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    def jobs(self) -> list[psutil.Process]:
        """Return the jobs of this server's runs that are alive."""
        return jobs_of(self.runs)

    def hold_job(self, seconds: float = 120.0) -> None:
        """Wait for a job and suspend it, so that it is still there when the test needs it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with suppress(psutil.NoSuchProcess):  # it has just ended
                for job in self.jobs():
                    for process in [*job.children(recursive=True), job]:
                        process.suspend()
                    return
        raise AssertionError("no job was started")

    def driver(self, run: str) -> psutil.Process:
        """Return the process of a flow run."""
        name = self.ask(f"flow_runs/{run}")["parameters"]["experiment"]["name"]
        return psutil.Process(json.loads((self.runs / name / "driver.lock").read_text())["process"])
