"""The driver as a Slurm job: it is killed, requeued, stopped at its time limit, and its node crashes.

Most tests drive a stage of squares; the last ones a whole run, by the command line and by a flow run of Prefect.
"""

import logging
import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
import yaml

from cluster.driver_job import log_of_driver, stopped_with_its_job
from cluster.fanout import fan_out
from cluster.lock import Driver, driver_of, end_driver, only_driver, submit_driver
from montessori_core.config import Cluster, Resources, Slurm
from montessori_core.config.slurm import DriverJob
from montessori_core.errors import UserError
from montessori_core.files import hash_path, read_json
from support import ROOT, wait_until
from support import runs as whole
from support import squares as local
from support.prefect_server import Server, prefect_server
from support.row_programs import as_shards
from support.slurm_lab import call_lab, preempt, queued
from support.squares import submissions

ENTRY = """
import sys
from pathlib import Path
import test_slurm_driver

def main():
    test_slurm_driver.drive(Path(sys.argv[1]))
"""

JOB = DriverJob(cpus=1, memory_gb=1, time_limit_minutes=10)

folder = local.folder


@pytest.fixture
def driven(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the program of squares; a driver's job there runs `drive` instead of a command."""
    (folder / "montessori_entry.py").write_text(ENTRY)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (folder, ROOT, ROOT / "tests", Path(__file__).parent))))
    return folder


def drive(folder: Path) -> None:
    """Compute the stage of squares as its only driver, in two jobs."""
    logging.basicConfig(level=logging.INFO)
    resources = Resources(parallel_jobs=2, cpus_per_process=1)
    cluster = Cluster(profile="slurm", poll_seconds=0.5)
    with stopped_with_its_job(), only_driver(folder):
        fan_out(local.stage(folder, 2.0), as_shards(*local.SHARDS), resources, cluster)


def submit(folder: Path, job: DriverJob = JOB) -> Driver:
    return submit_driver(folder, [str(folder)], {}, Slurm(driver=job))


def wait_for_work(folder: Path) -> None:
    """Wait until jobs compute rows and the driver has recorded them."""
    wait_until(lambda: len(local.computed(folder)) >= 2 and bool(submissions(folder)), 120)


def wait_for_results(folder: Path) -> list[int]:
    """Wait until the driver has ended; return what the stage computed."""
    wait_until(lambda: driver_of(folder) is None, 400)
    stage = local.stage(folder, 2.0)
    parts = [stage.part(index) for index in range(len(local.SHARDS))]
    assert all(map(Path.exists, parts)), log_of_driver(folder).read_text()
    return local.results(parts)


@pytest.mark.guarantee("driver's job requeued")
def test_requeued_driver_job_awaits_running_jobs(driven: Path) -> None:
    driver = submit(driven)
    wait_for_work(driven)
    holder = driver_of(driven)
    assert holder is not None
    assert (holder.job, holder.host is not None) == (driver.job, True)
    for second in (lambda: submit(driven), lambda: drive(driven)):
        with pytest.raises(UserError, match=f"already has a driver .Slurm job {driver.job}, process"):
            second()
    subprocess.run(["scontrol", "requeue", str(driver.job)], check=True)
    assert wait_for_results(driven) == local.EXPECTED
    assert sorted(local.computed(driven)) == local.NUMBERS
    assert len(submissions(driven)) == 1
    assert "waiting for jobs that an earlier driver started" in log_of_driver(driven).read_text()


@pytest.mark.guarantee("driver's job requeued")
@pytest.mark.slow
def test_preempted_driver_job_resumes(driven: Path) -> None:
    """Its jobs are preempted, too."""
    submit(driven)
    wait_for_work(driven)
    preempt()
    assert wait_for_results(driven) == local.EXPECTED
    assert len(submissions(driven)) == 1
    assert "waiting for jobs that an earlier driver started" in log_of_driver(driven).read_text()


