"""Deployments in Prefect: `montessori up` serves them from this machine, `montessori deploy` gives them to a work pool.

Both read `prefect.yaml`. A deployment's configuration presets the form: what a person sees when they press Run.
"""

import asyncio
import fcntl
import json
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
from contextlib import contextmanager, suppress
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TextIO

import psutil
from rich.console import Console

from flows.prefect_yaml import EVALUATION, EXPERIMENT, STUDY, find_deployments, read_deployments
from montessori_core.atomic import read_json
from montessori_core.config import RUN_NAME
from montessori_core.errors import UserError

_LOOPBACK = "127.0.0.1"
_DRIVERS_PATIENCE = 240.0  # seconds; Slurm's jobs may take two minutes to end
_SERVER_PATIENCE = 180.0  # seconds; a first start migrates a database
_HEARTBEAT, _SILENCE = 30, 100  # seconds between a flow run's signs of life, and without one until it counts as crashed


def up(file: Path | None, root: Path, port: int, console: Console) -> None:
    """Serve the deployments until Ctrl-C, with a Prefect server of our own if there is none yet.

    Raises:
        UserError: the server does not start, or the file does not fit.
    """
    file = file or find_deployments()
    deployments = read_deployments(file)
    state = root.resolve() / ".montessori"
    state.mkdir(parents=True, exist_ok=True)
    with (state / "up.json").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print(f"already up: {(read_json(state / 'up.json') or {}).get('url')}", soft_wrap=True)
            return
        with _server(port, state / "server.log", console) as api, _reports(root.resolve(), port + 1) as reports:
            url = api.removesuffix("/api")
            _note(lock, {"url": url, "process": os.getpid()})
            from flows.experiment import RUN_ROOT
            from tasks.report import REPORTS

            os.environ.update({RUN_ROOT: str(root.resolve()), REPORTS: reports})
            _notice_crashes()
            names = ", ".join(deployment["name"] for deployment in deployments)
            console.print(
                f"Prefect: {url}\ndeployments of {file}: {names}\nruns and reports: {root.resolve()}", soft_wrap=True
            )
            console.print("Open the address, choose a deployment, press Run. Ctrl-C ends this.", soft_wrap=True)
            _serve(deployments)
        _note(lock, {})
    console.print("down; runs go on from where they are when they are retried")


