"""Prefect's UI, as people use it: a real server, real runs of a tiny model, and a browser that clicks."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from test_run import ROOT, configuration, digests

from flows.serving import read_deployments
from montessori_core.errors import ConfigError

SCREENSHOTS = os.environ.get("MONTESSORI_SCREENSHOTS")
"""Folder for the pictures of docs/prefect.md; they are taken only if it is named."""


ENDS = ("Completed", "Failed", "Cancelled", "Crashed")


class Server:
    """`montessori up` in a folder, and Prefect's API as the tests read it."""

    def __init__(self, folder: Path, deployments: list[dict[str, Any]]) -> None:
        self.folder, self.runs = folder, folder / "runs"
        (folder / "prefect.yaml").write_text(yaml.safe_dump({"name": "test", "deployments": deployments}))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "PREFECT_HOME": str(folder / "prefect"),
            "COLUMNS": "200",
        }
        self.process = self.up()

    def up(self) -> subprocess.Popen[str]:
        """Start it; return when it serves."""
        log = (self.folder / "up.log").open("a")
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "up", "--port", str(self.port)],
            cwd=self.folder,
            env=self.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        begun = (self.folder / "up.log").stat().st_size
        wait_until(lambda: "press Run" in (self.folder / "up.log").read_text()[begun:], process=process)
        wait_until(lambda: len(self.ask("deployments/filter", {})) > 0)
        return process

    def ask(self, path: str, content: dict[str, Any] | None = None) -> Any:
        """An answer of the API: to a GET, or to a POST of `content`."""
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(f"{self.url}/api/{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            body = answer.read()
        return json.loads(body) if body else None

    def deployment(self, name: str) -> dict[str, Any]:
        """A deployment by its name."""
        found: dict[str, Any] = self.ask(f"deployments/name/montessori/{name}")
        return found

    def start(self, deployment: str, run: str, **parameters: Any) -> str:
        """Start a run by the API; its id."""
        preset = self.deployment(deployment)
        experiment = preset["parameters"]["experiment"] | {"name": run} | parameters.pop("experiment", {})
        content = {"parameters": {"experiment": experiment, **parameters}, "state": {"type": "SCHEDULED"}}
        return str(self.ask(f"deployments/{preset['id']}/create_flow_run", content)["id"])

    def state(self, run: str) -> str:
        """The name of a flow run's state."""
        return str(self.ask(f"flow_runs/{run}")["state"]["name"])

    def wait_for(self, run: str, *names: str, seconds: float = 300.0) -> None:
        """Wait until a flow run is in one of some states."""

        def reached() -> bool:
            state = self.state(run)
            assert state in names or state not in ENDS, f"{state}: {self.logs(run)[-3000:]}"
            return state in names

        wait_until(reached, seconds, lambda: f"{self.state(run)}: {self.logs(run)[-3000:]}")

    def set_state(self, run: str, state: str) -> None:
        """What the UI's buttons send."""
        self.ask(f"flow_runs/{run}/set_state", {"state": {"type": state, "name": state.capitalize()}, "force": True})

    def logs(self, run: str) -> str:
        """Messages of a flow run and of its subflows."""
        ids = [run, *self.subflows(run)]
        found = self.ask("logs/filter", {"logs": {"flow_run_id": {"any_": ids}}, "sort": "TIMESTAMP_ASC", "limit": 200})
        return "\n".join(entry["message"] for entry in found)

    def subflows(self, run: str) -> list[str]:
        """Ids of a flow run's subflows, at any depth."""
        found = self.ask("flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}})
        return [identity for flow in found for identity in (flow["id"], *self.subflows(flow["id"]))]

    def task_runs(self, run: str) -> list[dict[str, Any]]:
        """Task runs of a flow run's subflows."""
        content = {"task_runs": {"flow_run_id": {"any_": [run, *self.subflows(run)]}}, "limit": 200}
        found: list[dict[str, Any]] = self.ask("task_runs/filter", content)
        return found

    def artifacts(self, run: str) -> list[dict[str, Any]]:
        """Artifacts of a flow run and of its subflows."""
        ids = [run, *self.subflows(run)]
        content = {"artifacts": {"flow_run_id": {"any_": ids}}, "limit": 200}
        found: list[dict[str, Any]] = self.ask("artifacts/filter", content)
        return found

    def counts(self, run: str) -> dict[str, tuple[int, int, int]]:
        """Shards done before, computed now and failed, by stage; of several attempts, the last."""
        counts = {}
        for artifact in sorted(self.artifacts(run), key=lambda a: str(a["created"])):
            if artifact["type"] == "table" and ": shards of " in str(artifact["description"]):
                [row] = json.loads(artifact["data"])
                stage = Path(artifact["description"].rpartition(": shards of ")[2])
                name = str(stage.relative_to(self.runs.resolve())).partition("/")[2]
                counts[name] = (row["done before"], row["computed now"], row["failed"])
        return counts

    def jobs(self) -> list[psutil.Process]:
        """Jobs of this server's runs that are alive."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            command = " ".join(process.info["cmdline"] or [])
            if "submitit" in command and str(self.runs) in command and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def driver(self, run: str) -> psutil.Process:
        """The process of a flow run."""
        name = self.ask(f"flow_runs/{run}")["parameters"]["experiment"]["name"]
        return psutil.Process(json.loads((self.runs / name / "driver.lock").read_text())["process"])


def wait_until(
    condition: Callable[[], bool],
    seconds: float = 180.0,
    explain: Callable[[], str] = lambda: "",
    process: "subprocess.Popen[str] | None" = None,
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, explain()
        assert process is None or process.poll() is None
        time.sleep(0.3)


@pytest.fixture(scope="module")
def server(talking_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("prefect").resolve()
    content = yaml.safe_load(configuration(folder, talking_llama).read_text())
    content["comparison"] = {"unmodified_teacher": False, "influence_examples": 0}  # half the time
    limit = {"limit": 1, "collision_strategy": "ENQUEUE"}
    deployments = [
        {"name": "tiny", "parameters": {"experiment": content}, "tags": ["montessori"]},
        {"name": "alone", "parameters": {"experiment": content}, "concurrency_limit": limit},
    ]
    running = Server(folder, deployments)
    try:
        yield running
    finally:
        running.process.send_signal(signal.SIGINT)
        try:
            running.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(running.process.pid, signal.SIGKILL)
    assert not [
        p for p in psutil.process_iter(["cmdline"]) if f"--port {running.port}" in " ".join(p.info["cmdline"] or [])
    ]


@pytest.fixture(scope="module")
def finished(server: Server) -> str:
    """A run that nothing disturbed."""
    run = server.start("tiny", "finished")
    server.wait_for(run, "Completed")
    return run


def test_shipped_deployments_are_the_shipped_configurations() -> None:
    for deployment in read_deployments(ROOT / "prefect.yaml"):
        config = ROOT / "configs" / f"{deployment['name']}.yaml"
        assert deployment["parameters"] == {"experiment": yaml.safe_load(config.read_text())}
        assert deployment["concurrency_limit"]["limit"] == 1


def test_deployment_that_does_not_fit_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "prefect.yaml"
    path.write_text(yaml.safe_dump({"deployments": [{"name": "mine", "parameters": {"experiment": {"seed": -1}}}]}))
    with pytest.raises(ConfigError, match=r"(?s)deployment 'mine'.*seed.*teacher: missing"):
        read_deployments(path)


def test_second_up_finds_the_first(server: Server) -> None:
    again = subprocess.run(
        [sys.executable, "-m", "flows.cli", "up"],
        cwd=server.folder,
        env=server.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert f"already up: {server.url}" in again.stdout


def test_form_explains_every_field_and_refuses_what_does_not_fit(server: Server) -> None:
    schema = server.deployment("tiny")["parameter_openapi_schema"]
    sections = [name for name in schema["definitions"] if "properties" in schema["definitions"][name]]
    assert len(sections) > 15
    for section in sections:
        for name, field in schema["definitions"][section]["properties"].items():
            described = field if "$ref" not in field else schema["definitions"][field["$ref"].rpartition("/")[2]]
            assert field.get("description", described.get("description")), f"{section}.{name}"
    with pytest.raises(urllib.error.HTTPError) as refusal:
        server.start("tiny", "bad", experiment={"iterations": 0})
    assert refusal.value.code == 409 or refusal.value.code == 422
    assert not (server.runs / "bad").exists()


def test_run_shows_as_a_graph_of_stages_with_tables_plots_and_a_report(server: Server, finished: str) -> None:
    expected = {"iteration 1: influence of the probing set, screen", "iteration 1: teacher update", "report"}

    def completed() -> set[str]:  # Prefect records task runs a little later
        return {task["name"] for task in server.task_runs(finished) if task["state_name"] == "Completed"}

    wait_until(lambda: expected <= completed(), 30, lambda: str(completed()))
    [iteration, *_] = server.subflows(finished)
    nodes = {node["label"]: node for _, node in server.ask(f"flow_runs/{iteration}/graph-v2")["nodes"]}
    by_id = {node["id"]: label for label, node in nodes.items()}
    upstream = {label: {by_id.get(parent["id"]) for parent in node["parents"]} for label, node in nodes.items()}
    assert "iteration 1: preference pairs" in upstream["iteration 1: teacher update"]
    assert "iteration 1: influence of the probing set: table" in upstream["iteration 1: preference pairs"]
    assert "iteration 1: student warm-up" in upstream["iteration 1: influence of the probing set, screen"]
    kinds = {artifact["type"] for artifact in server.artifacts(finished)}
    assert {"progress", "table", "markdown", "image"} <= kinds
    [report] = [a for a in server.artifacts(finished) if "report.html" in str(a["data"])]
    address = re.search(r"http://127[^)\s\"]+", report["data"])
    assert address is not None
    with urllib.request.urlopen(address[0]) as answer:
        assert answer.read() == (server.runs / "finished" / "report.html").read_bytes()
    for stranger in ("finished/config.yaml", "../prefect.yaml", "finished/../../prefect.yaml"):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(address[0].rpartition("/finished/")[0] + "/" + stranger)
    assert "epoch" in server.logs(finished) or "loss" in server.logs(finished)  # of the training job


def test_retry_computes_only_the_shards_that_failed(server: Server, finished: str) -> None:
    stage = server.runs / "retried" / "iteration-1" / "influence"
    in_the_way = stage / "part-00002.parquet"
    in_the_way.mkdir(parents=True)
    (in_the_way / "file").touch()  # a folder in the way: the shard cannot be committed
    run = server.start("tiny", "retried")
    server.wait_for(run, "Failed")
    assert server.counts(run)["iteration-1/influence"] == (0, 3, 1)
    assert "1 of 4 shards failed" in server.ask(f"flow_runs/{run}")["state"]["message"]
    assert "shard 2 (code_error)" in server.logs(run)
    shutil.rmtree(in_the_way)
    server.set_state(run, "SCHEDULED")
    server.wait_for(run, "Completed")
    counts = server.counts(run)
    assert counts["iteration-1/influence"] == (3, 1, 0)
    assert counts["iteration-1/warmup"] == (1, 0, 0)
    assert digests(server.runs / "retried") == digests(server.runs / "finished")


def test_cancelled_run_has_no_jobs_within_a_minute_and_goes_on_later(server: Server, finished: str) -> None:
    run = server.start("tiny", "cancelled")
    wait_until(lambda: len(server.jobs()) > 0)
    server.ask(f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    wait_until(lambda: not server.jobs(), 60)
    server.wait_for(run, "Cancelled", seconds=90)
    again = server.start("tiny", "cancelled")
    server.wait_for(again, "Completed")
    assert digests(server.runs / "cancelled") == digests(server.runs / "finished")


def test_killed_run_is_marked_as_crashed_and_its_retry_finds_the_jobs_that_run_on(
    server: Server, finished: str
) -> None:
    run = server.start("tiny", "crashed")
    ledger = server.runs / "crashed" / "iteration-1" / "warmup" / "jobs" / "ledger.json"
    wait_until(lambda: ledger.exists() and "null" not in ledger.read_text())
    server.driver(run).kill()
    server.wait_for(run, "Crashed", seconds=120)
    server.set_state(run, "SCHEDULED")
    server.wait_for(run, "Completed")
    assert len(json.loads(ledger.read_text())) == 1  # the training that ran on was waited for, not started again
    assert digests(server.runs / "crashed") == digests(server.runs / "finished")


def test_run_waits_for_approval_and_remembers_it(server: Server, finished: str) -> None:
    shutil.copytree(server.runs / "finished", server.runs / "approved")
    run = server.start("tiny", "approved", approve=True)
    wait_until(lambda: any(server.state(flow) == "Paused" for flow in server.subflows(run)))
    [paused] = [flow for flow in server.subflows(run) if server.state(flow) == "Paused"]
    schema_key = server.ask(f"flow_runs/{paused}")["state"]["state_details"]["run_input_keyset"]["description"]
    assert "preference pairs" in str(server.ask(f"flow_runs/{paused}/input/{schema_key}"))
    server.ask(f"flow_runs/{paused}/resume", {"run_input": {"update_the_teacher": True}})
    server.wait_for(run, "Completed")
    again = server.start("tiny", "approved", approve=True)
    server.wait_for(again, "Completed")


def test_scheduled_run_adds_iterations_and_never_overlaps_itself(server: Server, finished: str) -> None:
    shutil.copytree(server.runs / "finished", server.runs / "weekly")
    first = server.start("alone", "weekly", add_iterations=1)
    second = server.start("alone", "weekly", add_iterations=1)
    server.wait_for(first, "Running", "Completed")
    assert server.state(second) in ("Scheduled", "Pending", "AwaitingConcurrencySlot", "Late")
    server.wait_for(first, "Completed")
    assert (server.runs / "weekly" / "iteration-2" / "metrics.json").exists()
    server.set_state(second, "CANCELLED")