@pytest.mark.guarantee("driver's job killed")
@pytest.mark.slow
def test_next_driver_job_awaits_jobs_of_killed_one(driven: Path) -> None:
    driver = submit(driven)
    wait_for_work(driven)
    subprocess.run(["scancel", "--signal=KILL", str(driver.job)], check=True)
    wait_until(lambda: driver_of(driven) is None)
    assert queued("--states=RUNNING")
    assert submit(driven).job != driver.job
    assert wait_for_results(driven) == local.EXPECTED
    assert sorted(local.computed(driven)) == local.NUMBERS
    assert len(submissions(driven)) == 1


@pytest.mark.guarantee("node of the driver's job crashes")
@pytest.mark.slow
def test_driver_job_of_crashed_node_runs_elsewhere(driven: Path) -> None:
    driver = submit(driven)
    wait_for_work(driven)
    [node] = queued(f"--jobs={driver.job}", "--format=%N")
    number = node.removeprefix("node")
    call_lab("kill-node", number)
    try:
        assert wait_for_results(driven) == local.EXPECTED
    finally:
        call_lab("start-node", number)
    assert len(submissions(driven)) == 1  # Slurm requeued the jobs of that node, too


@pytest.mark.guarantee("driver's job reaches its time limit")
@pytest.mark.slow
def test_driver_job_requeues_itself_at_time_limit(driven: Path) -> None:
    program = local.PROGRAM.replace('time.sleep(settings["seconds"])', "time.sleep(20)")
    (driven / "squares_program.py").write_text(program)
    driver = submit(driven, JOB.model_copy(update={"time_limit_minutes": 1}))
    assert wait_for_results(driven) == local.EXPECTED
    assert sorted(local.computed(driven)) == local.NUMBERS
    assert len(submissions(driven)) == 1
    assert f"time limit or preemption: Slurm job {driver.job} is requeued" in log_of_driver(driven).read_text()


@pytest.mark.slow
def test_cancelled_driver_job_cancels_its_jobs(driven: Path) -> None:
    submit(driven)
    wait_for_work(driven)
    assert end_driver(driven)
    wait_until(lambda: queued() == [])  # they may still be completing
    assert all(submission.closed for submission in submissions(driven))
    assert not end_driver(driven)


def configuration(folder: Path, model: Path, **driver: object) -> Path:
    """Write the configuration of a tiny run on Slurm."""
    content = yaml.safe_load(whole.configuration(folder, model).read_text())
    content["cluster"] = {"profile": "slurm", "poll_seconds": 0.5, "slurm": {"driver": {"memory_gb": 2, **driver}}}
    path = folder / "slurm.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.guarantee("driver's job submitted twice")
def test_two_submissions_at_once_make_one_driver(driven: Path) -> None:
    waiting = JOB.model_copy(update={"extra": {"begin": "now+1hour"}})

    with ThreadPoolExecutor(4) as pool:
        attempts = [pool.submit(submit, driven, waiting) for _ in range(4)]
    errors = [error for attempt in attempts if (error := attempt.exception()) is not None]
    assert ["already has a driver" in str(error) for error in errors] == [True] * 3
    [driver] = [attempt.result() for attempt in attempts if attempt.exception() is None]
    assert queued("--format=%i") == [driver.job]
    assert end_driver(driven)
    assert queued() == []


def invoke(folder: Path, *arguments: str) -> tuple[int, str]:
    code, output = whole.invoke(*arguments, cwd=folder)
    return code, " ".join(output.split())


@pytest.mark.guarantee("driver's job submitted twice")
def test_commands_find_queued_driver_job(tiny_llama: Path, tmp_path: Path) -> None:
    config, run = configuration(tmp_path, tiny_llama, extra={"begin": "now+1hour"}), "runs/tiny"
    call = partial(invoke, tmp_path)

    code, output = call("run", str(config), "--submit-driver")
    assert code == 0, output
    [job] = queued("--format=%i")
    assert f"the driver is Slurm job {job}" in output
    for command in (["run", str(config), "--submit-driver"], ["run", str(config)], ["resume", run]):
        code, output = call(*command)
        assert (code, f"already has a driver (Slurm job {job}, PENDING (BeginTime))" in output) == (1, True), output
    assert queued("--format=%i") == [job]
    assert f"driver: Slurm job {job}, PENDING (BeginTime)" in call("status", run)[1]
    assert "driver.log: missing" in call("logs", run, "--driver")[1]
    assert "cancelled" in call("cancel", run)[1]
    assert queued() == []
    assert "nothing of this run is running" in call("cancel", run)[1]


