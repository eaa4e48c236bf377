"""States of flow runs: lost drivers become Crashed, and a driver notices that its flow run is cancelled."""

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import UUID

import psutil
import pytest
import yaml
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events import Event
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling, Crashed, Running

from flows import crash_detection
from flows.crash_detection import register_crash_detection
from flows.state_watch import NO_HEARTBEATS
from support import ROOT
from support.prefect_server import Server, prefect_server, wait_until
from support.runs import await_job, configuration, invoke, left_over, montessori

TIMEOUT = 10  # seconds without heartbeats; Prefect allows no less

DRIVER = """
import os, time
from pathlib import Path
from prefect import flow, runtime
from prefect.settings import get_current_settings
import flows.state_watch
from flows.cli.interrupt import interruptible
from montessori_core.config import Cluster

flows.state_watch._PAUSE = 0.5

@flow
def driver(has_runner=False):
    if has_runner:
        os.environ["PREFECT__FLOW_RUN_ID"] = runtime.flow_run.id
    with flows.state_watch.watched_state():
        print(get_current_settings().flows.heartbeat_frequency, flush=True)
        while True:
            time.sleep(0.1)

"""
COMMAND = DRIVER + "interruptible(driver, Path('absent'), Cluster(), 'montessori resume')"
ORPHAN = (
    DRIVER
    + """
if os.fork():
    time.sleep(600)
driver(has_runner=True)
"""
)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyncPrefectClient]:
    """A client of a server that looks for missing heartbeats every second."""
    home = tmp_path_factory.mktemp("prefect")
    with (
        prefect_server(home, PREFECT_SERVER_EVENTS_PROACTIVE_GRANULARITY="PT1S") as variables,
        temporary_settings({PREFECT_API_URL: variables["PREFECT_API_URL"]}),
        get_client(sync_client=True) as connected,
    ):
        yield connected


def started(client: SyncPrefectClient, flow: str) -> UUID:
    """Return a new flow run that is running, without a process."""
    return client.create_flow_run(Flow(lambda: None, name=flow), state=Running()).id


def beat(client: SyncPrefectClient, flow_run: UUID) -> None:
    """Send a heartbeat, as the process of a flow run does."""
    flow = client.read_flow(client.read_flow_run(flow_run).flow_id)
    related = {
        "prefect.resource.id": f"prefect.flow.{flow.id}",
        "prefect.resource.role": "flow",
        "prefect.resource.name": flow.name,
    }
    heartbeat = Event(
        event="prefect.flow-run.heartbeat",
        resource={"prefect.resource.id": f"prefect.flow-run.{flow_run}"},
        related=[related],
    )
    client.request("POST", "/events", json=[heartbeat.model_dump(mode="json")])


def state_of(client: SyncPrefectClient, flow_run: UUID) -> str:
    state = client.read_flow_run(flow_run).state
    assert state is not None
    return state.name or ""