def deploy(file: Path | None, pool: str, console: Console) -> None:
    """Register the deployments for a work pool of the server that Prefect's settings name.

    Raises:
        UserError: there is no such pool, or the server does not answer.
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    deployments = read_deployments(file or find_deployments())
    with get_client(sync_client=True) as client:
        api = str(client.api_url).rstrip("/")
        if not _answers(api):
            raise UserError(f"no Prefect server answers at {api}; set PREFECT_API_URL to the server's address and /api")
        _check_login(api)
        try:
            client.read_work_pool(pool)
        except ObjectNotFound as error:
            raise UserError(
                f"the server at {api} has no work pool {pool!r}; create it: prefect work-pool create {pool} --type process"
            ) from error
    for deployment in deployments:
        _to_deployment(deployment, pool).apply()
        console.print(f"registered {deployment['name']} for work pool {pool}", soft_wrap=True)
    _notice_crashes()
    console.print(f"start a worker where jobs can be submitted: prefect worker start --pool {pool}", soft_wrap=True)


def _serve(deployments: list[dict[str, Any]]) -> None:
    """Serve until SIGINT or SIGTERM; then end the flow runs that are at work, each of which ends its jobs."""
    from prefect.runner import Runner

    # Schedules stay as they are: the next `up` goes on with them.
    runner = Runner(pause_on_shutdown=False, heartbeat_seconds=_HEARTBEAT)
    for one in deployments:
        runner.add_deployment(_to_deployment(one, None))
    # In a thread of its own, so that it neither takes the signals nor kills its flow runs on the way out.
    loop = asyncio.new_event_loop()
    serving = asyncio.run_coroutine_threadsafe(runner.start(), loop)
    threading.Thread(target=loop.run_forever, daemon=True).start()

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    with suppress(KeyboardInterrupt):
        serving.result()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # once is enough
    _end_flow_runs()


def _end_flow_runs() -> None:
    """Interrupt the flow runs that this process has started, and wait until they have ended their jobs."""
    runs = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if "prefect.engine" in child.cmdline() or "prefect.flow_engine" in child.cmdline():
                child.send_signal(signal.SIGINT)
                runs.append(child)
    psutil.wait_procs(runs, timeout=_DRIVERS_PATIENCE)


def _to_deployment(deployment: dict[str, Any], pool: str | None) -> Any:
    from prefect.client.schemas.objects import ConcurrencyLimitConfig
    from prefect.schedules import Cron, Interval
    from prefect.types.entrypoint import EntrypointType

    from flows.evaluation import evaluate
    from flows.experiment import montessori
    from flows.study import compare

    served: Any = {EXPERIMENT: montessori, STUDY: compare, EVALUATION: evaluate}[deployment["entrypoint"]]
    schedules = []
    for schedule in deployment.get("schedules") or []:
        options = {key: schedule[key] for key in ("timezone", "active") if key in schedule}
        if "cron" in schedule:
            schedules.append(Cron(schedule["cron"], **options))
        else:
            schedules.append(Interval(timedelta(seconds=schedule["interval"]), **options))
    limit = deployment.get("concurrency_limit")
    variables = dict(deployment.get("job_variables") or {})
    variables["env"] = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(_HEARTBEAT), **variables.get("env", {})}
    made = served.to_deployment(
        deployment["name"],
        parameters=deployment["parameters"],
        description=deployment.get("description"),
        tags=deployment.get("tags"),
        schedules=schedules,
        concurrency_limit=ConcurrencyLimitConfig(**limit) if isinstance(limit, dict) else limit,
        work_pool_name=pool,
        job_variables=variables if pool else None,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    if _has_schedules(f"{served.name}/{deployment['name']}"):
        made.schedules = None
        made.model_fields_set.discard("schedules")  # so that they are left as they are: paused, or made in the UI
    return made


def _has_schedules(deployment: str) -> bool:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            return bool(client.read_deployment_by_name(deployment).schedules)
        except ObjectNotFound:
            return False


@contextmanager
def _server(port: int, log: Path, console: Console) -> Iterator[str]:
    """The address of the server that Prefect's settings name, of one on this machine, or of one that is started here."""
    # In a process of its own: once settings are read, this one would not heed a server that is named later.
    ask = "from prefect.settings import PREFECT_API_URL; print(PREFECT_API_URL.value() or '')"
    named = subprocess.run([sys.executable, "-c", ask], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    if named:
        if not _answers(named):
            raise UserError(f"no Prefect server answers at {named} (PREFECT_API_URL); start it, or unset the variable")
        _check_login(named)
        yield named
        return
    api = f"http://{_LOOPBACK}:{port}/api"
    os.environ["PREFECT_API_URL"] = api
    if _answers(api):
        _check_login(api)
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
        _check_login(api)
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
    while not _answers(api):
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


def _answers(api: str) -> bool:
    try:
        with urllib.request.urlopen(f"{api}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError, ValueError):
        return False


def _check_login(api: str) -> None:
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
def _reports(root: Path, port: int) -> Iterator[str]:
    """Serve the runs' reports, and nothing else, to this machine; on another port if that one is taken."""

    class Report(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            run, _, name = self.path.strip("/").partition("/")
            path = root / run / "report.html"
            if not re.fullmatch(RUN_NAME, run) or ".." in run or name != "report.html" or not path.is_file():
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


def _notice_crashes() -> None:
    """Have the server mark flow runs as crashed that give no sign of life any more: a lost machine says nothing."""
    from prefect.client.orchestration import get_client
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    name = "montessori: mark runs as crashed that give no sign of life"
    ends = [
        f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed", "Paused", "Suspended")
    ]
    wanted = AutomationCore(
        name=name,
        description=f"A flow run that sent heartbeats, and then none for {_SILENCE} s, has lost its process or its machine.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *ends},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},  # type: ignore[arg-type]
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=_SILENCE),
        ),
        actions=[
            ChangeFlowRunState(
                state="CRASHED", name="Crashed", message="no sign of life; retry it: jobs that still run are found"
            )
        ],
    )
    with get_client(sync_client=True) as client:
        known = client.read_automations_by_name(name)
        if [one.description for one in known] == [wanted.description]:
            return  # anew, it would forget which runs it is waiting for
        for one in known:
            client.delete_automation(one.id)
        client.create_automation(wanted)


def _note(lock: TextIO, content: dict[str, Any]) -> None:
    lock.truncate(0)
    lock.write(json.dumps(content))
    lock.flush()
