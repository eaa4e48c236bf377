"""A run driven from two login nodes, on a real Slurm: the driver on one, commands on the other, and a crash of the first."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.ledger import Ledger
from montessori_core import layout
from montessori_core.files import read_json
from support import squares as local
from support import wait_until
from support.hosts import Host, logins
from support.prefect_server import Server, prefect_server
from support.runs import configuration, digests, job_ids
from support.slurm_lab import command_of, queued

__all__ = ["folder", "logins"]

folder = local.folder


def driver_in(run: Path) -> dict[str, Any]:
    """Return the driver in a run's lock file; empty after its end."""
    return read_json(run / layout.DRIVER_LOCK) or {}


def results(folder: Path) -> list[list[int]]:
    """Return the squares of both stages of held jobs."""
    return [
        local.results([folder / name / f"part-{index:05}.json" for index in range(len(local.SHARDS))])
        for name in ("first", "second")
    ]


def unfinished(finished_run: Path, folder: Path, model: Path) -> tuple[Path, Path]:
    """Copy the finished run without its warm-up, and give it jobs on Slurm; return its configuration and its folder."""
    run = folder / "runs" / "tiny"
    shutil.copytree(finished_run / "runs" / "tiny", run)
    shutil.rmtree(run / "iteration-1" / "warmup")
    (run / layout.REPORT).unlink()
    content = yaml.safe_load(configuration(folder, model).read_text())
    content["cluster"] = {"profile": "slurm", "poll_seconds": 0.5}
    content["comparison"]["teacher_checkpoints"] = 1
    config = folder / "slurm.yaml"
    config.write_text(yaml.safe_dump(content))
    return config, run


@pytest.mark.guarantee("driver killed on one login node, resumed on another")
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_commands_on_other_login_node(
    logins: tuple[Host, Host], finished_run: Path, talking_llama: Path, tmp_path: Path
) -> None:
    config, run = unfinished(finished_run, tmp_path, talking_llama)
    warmup = run / "iteration-1" / "warmup"
    one, two = logins
    driver = one.montessori("run", str(config), cwd=tmp_path)
    wait_until(lambda: job_ids(warmup), 300, process=driver)
    process = driver_in(run)["process"]
    there = f"process {process} on login1"
    code, output = two.call("status", str(run), cwd=tmp_path)
    assert (code, f"driver: {there}" in output) == (0, True), output
    code, output = two.call("cancel", str(run), cwd=tmp_path)
    assert (code, f"the driver is {there}; run this command there" in output) == (1, True), output
    code, output = two.call("run", str(config), cwd=tmp_path)
    assert (code, f"already has a driver ({there})" in output) == (1, True), output
    assert driver.poll() is None
    one.kill(process)
    driver.communicate()
    code, output = two.call("status", str(run), cwd=tmp_path)
    assert f"No driver is running. Resume with: montessori resume {run}" in output
    code, output = two.call("resume", str(run), cwd=tmp_path)
    assert code == 0, output
    assert len(Ledger(warmup / "jobs").submissions) == 1  # the job was awaited, not submitted again
    assert digests(run) == digests(finished_run / "runs" / "tiny")


def start_worker(login: Host, folder: Path, pool: str, variables: dict[str, str]) -> None:
    """Start a worker of a work pool, which ends with its host."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool]
    with (folder / f"worker-{login.name}.log").open("w") as log:
        login.start(command, folder, env=os.environ | variables, stdout=log, stderr=log)


@pytest.mark.guarantee("worker on a login node dies")
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_worker_on_other_login_node_continues_run(
    logins: tuple[Host, Host], finished_run: Path, talking_llama: Path, tmp_path: Path
) -> None:
    """The login node crashes with its worker and the flow run, whose heartbeats stop."""
    config, run = unfinished(finished_run, tmp_path, talking_llama)
    warmup = run / "iteration-1" / "warmup"
    deployment = {"name": "tiny", "parameters": {"experiment": yaml.safe_load(config.read_text())}}
    (tmp_path / "server").mkdir()
    with prefect_server(tmp_path / "server") as client, served(tmp_path, deployment, client) as server:
        server.ask("work_pools/", {"name": "logins", "type": "process"})
        variables = server.environment | {"MONTESSORI_RUN_ROOT": str(run.parent)}
        pooled = {"deployments": [deployment | {"name": "on-logins"}]}
        (tmp_path / "logins.yaml").write_text(yaml.safe_dump(pooled))
        deploy = ["deploy", "--pool", "logins", "--file", "logins.yaml"]
        code, output = logins[0].call(*deploy, cwd=tmp_path, **variables)
        assert code == 0, output
        for login in logins:
            start_worker(login, tmp_path, "logins", variables)
        flow_run = server.start("on-logins", "tiny")
        wait_until(lambda: job_ids(warmup), 300)
        first = driver_in(run)["host"]
        crashed, other = logins if first == "login1" else reversed(logins)
        assert first == crashed.name
        crashed.crash()
        server.wait_for(flow_run, "Crashed", seconds=420)
        server.set_state(flow_run, "SCHEDULED")
        wait_until(lambda: driver_in(run).get("host") == other.name, 120)
        server.wait_for(flow_run, "Completed")
    assert len(Ledger(warmup / "jobs").submissions) == 1
    assert digests(run) == digests(finished_run / "runs" / "tiny")


@contextmanager
def served(folder: Path, deployment: dict[str, Any], client: dict[str, str]) -> Iterator[Server]:
    """Start `montessori up` beside a server."""
    server = Server(folder, [deployment], client["PREFECT_API_URL"])
    try:
        yield server
    finally:
        server.process.send_signal(signal.SIGINT)
        server.process.wait(120)


@pytest.mark.guarantee("driver that holds jobs killed, resumed on another host")
@pytest.mark.slow
def test_driver_on_other_login_node_uses_held_jobs(logins: tuple[Host, Host], folder: Path) -> None:
    """The srun processes of the killed driver are alive on the first login node."""
    one, two = logins
    command = command_of("test_slurm_held", f"t.drive(Path({str(folder)!r}), 0.7)")
    driver = one.start(command, folder)
    wait_until(lambda: len(local.computed(folder)) >= 4, 120, process=driver)
    held = {path.name for path in (folder / layout.HELD).glob("*.log")}
    process = driver_in(folder)["process"]
    one.kill(process)
    driver.wait()
    second = two.start(command, folder, stderr=subprocess.PIPE)
    _, errors = second.communicate(timeout=300)
    assert second.returncode == 0, errors
    assert results(folder) == [local.EXPECTED] * 2
    assert {path.name for path in (folder / layout.HELD).glob("*.log")} == held
    wait_until(lambda: queued() == [], 60)