@pytest.mark.guarantee("worker on a login node dies")
def test_lost_driver_is_crashed_other_flow_runs_are_not(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One was lost while the server was away, which forgets it. The automation replaces that of an earlier version."""
    forgotten = started(client, "experiment")
    beat(client, forgotten)
    wait_until(lambda: crash_detection._has_sent_heartbeats(client, forgotten), 60)
    silent = started(client, "evaluate")  # of another program, which sends none
    for timeout in (TIMEOUT + 1, TIMEOUT):
        monkeypatch.setattr(crash_detection, "_TIMEOUT", timeout)
        register_crash_detection()
    [automation] = client.read_automations_by_name(crash_detection._NAME)
    assert f" {TIMEOUT} s " in automation.description
    strange, lost, alive, subflow = (
        started(client, flow) for flow in ("of another team", "montessori", "tailor", "iteration")
    )
    for flow_run in (strange, lost, alive, subflow):
        beat(client, flow_run)
    register_crash_detection()

    def all_marked() -> bool:
        beat(client, alive)
        return [state_of(client, flow_run) for flow_run in (lost, forgotten)] == 2 * ["Crashed"]

    wait_until(all_marked, 60)
    assert client.read_flow_run(forgotten).state.message == NO_HEARTBEATS
    # The driver of a subflow would not set it back to Running or Paused after an outage.
    assert {state_of(client, flow_run) for flow_run in (strange, alive, subflow, silent)} == {"Running"}
    assert [one.id for one in client.read_automations_by_name(crash_detection._NAME)] == [automation.id]


@contextmanager
def running(
    client: SyncPrefectClient, program: str, folder: Path
) -> Iterator[tuple["subprocess.Popen[bytes]", Path, UUID]]:
    """Run a driver; yield its process, what it prints, and its flow run, which is running."""
    before = {flow_run.id for flow_run in client.read_flow_runs()}
    output = folder / "output"
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PREFECT_API_URL": str(client.api_url).rstrip("/")},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        wait_until(lambda: output.read_text().strip(), 60, process=process)
        [flow_run] = [flow_run.id for flow_run in client.read_flow_runs() if flow_run.id not in before]
        yield process, output, flow_run
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_command_ends_when_its_flow_run_is_cancelled(client: SyncPrefectClient, tmp_path: Path) -> None:
    """Before, a server that was away for long had marked the flow run as crashed."""
    with running(client, COMMAND, tmp_path) as (process, output, flow_run):
        client.set_flow_run_state(flow_run, Crashed(message=NO_HEARTBEATS), force=True)
        wait_until(lambda: state_of(client, flow_run) == "Running", 30, output.read_text)
        client.set_flow_run_state(flow_run, Cancelling())
        assert process.wait(60) == 130
    assert "30" in output.read_text().splitlines()
    assert "interrupted" in output.read_text()
    assert "Resume with:\n  montessori resume" in output.read_text()
    assert state_of(client, flow_run) == "Cancelled"


@pytest.mark.slow
def test_run_of_a_terminal_is_cancelled_in_prefect(
    client: SyncPrefectClient, talking_llama: Path, tmp_path: Path
) -> None:
    config = configuration(tmp_path, talking_llama)
    driver = montessori("run", str(config), cwd=tmp_path, PREFECT_API_URL=str(client.api_url).rstrip("/"))
    await_job(driver, tmp_path / "runs" / "tiny" / "iteration-1" / "warmup")
    [flow_run] = [flow_run for flow_run in client.read_flow_runs() if flow_run.name == "tiny"]
    client.set_flow_run_state(flow_run.id, Cancelling())
    output, _ = driver.communicate(timeout=180)
    assert driver.returncode == 130, output
    assert "the jobs were cancelled, finished work is kept. Resume with" in output
    assert state_of(client, flow_run.id) == "Cancelled"
    assert not left_over(tmp_path)


def test_driver_without_its_runner_ends_when_cancelled(client: SyncPrefectClient, tmp_path: Path) -> None:
    with running(client, ORPHAN, tmp_path) as (process, output, flow_run):
        [driver] = psutil.Process(process.pid).children()
        client.set_flow_run_state(flow_run, Cancelling())
        time.sleep(3)
        assert driver.is_running()  # its runner would end it
        process.kill()
        process.wait()
        wait_until(lambda: not driver.is_running(), 30, output.read_text)
    assert state_of(client, flow_run) == "Cancelled"


@pytest.mark.slow
@pytest.mark.guarantee("runs started on your Prefect server")
def test_deployments_of_another_up_are_refused(client: SyncPrefectClient, tmp_path: Path) -> None:
    """Each of the two would run flow runs of the other: in its own folder, as its own user."""
    mine, other = tmp_path / "mine", tmp_path / "other"
    for folder in (mine, other):
        folder.mkdir()
    api = str(client.api_url).rstrip("/")
    scheduled = {"schedules": [{"interval": 86400, "active": False}], "concurrency_limit": {"limit": 1}}
    deployments = [{"name": "shared", "config": "quickstart", **scheduled}]
    server = Server(mine, deployments, api)
    try:
        wait_until(lambda: server.deployment("shared")["status"] == "READY", 60)
        registered = server.deployment("shared")
        assert f"on {platform.node()}; runs are in {mine / 'runs'}." in registered["description"]
        assert [schedule["schedule"]["interval"] for schedule in registered["schedules"]] == [86400.0]
        assert registered["global_concurrency_limit"]["limit"] == 1
        (other / "prefect.yaml").write_text(yaml.safe_dump({"deployments": deployments}))
        client.request("POST", "/work_pools/", json={"name": "cluster", "type": "process"})
        for command in (["up"], ["deploy", "--pool", "cluster"]):
            code, output = invoke(*command, cwd=other, PREFECT_API_URL=api)
            assert code == 1
            assert "a deployment shared that is served by" in output
            assert f"runs are in {mine / 'runs'}: both would run its flow runs. Give yours other names" in output
        assert "mine" in server.deployment("shared")["description"]
        server.process.kill()
        server.process.wait()
        server.process = server.up()  # the same is not refused
    finally:
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()
