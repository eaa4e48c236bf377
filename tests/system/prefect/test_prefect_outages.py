"""Flow runs whose driver is killed while it waits for approval, or whose server is away for a while."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cluster.ledger import Ledger
from support import ROOT
from support.killed_jobs import jobs_of
from support.prefect_server import Server, free_port, prefect_server, wait_until
from support.runs import await_job, call, digests

EXECUTE = """
import os, runpy
from prefect.client.orchestration import get_client
from prefect.concurrency import _leases
from prefect.states import Pending
_leases._RENEWAL_FRACTION = 0.01  # renew every 3 seconds, not every 225
with get_client(sync_client=True) as client:
    client.set_flow_run_state(os.environ["PREFECT__FLOW_RUN_ID"], Pending())
runpy.run_module("prefect.engine", run_name="__main__")
"""
"""Execute a flow run as a worker does; it renews its slot of the deployment's limit often."""


@contextmanager
def served(folder: Path, api: str, finished_run: Path, run: str) -> Iterator[Server]:
    """Serve the configuration of the finished run as the deployment `whole`; `run` is a copy of that run."""
    experiment = yaml.safe_load((finished_run / "tiny.yaml").read_text())
    shutil.copytree(finished_run / "runs" / "tiny", folder / "runs" / run)
    server = Server(folder, [{"name": "whole", "parameters": {"experiment": experiment}}], api)
    try:
        yield server
    finally:
        server.process.send_signal(signal.SIGINT)
        server.process.wait(60)


def await_question(server: Server, run: str, after: dict[str, Any] | None = None) -> dict[str, Any]:
    """Wait until a subflow of a flow run waits for an answer, to another question than `after`; return the subflow."""

    def asked() -> list[dict[str, Any]]:
        flows = [server.ask(f"flow_runs/{flow}") for flow in server.subflows(run)]
        before = after and after["state"]["id"]
        return [flow for flow in flows if flow["state"]["type"] == "PAUSED" and flow["state"]["id"] != before]

    wait_until(asked, 120, lambda: server.logs(run)[-3000:])
    [flow] = asked()
    return flow


def answer(server: Server, asked: dict[str, Any], update: bool) -> None:
    """Answer as the form of Prefect's page does."""
    result = server.ask(f"flow_runs/{asked['id']}/resume", {"run_input": {"update_the_teacher": update}})
    assert result["status"] == "ACCEPT", result


@pytest.mark.slow
@pytest.mark.guarantee("driver lost while its run waits for approval")
def test_retry_asks_for_approval_again(finished_run: Path, tmp_path: Path) -> None:
    """After the driver was killed, and after the answer was no."""
    folder = tmp_path.resolve()
    home = shutil.copytree(finished_run / "prefect", folder / "server")
    with prefect_server(home) as client, served(folder, client["PREFECT_API_URL"], finished_run, "asked") as server:
        approved = server.runs / "asked" / "iteration-1" / "approved.json"
        run = server.start("whole", "asked", approve=True)
        first = await_question(server, run)
        server.driver(run).kill()
        server.wait_for(run, "Crashed")
        assert server.state(first["id"]) == "Paused"
        server.set_state(run, "SCHEDULED")
        again = await_question(server, run, after=first)
        assert not approved.exists()
        empty = server.ask(f"flow_runs/{again['id']}/resume", {"run_input": {}})
        assert empty["status"] == "REJECT", empty
        answer(server, again, update=False)
        server.wait_for(run, "Failed")
        server.set_state(run, "SCHEDULED")
        last = await_question(server, run, after=again)
        assert not approved.exists()
        answer(server, last, update=True)
        server.wait_for(run, "Completed")
        assert approved.exists()