def study(folder: Path, config: Path) -> Path:
    """Write a study of two methods with the experiment of a configuration."""
    content = {"name": "pair", "experiment": yaml.safe_load(config.read_text()), "seeds": [1]}
    path = folder / "pair.yaml"
    path.write_text(yaml.safe_dump(content | {"methods": ["self_instruct", "random"], "baseline": "self_instruct"}))
    return path


@pytest.mark.guarantee("driver's job submitted twice")
@pytest.mark.slow
def test_commands_find_queued_driver_job_of_study(tiny_llama: Path, tmp_path: Path) -> None:
    path = study(tmp_path, configuration(tmp_path, tiny_llama, extra={"begin": "now+1hour"}))
    folder = tmp_path / "runs" / "pair"
    call = partial(invoke, tmp_path)

    code, output = call("compare", str(path), "--submit-driver")
    assert code == 0, output
    [job] = queued("--format=%i")
    assert f"the driver is Slurm job {job}" in output
    for command in (["compare", str(path), "--submit-driver"], ["compare", f"{folder}/study.yaml"]):
        code, output = call(*command)
        assert (code, f"already has a driver (Slurm job {job}, PENDING (BeginTime))" in output) == (1, True), output
    assert f"driver: Slurm job {job}, PENDING (BeginTime)" in call("status", str(folder))[1]
    assert "driver.log: missing" in call("logs", str(folder), "--driver")[1]
    output = call("cancel", str(folder))[1]
    assert f"Resume with: montessori compare {folder}/study.yaml --run-root {tmp_path}/runs" in output
    assert queued() == []


@pytest.mark.guarantee("driver's job of a study requeued")
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_driver_job_study_equals_local_study(talking_llama: Path, tmp_path: Path) -> None:
    code, output = whole.call(
        "compare",
        str(study(tmp_path, whole.configuration(tmp_path, talking_llama))),
        "--run-root",
        "quiet",
        cwd=tmp_path,
    )
    assert code == 0, output
    folder = tmp_path / "runs" / "pair"
    code, output = whole.call(
        "compare", str(study(tmp_path, configuration(tmp_path, talking_llama))), "--submit-driver", cwd=tmp_path
    )
    assert code == 0, output
    driver = driver_of(folder)
    assert driver is not None
    wait_until(lambda: any(map(is_submitted, folder.rglob("ledger.json"))), 1200)
    subprocess.run(["scontrol", "requeue", str(driver.job)], check=True)
    wait_until(lambda: driver_of(folder) is None, 2400)
    assert (folder / "comparison.html").exists(), log_of_driver(folder).read_text()
    quiet = tmp_path / "quiet" / "pair"
    results = [
        path.relative_to(quiet) for name in ("examples.parquet", "model.safetensors") for path in quiet.rglob(name)
    ]
    assert len(results) == 5
    assert [hash_path(folder / path) for path in results] == [hash_path(quiet / path) for path in results]
    assert {len(read_json(ledger)) for ledger in folder.rglob("ledger.json")} == {1}
    wait_until(lambda: queued() == [], 60)


def test_refused_driver_job_leaves_no_driver(tiny_llama: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path, tiny_llama, partition="nowhere")
    code, output = whole.invoke("run", str(config), "--submit-driver", cwd=tmp_path)
    assert code == 1
    assert "sbatch rejected the driver's job: " in output
    assert "cluster.slurm.driver" in output
    assert driver_of(tmp_path / "runs" / "tiny") is None


