"""Whole runs on a real Slurm: their tables are those of local runs."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from cluster.progress import Progress
from cluster.stage import Stage
from flows.methods import REGISTRY
from montessori_core import programs
from montessori_core.config import TeacherUpdate, Zero
from montessori_core.files import read_json
from support import killed_jobs, studies, wait_until
from support import prefect_server as ui
from support import runs as whole
from support import squares as local
from support.judges import JudgeServer
from support.preference_pairs import PAIRS
from support.slurm_lab import call_lab, preempt, queued
from support.slurm_stage import run
from support.squares import submissions

pytestmark = pytest.mark.guarantee("no sacct")


folder = local.folder


@pytest.mark.guarantee("driver of a whole Slurm run killed twice")
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_interrupted_slurm_run_has_tables_of_local_run(talking_llama: Path, tmp_path: Path) -> None:
    """Its driver is killed while jobs run and while it joins tables; a second driver starts while it runs."""
    local_config = whole.configuration(tmp_path, talking_llama)
    code, output = whole.call("run", str(local_config), "--run-root", "quiet", cwd=tmp_path)
    assert code == 0, output
    config = tmp_path / "slurm.yaml"
    cluster = {"profile": "slurm", "poll_seconds": 0.5}
    config.write_text(yaml.safe_dump(yaml.safe_load(local_config.read_text()) | {"cluster": cluster}))
    run = tmp_path / "runs" / "tiny"
    ledger = run / "iteration-1" / "influence" / "jobs" / "ledger.json"

    driver = whole.montessori("run", str(config), cwd=tmp_path)
    wait_until(lambda: ledger.exists() and bool(queued("--states=RUNNING")), 600)
    code, output = whole.call("run", str(config), cwd=tmp_path)
    assert (code, "this run already has a driver" in output) == (1, True)
    driver.kill()
    driver.wait()
    assert queued()

    environment = os.environ | {"PYTHONPATH": str(whole.ROOT)}
    command = [sys.executable, "-c", whole.DIES_WHILE_JOINING, str(run)]
    assert subprocess.run(command, cwd=tmp_path, env=environment, check=False).returncode == -signal.SIGKILL
    assert len(read_json(ledger)) == 1  # the first driver's submission was awaited

    code, output = whole.call("resume", str(run), cwd=tmp_path)
    assert code == 0, output
    assert whole.digests(run) == whole.digests(tmp_path / "quiet" / "tiny")
    assert queued() == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_prefect_run_is_cancelled_and_resumed_on_slurm(talking_llama: Path, tmp_path: Path) -> None:
    """After cancelling, the queue is empty within a minute. After the loss of `up` and its machine, the run is marked as
    crashed, and its retry waits for the jobs that continue on Slurm."""
    content = yaml.safe_load(whole.configuration(tmp_path, talking_llama).read_text())
    content["comparison"] = {"unmodified_teacher": False, "influence_examples": 0}
    content["cluster"] = {"profile": "slurm", "poll_seconds": 0.5}
    server = ui.Server(tmp_path, [{"name": "tiny", "parameters": {"experiment": content}}])
    try:
        cancelled = server.start("tiny", "cancelled")
        wait_until(lambda: bool(queued("--states=RUNNING")), 300)
        server.set_state(cancelled, "CANCELLING")
        wait_until(lambda: not queued(), 60)
        server.wait_for(cancelled, "Cancelled")

        lost = server.start("tiny", "lost")
        ledger = server.runs / "lost" / "iteration-1" / "warmup" / "jobs" / "ledger.json"
        wait_until(lambda: ledger.exists() and bool(queued("--states=RUNNING")), 600)
        driver = server.driver(lost)
        server.process.kill()
        driver.kill()
        server.process.wait()
        assert queued()
        server.process = server.up()
        server.wait_for(lost, "Crashed", seconds=420)
        server.set_state(lost, "SCHEDULED")
        server.wait_for(lost, "Completed", seconds=900)
        assert len(read_json(ledger)) == 1
    finally:
        server.process.send_signal(signal.SIGINT)
        server.process.wait(120)
        for process in psutil.process_iter(["cmdline"]):  # the server of the killed `up`
            if f"--port {server.port}" in " ".join(process.info["cmdline"] or []):
                process.terminate()
    assert queued() == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_method_runs_on_slurm(talking_llama: Path, tmp_path: Path) -> None:
    judge = JudgeServer(lambda response: str(len(response) % 6))
    studies.write_study(tmp_path, talking_llama, judge, profile="slurm", poll_seconds=0.5)
    environment = studies.environment_of(tmp_path)
    code, output = whole.call("compare", "study.yaml", cwd=tmp_path, seconds=3000, **environment)
    judge.close()
    assert code == 0, output
    runs = tmp_path / "runs" / "tiny-study"
    assert {row["method"] for row in read_json(runs / "comparison.json")["methods"]} == {*REGISTRY, "mine"}
    ids = {read_json(manifest)["job_id"] for manifest in runs.rglob("part-*.manifest.json")}
    assert len(ids) > 50
    assert all(re.fullmatch(r"\d+(_\d+)?", job_id) for job_id in ids)
    assert queued() == []


@pytest.mark.guarantee("node crashes during a teacher update over two nodes")
@pytest.mark.guarantee("teacher update over two nodes preempted")
@pytest.mark.slow
@pytest.mark.parametrize("fault", ["crash", "preemption"])
def test_two_node_teacher_update_resumes_after_fault(folder: Path, tiny_llama: Path, fault: str) -> None:
    """With ZeRO-2, the weights equal those of an uninterrupted training."""
    recipe = TeacherUpdate(learning_rate=1e-3, batch_size=2, micro_batch_size=1)
    settings = programs.Dpo(prompt_style="completion", recipe=recipe, zero=Zero(stage=2), seed=0)
    rows = [pair | {"chosen": f"{n} {pair['chosen']}"} for n in range(8) for pair in PAIRS]

    def update(name: str, on_progress: Callable[[Progress], None] = lambda progress: None) -> Path:
        stage = Stage.of(killed_jobs.DPO, settings, folder / name, {"teacher": tiny_llama}, {})
        [part] = run(folder, [rows], stage=stage, nodes=2, on_progress=on_progress)
        return part

    def crash(progress: Progress) -> None:
        if list((folder / "hit").glob("checkpoints/*/checkpoint-*/whole")) and not hit:
            hit.append(True)
            if fault == "preemption":
                preempt()
            else:
                call_lab("kill-node", "2")
                call_lab("start-node", "2")

    hit: list[bool] = []
    undisturbed, part = update("undisturbed"), update("hit", crash)
    assert hit
    logs = "".join(path.read_text() for path in (folder / "hit" / "jobs").rglob("*_log.err"))
    assert "resuming from checkpoint-" in logs
    if fault == "preemption":
        left = max(re.findall(r"the scheduler ends this job: exiting with (checkpoint-\d+)", logs))
        assert f"resuming from {left}\n" in logs  # no step was repeated
    assert len(submissions(folder, "hit")) == 1
    assert (part / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()


def test_pool_is_measured_on_slurm(tiny_llama: Path, tmp_path: Path) -> None:
    """`montessori influence --cluster`: the table has the bytes of one that was made on this machine."""
    rows = [{"instruction": f"Name {i}.", "output": "thing " * (1 + i % 5)} for i in range(40)]
    (tmp_path / "pool.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cluster = {"profile": "slurm", "poll_seconds": 0.5, "resources": {"influence": {"parallel_jobs": 2}}}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    command = ["influence", "--student", str(tiny_llama), "--examples", "pool.jsonl", "--reference", "pool.jsonl"]
    tables = []
    for name, options in (("slurm", ["--cluster", "cluster.yaml"]), ("local", [])):
        out = ["--out", f"{name}.parquet", "--estimator", "first_order"]
        code, output = whole.invoke(*command, *out, *options, cwd=tmp_path)
        assert code == 0, output
        tables.append((tmp_path / f"{name}.parquet").read_bytes())
    assert tables[0] == tables[1]
    assert [one.host for one in submissions(tmp_path / "slurm.parquet.parts", "first_order")] == [None]
