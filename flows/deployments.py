"""Deployments in Prefect: `montessori up` serves them on this machine, `montessori deploy` registers them for a work pool.

Both read `prefect.yaml`. A deployment's configuration fills the form that Prefect shows when a user presses Run.
"""

import asyncio
import fcntl
import json
import os
import platform
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import psutil
from rich.console import Console

from flows.local_server import prefect_api, served_reports
from flows.outages import poll_without_limit
from flows.prefect_api import DRIVER_VARIABLES, HEARTBEAT, check_api, check_proxies
from flows.prefect_yaml import EVALUATION, EXPERIMENT, STUDY, TAILOR, find_deployments, read_deployments
from montessori_core.errors import UserError
from montessori_core.files import read_json
from montessori_core.locks import take_lock
from tasks.resume import RUN_ROOT

_SERVED_BY = "Served by montessori up of"
_POLLED = 60  # seconds; a process that runs flow runs of a deployment asks for them more often
_BETWEEN_POLLS = 20.0  # seconds; it asks every 10 to 15
_END_TIMEOUT = 240.0  # seconds; Slurm jobs may take two minutes to end


def up(file: Path | None, root: Path, port: int, console: Console) -> None:
    """Serve the deployments until Ctrl-C; start a Prefect server if there is none.

    Raises:
        UserError: the server does not start, the file is invalid, or another process runs one of the deployments.
    """
    file = file or find_deployments()
    deployments = read_deployments(file)
    warn_of_job_variables(deployments, console)
    state = root.resolve() / f".montessori-{os.getuid()}"  # users of a group may share a folder of runs
    state.mkdir(parents=True, exist_ok=True)
    with (state / "up.json").open("a+") as lock:
        try:
            take_lock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            running = read_json(state / "up.json") or {}
            host = running.get("host", platform.node())
            place = "" if host == platform.node() else f" on {host}"
            console.print(f"already running{place}: {running.get('url', 'its server is starting')}", soft_wrap=True)
            return
        _write_state(lock, {})  # an `up` that was killed has left its address
        with (
            prefect_api(port, state / "server.log", console) as api,
            served_reports(root.resolve(), port + 1) as reports,
        ):
            url = api.removesuffix("/api")
            _write_state(lock, {"url": url, "process": os.getpid(), "host": platform.node()})
            from flows.crash_detection import register_crash_detection
            from tasks.report import REPORTS

            os.environ.update({RUN_ROOT: str(root.resolve()), REPORTS: reports})
            _refuse_others(deployments, None)
            register_crash_detection()
            names = ", ".join(deployment["name"] for deployment in deployments)
            console.print(
                f"Prefect: {url}\ndeployments of {file}: {names}\nruns and reports: {root.resolve()}", soft_wrap=True
            )
            console.print("Open the address, choose a deployment, press Run. Ctrl-C stops serving.", soft_wrap=True)
            _serve(deployments)
        _write_state(lock, {})
    console.print("stopped; a retried run resumes from its finished work")