def is_submitted(ledger: Path) -> bool:
    """Whether Slurm has answered; a driver killed before that submits the jobs again."""
    return any(submission["ids"] for submission in read_json(ledger) or [])


@pytest.mark.guarantee("driver's job of a whole run requeued and killed")
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_driver_jobs_run_equals_local_run(talking_llama: Path, tmp_path: Path) -> None:
    code, output = whole.call(
        "run", str(whole.configuration(tmp_path, talking_llama)), "--run-root", "quiet", cwd=tmp_path
    )
    assert code == 0, output
    config, run = configuration(tmp_path, talking_llama), tmp_path / "runs" / "tiny"

    code, output = whole.call("run", str(config), "--submit-driver", cwd=tmp_path)
    assert code == 0, output
    driver = driver_of(run)
    assert driver is not None
    ledgers = [run / "iteration-1" / stage / "jobs" / "ledger.json" for stage in ("warmup", "influence")]
    wait_until(lambda: is_submitted(ledgers[0]), 1200)
    subprocess.run(["scontrol", "requeue", str(driver.job)], check=True)
    wait_until(lambda: is_submitted(ledgers[1]), 1200)
    subprocess.run(["scancel", "--signal=KILL", str(driver.job)], check=True)
    wait_until(lambda: driver_of(run) is None)
    code, output = whole.call("status", str(run), cwd=tmp_path)
    assert f"montessori resume {run} --submit-driver" in output

    code, output = whole.call("resume", str(run), "--submit-driver", cwd=tmp_path)
    assert code == 0, output
    wait_until(lambda: driver_of(run) is None, 2400)
    assert (run / "report.html").exists(), log_of_driver(run).read_text()
    assert whole.digests(run) == whole.digests(tmp_path / "quiet" / "tiny")
    assert {len(read_json(ledger)) for ledger in run.rglob("ledger.json")} == {1}
    wait_until(lambda: queued() == [], 60)  # the driver's job ends after its process


@pytest.fixture
def server(talking_llama: Path, tmp_path: Path) -> Iterator[Server]:
    """`montessori up` beside a Prefect server with an address that is not the loopback's name, as nodes need it."""
    config = configuration(tmp_path, talking_llama)
    deployments = [
        {"name": "tiny", "parameters": {"experiment": yaml.safe_load(config.read_text())}},
        {"name": "pair", "entrypoint": "flows/study.py:compare", "config": str(study(tmp_path, config))},
    ]
    home = tmp_path / "server"
    home.mkdir()
    with prefect_server(home, host="127.0.0.2") as client:
        running = Server(tmp_path, deployments, client["PREFECT_API_URL"])
        yield running
        running.process.send_signal(signal.SIGINT)
        running.process.wait(120)


def kill_flow_run(server: Server) -> None:
    """Kill the one process that executes a flow run, as sites kill long processes on login nodes."""
    [process] = [
        child for child in psutil.Process(server.process.pid).children() if "engine" in " ".join(child.cmdline())
    ]
    process.kill()


@pytest.mark.guarantee("flow run killed whose driver is a job")
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_retried_flow_run_awaits_its_driver_job(server: Server, finished_run: Path) -> None:
    """Its process is killed, then the driver's job is requeued; the retry waits for the same job."""
    run = server.runs / "tiny"
    flow_run = server.start("tiny", "tiny", submit_driver=True)
    wait_until(lambda: is_submitted(run / "iteration-1" / "warmup" / "jobs" / "ledger.json"), 1200)
    driver = driver_of(run)
    assert driver is not None
    kill_flow_run(server)
    server.wait_for(flow_run, "Crashed")
    subprocess.run(["scontrol", "requeue", str(driver.job)], check=True)
    server.set_state(flow_run, "SCHEDULED")
    server.wait_for(flow_run, "Completed", seconds=2400)
    wait_until(lambda: "the driver has ended" in server.logs(flow_run), 60)  # logs reach the server in batches
    logs = server.logs(flow_run)
    assert f"an earlier flow run or command has submitted the driver: Slurm job {driver.job}" in logs
    assert "iteration-1/evaluation has begun" in logs
    assert whole.digests(run) == whole.digests(finished_run / "runs" / "tiny")
    assert {len(read_json(ledger)) for ledger in run.rglob("ledger.json")} == {1}
    wait_until(lambda: queued() == [], 60)