@pytest.mark.slow
@pytest.mark.guarantee("Prefect server away while a run waits for approval")
def test_question_outlives_its_server(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither `montessori up` nor the driver gives up, although Prefect's client does."""
    monkeypatch.setenv("PREFECT_CLIENT_MAX_RETRIES", "1")  # seconds, not a minute
    folder, port = tmp_path.resolve(), free_port()
    home = shutil.copytree(finished_run / "prefect", folder / "server")
    with ExitStack() as stack:
        with prefect_server(home, port, kill=True) as client:
            server = stack.enter_context(served(folder, client["PREFECT_API_URL"], finished_run, "asked"))
            run = server.start("whole", "asked", approve=True)
            asked = await_question(server, run)
            driver = server.driver(run)
        time.sleep(45)
        assert server.process.poll() is None, (folder / "up.log").read_text()
        assert driver.is_running()
        with prefect_server(home, port):
            answer(server, asked, update=True)
            server.wait_for(run, "Completed")
            (server.runs / "asked" / "iteration-1" / "approved.json").unlink()
            later = server.start("whole", "asked", approve=True)
            await_question(server, later)
            server.set_state(later, "CANCELLING")
            server.wait_for(later, "Cancelled", seconds=60)
    log = (folder / "up.log").read_text()
    assert log.count("waiting for it, flow runs continue") == log.count("the Prefect server answers again") == 1


@pytest.mark.slow
@pytest.mark.guarantee("Prefect server killed in the middle of a stage")
@pytest.mark.parametrize("storage", ["memory", "filesystem"])
def test_run_of_limited_deployment_outlives_its_server(finished_run: Path, tmp_path: Path, storage: str) -> None:
    """A server that keeps slots in memory has lost the run's when it is back; ours keep them in files."""
    folder, port = tmp_path.resolve(), free_port()
    home = shutil.copytree(finished_run / "prefect", folder / "server")
    in_memory = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.memory"}
    settings = in_memory if storage == "memory" else {}
    run = Path(shutil.copytree(finished_run / "runs" / "tiny", folder / "runs" / "tiny"))
    evaluation = run / "iteration-1" / "evaluation"
    shutil.rmtree(evaluation)
    experiment = yaml.safe_load((finished_run / "tiny.yaml").read_text())
    limited = {"name": "limited", "parameters": {"experiment": experiment}, "concurrency_limit": 1}
    (folder / "prefect.yaml").write_text(yaml.safe_dump({"deployments": [limited]}))
    with ExitStack() as stack:
        with prefect_server(home, port, kill=True, **settings) as client:
            api = client["PREFECT_API_URL"]
            httpx.post(f"{api}/work_pools/", json={"name": "pool", "type": "process"}).raise_for_status()
            code, output = call("deploy", "--pool", "pool", cwd=folder, **client)
            assert code == 0, output
            deployment = httpx.get(f"{api}/deployments/name/montessori/limited").json()["id"]
            flow_run = httpx.post(f"{api}/deployments/{deployment}/create_flow_run", json={}).json()["id"]
            driver = subprocess.Popen(
                [sys.executable, "-c", EXECUTE],
                env=os.environ
                | client
                | {
                    "PYTHONPATH": str(ROOT),
                    "MONTESSORI_RUN_ROOT": str(folder / "runs"),
                    "PREFECT__FLOW_RUN_ID": flow_run,
                    "PREFECT_LOGGING_LEVEL": "INFO",
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            stack.callback(driver.kill)
            await_job(driver, evaluation)
            wait_until(lambda: jobs_of(evaluation))
            [job] = jobs_of(evaluation)
            held = [*job.children(recursive=True), job]
            for process in held:
                process.suspend()
        with prefect_server(home, port, **settings) as client:
            own = {"logs": {"flow_run_id": {"any_": [flow_run]}}}

            def lost() -> bool:
                return "slots are no longer reserved" in httpx.post(f"{api}/logs/filter", json=own).text

            if storage == "memory":
                wait_until(lost, 120, process=driver)
            else:
                time.sleep(20)  # several renewals
                assert not lost()
            for process in held:
                process.resume()
            output, _ = driver.communicate(timeout=300)
            state = httpx.get(f"{api}/flow_runs/{flow_run}").json()["state"]["name"]
    assert state == "Completed", output
    assert len(Ledger(evaluation / "jobs").submissions) == 1
    assert digests(run) == digests(finished_run / "runs" / "tiny")