def deploy(file: Path | None, pool: str, console: Console) -> None:
    """Register the deployments for a work pool of the server in Prefect's settings.

    Raises:
        UserError: no such work pool, the server does not answer, or another process runs one of the deployments.
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound
    from prefect.settings import PREFECT_API_URL

    from flows.crash_detection import register_crash_detection

    check_proxies()
    deployments = read_deployments(file or find_deployments())
    api = PREFECT_API_URL.value()
    if api is None:
        raise UserError("PREFECT_API_URL is not set; set it to the server's address followed by /api")
    check_api(api)
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(pool)
        except ObjectNotFound as error:
            raise UserError(
                f"the server at {api} has no work pool {pool!r}; create it: prefect work-pool create {pool} --type process"
            ) from error

    _refuse_others(deployments, pool)

    def register(deployment: Any) -> Any:
        identity = deployment.apply()
        console.print(f"registered {deployment.name} for work pool {pool}", soft_wrap=True)
        return identity

    _register(deployments, pool, register)
    register_crash_detection()
    console.print(
        "start a worker on a host that can submit jobs, with the folder of runs: "
        f"MONTESSORI_RUN_ROOT=/shared/runs prefect worker start --pool {pool}",
        soft_wrap=True,
    )


def warn_of_job_variables(deployments: list[dict[str, Any]], console: Console) -> None:
    """Warn if deployments set what only the workers of a work pool read."""
    names = ", ".join(deployment["name"] for deployment in deployments if deployment.get("job_variables"))
    if names:
        console.print(
            f"warning: montessori up ignores job_variables (of {names}), which are for workers: set environment variables "
            "before it starts, or use montessori deploy",
            soft_wrap=True,
        )


def _serve(deployments: list[dict[str, Any]]) -> None:
    """Serve until SIGINT or SIGTERM, then end the running flow runs, which end their jobs.

    Raises:
        UserError: Prefect's runner fails.
    """
    from prefect.runner import Runner

    poll_without_limit()
    # Drivers only wait, so that there may be many. Keep schedules active: the next `up` continues them.
    runner = Runner(limit=None, pause_on_shutdown=False, heartbeat_seconds=HEARTBEAT)
    _register(deployments, None, runner.add_deployment)
    # In a thread, the runner neither receives the signals nor kills its flow runs on exit.
    loop = asyncio.new_event_loop()
    serving = asyncio.run_coroutine_threadsafe(runner.start(), loop)
    threading.Thread(target=loop.run_forever, daemon=True).start()

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        with suppress(KeyboardInterrupt):
            serving.result()
    except Exception as error:
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        raise UserError(f"Prefect's runner failed: {error!r}. Start montessori up again, and retry its runs") from error
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # ignore further signals
        _end_flow_runs()


def _end_flow_runs() -> None:
    """Interrupt the flow runs of this process and wait until they have ended their jobs."""
    runs = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if "prefect.engine" in child.cmdline() or "prefect.flow_engine" in child.cmdline():
                child.send_signal(signal.SIGINT)
                runs.append(child)
    psutil.wait_procs(runs, timeout=_END_TIMEOUT)


def _register(deployments: list[dict[str, Any]], pool: str | None, register: Callable[[Any], Any]) -> None:
    """Register the deployments; the simple forms last, as their descriptions link to the full forms of the others."""
    from flows.tailor import form_address

    full_forms: list[str] = []
    for deployment in sorted(deployments, key=lambda deployment: deployment["entrypoint"] == TAILOR):
        described = deployment
        if deployment["entrypoint"] == TAILOR and full_forms:
            links = f"Forms with every setting: {', '.join(full_forms)}."
            described = deployment | {"description": f"{deployment.get('description') or ''}\n\n{links}".strip()}
        identity = register(_to_deployment(described, pool))
        if deployment["entrypoint"] == EXPERIMENT:
            full_forms.append(f"[{deployment['name']}]({form_address(identity)})")


def _refuse_others(deployments: list[dict[str, Any]], pool: str | None) -> None:
    """Check that no other process runs flow runs of these deployments, which would start in its folder, as its user.

    Raises:
        UserError: another `montessori up`, or a worker, does.
    """
    from prefect.client.schemas.objects import DeploymentStatus

    for deployment in deployments:
        existing = _registered(deployment)
        if existing is None or existing.status != DeploymentStatus.READY or existing.last_polled is None:
            continue
        if (datetime.now(UTC) - existing.last_polled).total_seconds() > _POLLED:
            continue  # the status of a server that has just started is old
        description = existing.description or ""
        if existing.work_pool_name == pool and (pool is not None or description.endswith(_served_by())):
            continue
        time.sleep(_BETWEEN_POLLS)
        again = _registered(deployment)
        if again is None or again.last_polled == existing.last_polled:
            continue  # the other process has ended
        if existing.work_pool_name is not None:
            other = f"run by the workers of work pool {existing.work_pool_name}"
        else:
            _, found, words = description.rpartition(_SERVED_BY)
            other = f"served by{words.rstrip('.')}" if found else "served by another process"
        raise UserError(
            f"the Prefect server has a deployment {deployment['name']} that is {other}: both would run its flow runs. Give "
            "yours other names in a prefect.yaml here (copy the shipped one), use a server with a database of your own "
            "(PREFECT_HOME=FOLDER montessori up --port N, without PREFECT_API_URL), or end the other one"
        )


def _served_by() -> str:
    """Return the sentence of a deployment's description that tells this `montessori up` from others on a server."""
    return f"{_SERVED_BY} {psutil.Process().username()} on {platform.node()}; runs are in {os.environ[RUN_ROOT]}."


def _flow_of(deployment: dict[str, Any]) -> Any:
    from flows.evaluation import evaluate
    from flows.experiment import montessori
    from flows.study import compare
    from flows.tailor import tailor

    return {EXPERIMENT: montessori, STUDY: compare, EVALUATION: evaluate, TAILOR: tailor}[deployment["entrypoint"]]


def _to_deployment(deployment: dict[str, Any], pool: str | None) -> Any:
    from prefect.types.entrypoint import EntrypointType

    flow = _flow_of(deployment)
    variables = dict(deployment.get("job_variables") or {})
    # The worker starts a flow run by python -m, which would import from its working directory first.
    defaults = {"PYTHONSAFEPATH": "1", **DRIVER_VARIABLES}
    variables["env"] = {**defaults, **(variables.get("env") or {})}
    runner_deployment = flow.to_deployment(
        deployment["name"],
        parameters=deployment["parameters"],
        description="\n\n".join(filter(None, (deployment.get("description"), None if pool else _served_by()))),
        tags=deployment.get("tags"),
        schedules=deployment["schedules"],
        concurrency_limit=deployment["concurrency_limit"],
        work_pool_name=pool,
        job_variables=variables if pool else None,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    # Where the flow runs, PYTHONPATH may have another module named flows.
    runner_deployment.entrypoint = f"montessori_entry.{flow.fn.__name__}"
    existing = _registered(deployment)
    if existing is not None and existing.schedules:
        runner_deployment.schedules = None
        runner_deployment.model_fields_set.discard("schedules")  # keep them: they may be paused or made in the UI
    return runner_deployment


def _registered(deployment: dict[str, Any]) -> Any:
    """Return a deployment as the server has it; None if it has none of this name."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            return client.read_deployment_by_name(f"{_flow_of(deployment).name}/{deployment['name']}")
        except ObjectNotFound:
            return None


def _write_state(lock: TextIO, content: dict[str, Any]) -> None:
    lock.truncate(0)
    lock.write(json.dumps(content))
    lock.flush()