@pytest.mark.guarantee("flow run cancelled whose driver is a job")
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_cancelled_flow_run_ends_its_driver_job(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, the driver's job is killed: the flow run fails, and its retry submits one that no other flow run ends."""
    # Not above: drivers' jobs import this module, and Prefect would take over their logs.
    from prefect.client.schemas.objects import FlowRun

    from flows.experiment import end_jobs
    from tasks.resume import RUN_ROOT

    run = server.runs / "tiny"
    flow_run = server.start("tiny", "tiny", submit_driver=True)
    wait_until(lambda: is_submitted(run / "iteration-1" / "warmup" / "jobs" / "ledger.json"), 1200)
    driver = driver_of(run)
    assert driver is not None
    subprocess.run(["scancel", "--signal=KILL", str(driver.job)], check=True)
    server.wait_for(flow_run, "Failed")
    reason = f"the driver's job has ended before tiny was finished; the reason is at the end of {run}"
    wait_until(lambda: reason in server.logs(flow_run))  # Prefect sends logs every few seconds
    server.set_state(flow_run, "SCHEDULED")
    wait_until(lambda: (second := driver_of(run)) is not None and second.job not in (None, driver.job), 120)
    parameters = {"experiment": server.deployment("tiny")["parameters"]["experiment"]}
    monkeypatch.setenv(RUN_ROOT, str(server.runs))
    end_jobs(None, FlowRun(flow_id=uuid4(), parameters=parameters), None)
    assert driver_of(run) is not None
    server.set_state(flow_run, "CANCELLING")
    server.wait_for(flow_run, "Cancelled")
    wait_until(lambda: queued() == [], 60)
    assert driver_of(run) is None


@pytest.mark.guarantee("flow run killed whose driver is a job")
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_flow_run_of_study_awaits_its_driver_job(server: Server) -> None:
    """From the form; its process is killed, and the retry waits for the same job. Its next run has nothing to do."""
    folder, pair = server.runs / "pair", server.deployment("pair", "compare")
    content = {"parameters": {**pair["parameters"], "submit_driver": True}, "state": {"type": "SCHEDULED"}}
    flow_run = str(server.ask(f"deployments/{pair['id']}/create_flow_run", content)["id"])
    wait_until(lambda: any(map(is_submitted, folder.rglob("ledger.json"))), 1200)
    driver = driver_of(folder)
    assert driver is not None
    kill_flow_run(server)
    server.wait_for(flow_run, "Crashed")
    server.set_state(flow_run, "SCHEDULED")
    server.wait_for(flow_run, "Completed", seconds=2400)
    wait_until(lambda: "the driver has ended" in server.logs(flow_run), 60)  # logs reach the server in batches
    logs = server.logs(flow_run)
    assert f"an earlier flow run or command has submitted the driver: Slurm job {driver.job}" in logs
    assert "seed-1/methods/random/round-1/student has begun" in logs
    assert (folder / "comparison.html").exists()
    assert {len(read_json(ledger)) for ledger in folder.rglob("ledger.json")} == {1}
    [driven] = [
        run["id"] for run in server.ask("flow_runs/filter", {}) if run["name"] == "pair" and run["id"] != flow_run
    ]
    assert server.state(driven) == "Completed"
    assert "Comparison of methods: pair" in [artifact["description"] for artifact in server.artifacts(driven)]
    again = str(server.ask(f"deployments/{pair['id']}/create_flow_run", content)["id"])
    server.wait_for(again, "Completed")
    wait_until(lambda: "pair is finished" in server.logs(again), 60)
    wait_until(lambda: queued() == [], 60)
