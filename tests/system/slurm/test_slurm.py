"""The fan-out on a real Slurm: faults of tasks, nodes, drivers and the scheduler do not change the parts.

`docker/slurm/lab.sh` runs a cluster of two nodes on this machine during these tests (see `conftest.py`).
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cluster.backends.slurm import largest_array
from cluster.fanout import Progress, ShardsFailed, fan_out
from cluster.stage import Stage
from flows.methods import REGISTRY
from montessori_core import programs
from montessori_core.config import Cluster, Resources, Slurm, TeacherUpdate, Zero
from montessori_core.config.slurm import Container, JobOptions
from montessori_core.errors import UserError
from montessori_core.files import read_json
from montessori_core.program import Row
from support import killed_jobs, studies, wait_until
from support import prefect_server as ui
from support import runs as whole
from support import squares as local
from support.judges import JudgeServer
from support.preference_pairs import PAIRS
from support.row_programs import as_shards
from support.slurm_lab import LAB, call_lab, command_of, preempt, put_command, queued
from support.squares import submissions

pytestmark = pytest.mark.guarantee("no sacct")

SHARDS, EXPECTED = local.SHARDS, local.EXPECTED
PROCESSES_PROGRAM = """
import json, os, platform, time
from pathlib import Path

def open_processes(settings, inputs):
    folder = Path(settings["folder"])
    rank = os.environ["RANK"]
    def compute(rows, output, report):
        if rank == settings["failing_rank"]:
            raise ValueError(f"rank {rank} is bad")
        (folder / f"rank-{rank}.json").write_text(json.dumps({"node": platform.node(), **os.environ}))
        while len(list(folder.glob("rank-*.json"))) < int(os.environ["WORLD_SIZE"]):
            time.sleep(0.1)
        output.write_text(rank)
    return compute
"""

SKEW = """
import os, time
hours = {"node1": 1, "node2": -1}.get(os.environ.get("SLURMD_NODENAME"), 0)
if hours:
    clock, replace = time.time, os.replace
    time.time = lambda: clock() + 3600 * hours
    def shifted_replace(source, target):
        replace(source, target)
        os.utime(target, (time.time(), time.time()))
    os.replace = shifted_replace
"""

ONE_A_NODE = Slurm(exclusive=True)

folder = local.folder


def run(
    folder: Path,
    shards: list[list[Row]] = SHARDS,
    seconds: float = 0.0,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    slurm: Slurm = Slurm(),  # noqa: B008 (frozen)
    stage: Stage | None = None,
    **resources: float,
) -> list[Path]:
    cluster = Cluster(profile="slurm", poll_seconds=0.5, slurm=slurm)
    defaults: dict[str, float] = {"parallel_jobs": 8, "cpus_per_process": 1, "shards_per_job": 1}
    return fan_out(
        stage or local.stage(folder, seconds),
        as_shards(*shards),
        Resources(**defaults | resources),
        cluster,
        on_progress,
    )


def once(condition: Callable[[], bool], action: Callable[[], object]) -> Callable[[Progress], None]:
    """Return an `on_progress` callback that acts when the condition holds for the first time."""
    acted = False

    def look(progress: Progress) -> None:
        nonlocal acted
        if not acted and condition():
            acted = True
            action()

    return look


def start_driver(folder: Path, **options: object) -> subprocess.Popen[str]:
    command = command_of("test_slurm", f"t.run(Path({str(folder)!r}), **{options!r})")
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def break_squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> Path:
    """Make squeue fail `times` times; return a file with a line for each remaining failure."""
    failures = folder / "failures"
    squeue = f'if [ -s {failures} ]; then sed -i 1d {failures}; exit 1; fi; exec {shutil.which("squeue")} "$@"'
    put_command(folder / "bin" / "squeue", squeue)
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)
    failures.write_text("\n" * times)
    return failures


def test_slurm_results_equal_local_results(folder: Path) -> None:
    parts = run(folder, parallel_jobs=3, shards_per_job=2)
    assert local.results(parts) == EXPECTED
    of_slurm = [part.read_bytes() for part in parts]
    for part in parts:
        part.unlink()
    assert [part.read_bytes() for part in local.run(folder, python=sys.executable)] == of_slurm


def test_stage_is_split_into_allowed_arrays(folder: Path) -> None:
    # Three shards, two tasks per array: the last array has one task, which submitit submits without an array.
    parts = run(folder, SHARDS[:3], slurm=Slurm(max_array_size=2))
    assert local.results(parts) == EXPECTED[:9]
    first, second = submissions(folder)
    assert [len(first.tasks), len(second.tasks)] == [2, 1]
    assert sorted(local.computed(folder)) == local.NUMBERS[:9]


@pytest.mark.guarantee("slow task at the end of an array")
@pytest.mark.slow
def test_next_array_uses_freed_parallelism(folder: Path) -> None:
    until_30 = 'while row["n"] == 0 and "30" not in (folder / "computed.txt").read_text().split(): time.sleep(0.2)'
    (folder / "squares_program.py").write_text(local.PROGRAM.replace('time.sleep(settings["seconds"])', until_30))
    running: list[int] = []

    def look(progress: Progress) -> None:
        running.append(len(queued("--states=RUNNING", "--format=%i")))

    # The first shard, in the first array, ends only after a shard of the second array has begun.
    parts = run(folder, slurm=Slurm(max_array_size=3), seconds=0.2, parallel_jobs=2, on_progress=look)
    assert local.results(parts) == EXPECTED
    first, second = submissions(folder)
    assert max(running) == 2
    assert (first.at_once, second.at_once) == (2, 2)  # after the first, the second had both places
    throttle = subprocess.run(["scontrol", "show", "job", (second.ids or [""])[0]], capture_output=True, text=True)
    assert "ArrayTaskThrottle=2" in throttle.stdout


@pytest.mark.guarantee("limit on submitted jobs")
@pytest.mark.slow
def test_driver_waits_at_submission_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If none of our jobs is queued, the array itself is too large, and waiting does not help."""
    refuse = 'echo "sbatch: error: Job violates accounting/QOS policy (job submit limit)" >&2; exit 1'
    sbatch = shutil.which("sbatch")
    put_command(folder / "bin" / "sbatch", f'[ -z "$(squeue -h --me)" ] || {{ {refuse}; }}; exec {sbatch} "$@"')
    with monkeypatch.context() as environment:
        environment.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)
        slurm = Slurm(max_array_size=2)
        assert local.results(run(folder, SHARDS[:4], 0.3, slurm=slurm, parallel_jobs=4)) == EXPECTED[:12]
    (folder / "bin" / "sbatch").write_text(f"#!/bin/sh\n{refuse}\n")
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)
    with pytest.raises(UserError, match=r"(?s)job submit limit.*max_array_size"):
        run(folder, SHARDS)


def test_options_reach_slurm(folder: Path) -> None:
    (folder / "processes_program.py").write_text(PROCESSES_PROGRAM)
    slurm = Slurm(
        partition="main",
        setup=("export FROM_SETUP='a b'",),
        exclusive=True,
        environment={"FROM_ENVIRONMENT": "$HOME 'c'"},
        extra={"comment": "a b", "requeue": False},
        srun=("--export=ALL,FROM_SRUN=yes",),
    )
    run(folder, SHARDS[:1], slurm=slurm, stage=processes(folder), memory_gb=1, gpus_per_node=2, cpus_per_process=3)
    environment = read_json(folder / "rank-0.json")
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert environment["SLURM_MEM_PER_NODE"] == "1024"
    assert environment["SLURM_CPUS_PER_TASK"] == environment["OMP_NUM_THREADS"] == "3"
    assert environment["FROM_SETUP"] == "a b"
    assert environment["FROM_ENVIRONMENT"] == "$HOME 'c'"
    assert environment["FROM_SRUN"] == "yes"


def test_options_of_a_stage_reach_its_jobs(folder: Path) -> None:
    (folder / "processes_program.py").write_text(PROCESSES_PROGRAM)
    slurm = Slurm(
        partition="main",
        environment={"A": "all"},
        stages={"judging": JobOptions(partition="urgent", gpu_option="gres", environment={"B": "judging"})},
    )
    seen = {}
    for kind in ("judging", "influence"):
        stage = replace(processes(folder), folder=folder / kind, kind=kind)
        run(folder, SHARDS[:1], slurm=slurm, stage=stage, gpus_per_node=1)
        seen[kind] = read_json(folder / "rank-0.json")
    assert [seen[kind]["SLURM_JOB_PARTITION"] for kind in seen] == ["urgent", "main"]
    assert [(seen[kind].get("A"), seen[kind].get("B")) for kind in seen] == [("all", "judging"), ("all", None)]
    assert all(len(seen[kind]["CUDA_VISIBLE_DEVICES"]) == 1 for kind in seen)
    [script] = (folder / "judging" / "jobs").glob("*/*_submission.sh")
    assert "--gres=gpu:1" in script.read_text()


@pytest.mark.slow
def test_driver_inside_a_job_submits_as_outside(folder: Path) -> None:
    """The surrounding job has memory by CPU, this one by node, which exclude each other."""
    (folder / "processes_program.py").write_text(PROCESSES_PROGRAM)
    call = f"folder = Path({str(folder)!r}); t.run(folder, t.SHARDS[:1], stage=t.processes(folder), memory_gb=1)"
    job = ["salloc", "--mem-per-cpu=100", "--cpus-per-task=2", "--job-name=outer", "--distribution=cyclic"]
    subprocess.run([*job, *command_of("test_slurm", call)], check=True)
    environment = read_json(folder / "rank-0.json")
    assert environment["SLURM_MEM_PER_NODE"] == "1024"
    assert environment["SLURM_CPUS_PER_TASK"] == "1"
    assert environment["SLURM_JOB_NAME"] != "outer"
    assert "SLURM_MEM_PER_CPU" not in environment
    assert environment["SLURM_CONF"] == os.environ["SLURM_CONF"]
    [script] = (folder / "stage" / "jobs").glob("*/*_submission.sh")
    assert "wckey" not in script.read_text()


@pytest.mark.parametrize("shards", [pytest.param(SHARDS, marks=pytest.mark.slow), SHARDS[:1]], ids=["array", "one job"])
def test_variables_of_slurm_override_no_setting(
    folder: Path, monkeypatch: pytest.MonkeyPatch, shards: list[list[Row]]
) -> None:
    variables = {
        "SBATCH_PARTITION": "urgent",
        "SBATCH_TIMELIMIT": "1",
        "SBATCH_JOB_NAME": "other",
        "SBATCH_WAIT": "1",
        "SBATCH_ARRAY_INX": "0-3",
        "SBATCH_MEM_PER_CPU": "100",
        "SBATCH_OUTPUT": "/dev/null",
        "SQUEUE_PARTITION": "urgent",
        "SQUEUE_STATES": "PENDING",
        "SCANCEL_INTERACTIVE": "1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (folder / "processes_program.py").write_text(PROCESSES_PROGRAM)
    slurm = Slurm(partition="main", extra={"wckey": "mine"})
    run(folder, shards, slurm=slurm, stage=processes(folder), memory_gb=1)
    environment = read_json(folder / "rank-0.json")
    assert environment["SLURM_JOB_PARTITION"] == "main"
    assert environment["SLURM_MEM_PER_NODE"] == "1024"
    assert environment["SLURM_JOB_NAME"] != "other"
    [script] = {path.resolve() for path in (folder / "stage" / "jobs").glob("*/*_submission.sh")}
    assert "--wckey=mine" in script.read_text()


def test_variables_of_slurm_are_defaults(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites set accounts and partitions in this way."""
    monkeypatch.setenv("SBATCH_PARTITION", "urgent")
    (folder / "processes_program.py").write_text(PROCESSES_PROGRAM)
    run(folder, SHARDS[:1], stage=processes(folder))
    assert read_json(folder / "rank-0.json")["SLURM_JOB_PARTITION"] == "urgent"


@pytest.mark.slow
def test_slurm_jobs_import_installed_packages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "own").mkdir()
    for name in ("cluster", "tasks", "flows", "montessori_core", "submitit", "numpy", "queue"):
        (folder / "own" / f"{name}.py").write_text(f"raise RuntimeError('{name} of the working directory')\n")
    monkeypatch.chdir(folder / "own")
    assert local.results(run(folder, SHARDS, infrastructure_retries=0)) == EXPECTED


def test_sbatch_refusal_is_reported(folder: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)sbatch.*nowhere.*cluster\.slurm"):
        run(folder, slurm=Slurm(partition="nowhere"))


@pytest.mark.guarantee("job killed in the middle of a shard")
def test_killed_worker_costs_only_its_shard(folder: Path) -> None:
    (folder / "kill-31").touch()
    assert local.results(run(folder, parallel_jobs=3, shards_per_job=2)) == EXPECTED
    assert sorted(local.computed(folder)) == sorted([*local.NUMBERS, 30, 31])


@pytest.mark.guarantee("error in the code")
@pytest.mark.slow
def test_code_error_fails_only_its_shard(folder: Path) -> None:
    (folder / "fail-21").touch()
    with pytest.raises(ShardsFailed) as failure:
        run(folder)
    assert [(f.shard, f.kind, f.error) for f in failure.value.failures] == [
        (2, "code_error", "ValueError: row 21 is bad")
    ]
    assert "row 21 is bad" in Path(failure.value.failures[0].log).read_text()
    (folder / "fail-21").unlink()
    assert local.results(run(folder)) == EXPECTED
    assert sorted(local.computed(folder)) == sorted([*local.NUMBERS, 20, 21])


@pytest.mark.guarantee("disk full")
@pytest.mark.slow
def test_shards_resume_after_disk_full(folder: Path) -> None:
    (folder / "full-21").touch()
    with pytest.raises(ShardsFailed, match=r"shard 2 \(disk_full\)"):
        run(folder)
    (folder / "full-21").unlink()
    assert local.results(run(folder)) == EXPECTED
    assert sorted(local.computed(folder)) == sorted([*local.NUMBERS, 20, 21])


@pytest.mark.slow
def test_lost_shard_fails_with_slurm_reason(folder: Path) -> None:
    (folder / "squares_program.py").write_text("import os\ndef open_squares(settings, inputs): os._exit(3)")
    with pytest.raises(ShardsFailed, match=r"lost.*FAILED.*on node.*1 times"):
        run(folder, SHARDS[:1], infrastructure_retries=0)


@pytest.mark.slow
def test_next_driver_waits_for_jobs_of_killed_driver(folder: Path) -> None:
    driver = start_driver(folder, seconds=0.3, parallel_jobs=2)
    wait_until(lambda: len(local.computed(folder)) >= 2)
    driver.kill()
    driver.wait()
    assert queued("--states=RUNNING")
    assert local.results(run(folder, seconds=0.3)) == EXPECTED
    assert sorted(local.computed(folder)) == local.NUMBERS
    assert len(submissions(folder)) == 1


@pytest.mark.guarantee("jobs on one node die at start-up")
@pytest.mark.slow
def test_node_that_loses_shards_is_excluded(folder: Path) -> None:
    """A node whose jobs die at once would otherwise take all tasks of the queue."""
    broken = 'if os.environ["SLURMD_NODENAME"] == "node1": os._exit(9)'
    (folder / "squares_program.py").write_text(
        local.PROGRAM.replace("    folder = Path", f"    {broken}\n    folder = Path")
    )
    parts = run(folder, parallel_jobs=2, exclude_node_after=2, infrastructure_retries=10)
    assert local.results(parts) == EXPECTED
    places = [{local.stage(folder).node_of(job_id) for job_id in s.ids or []} for s in submissions(folder)]
    assert any("node1" in nodes for nodes in places)
    assert places[-1] == {"node2"}


@pytest.mark.slow
def test_interrupted_driver_cancels_slurm_jobs(folder: Path) -> None:
    driver = start_driver(folder, seconds=0.6, parallel_jobs=2)
    wait_until(lambda: len(local.computed(folder)) >= 2)
    driver.send_signal(signal.SIGINT)
    driver.wait(30)
    assert queued() == []
    assert all(submission.closed for submission in submissions(folder))
    assert local.results(run(folder)) == EXPECTED


@pytest.mark.guarantee("driver killed before it records a job id")
@pytest.mark.slow
def test_jobs_with_unrecorded_ids_are_cancelled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch = folder / "bin" / "sbatch"
    put_command(sbatch, f'{shutil.which("sbatch")} "$@"; kill -KILL $PPID')
    with monkeypatch.context() as environment:
        environment.setenv("PATH", str(sbatch.parent), prepend=os.pathsep)
        driver = start_driver(folder)
        assert driver.wait(30) == -signal.SIGKILL
    [orphan] = submissions(folder)
    assert orphan.ids is None
    assert queued(f"--name={orphan.name}")
    sbatch.unlink()
    failures = break_squeue(folder, monkeypatch, 2)
    assert local.results(run(folder)) == EXPECTED
    assert failures.read_text() == ""
    assert queued(f"--name={orphan.name}") == []


@pytest.mark.guarantee("pending tasks cancelled by someone else")
@pytest.mark.slow
def test_externally_cancelled_tasks_are_resubmitted(folder: Path) -> None:
    cancel = once(
        lambda: len(local.computed(folder)) >= 2,
        lambda: subprocess.run(["scancel", "--me", "--state=PENDING"], check=True),
    )
    parts = run(folder, SHARDS[:3], seconds=0.3, parallel_jobs=1, on_progress=cancel)
    assert local.results(parts) == EXPECTED[:9]
    assert len(submissions(folder)) == 2


@pytest.mark.guarantee("squeue fails for a while")
@pytest.mark.slow
def test_unresponsive_scheduler_is_awaited(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = break_squeue(folder, monkeypatch, 4)  # before the first submission; then again while tasks run
    more_failures = once(lambda: len(local.computed(folder)) >= 2, lambda: failures.write_text("\n" * 4))
    assert local.results(run(folder, SHARDS[:2], seconds=1, on_progress=more_failures)) == EXPECTED[:6]
    assert failures.read_text() == ""
    assert sorted(local.computed(folder)) == local.NUMBERS[:6]
    assert len(submissions(folder)) == 1


@pytest.mark.guarantee("sbatch fails for a while")
@pytest.mark.slow
@pytest.mark.parametrize(("taken", "hangs"), [(False, False), (True, False), (True, True)])
def test_temporary_sbatch_failure_is_retried(
    folder: Path, monkeypatch: pytest.MonkeyPatch, taken: bool, hangs: bool
) -> None:
    """A busy controller answers late or never; it may have accepted jobs without returning their ids."""
    monkeypatch.setattr("cluster.backends.slurm.SBATCH_PATIENCE", 3)
    failures, sbatch = folder / "failures", shutil.which("sbatch")
    first = f'{sbatch} "$@" >/dev/null; ' if taken else ""
    away = 'echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2; exit 1'
    away = "sleep 600" if hangs else away
    put_command(
        folder / "bin" / "sbatch",
        f'if [ -s {failures} ]; then sed -i 1d {failures}; {first}{away}; fi; exec {sbatch} "$@"',
    )
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)
    failures.write_text("\n" * 2)
    assert local.results(run(folder, SHARDS[:2], seconds=0.5)) == EXPECTED[:6]
    assert failures.read_text() == ""
    assert len(submissions(folder)) == 3
    assert queued() == []


@pytest.mark.guarantee("task reaches its time limit")
@pytest.mark.slow
def test_task_at_time_limit_is_requeued_and_resumes(folder: Path) -> None:
    # Slurm's signal before the limit, sent by hand: limits are in minutes.
    signal_tasks = once(
        lambda: len(local.computed(folder)) >= 4, lambda: subprocess.run(["scancel", "--me", "--signal=USR2"])
    )
    parts = run(folder, SHARDS[:3], seconds=0.6, parallel_jobs=1, shards_per_job=3, on_progress=signal_tasks)
    assert local.results(parts) == EXPECTED[:9]
    assert local.computed(folder).count(0) == 1  # the finished shard was kept
    assert len(local.computed(folder)) > 9
    assert len(submissions(folder)) == 1


@pytest.mark.guarantee("job hangs beyond its time limit")
@pytest.mark.slow
def test_hanging_task_is_resubmitted_after_time_limit(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It does not handle the signal before the limit, like a kernel or collective that never returns."""
    deaf = "signal.signal(signal.SIGUSR2, signal.SIG_IGN); time.sleep(600)"
    (folder / "squares_program.py").write_text(local.PROGRAM.replace("time.sleep(600)", deaf))
    (folder / "hang-11").touch()
    assert local.results(run(folder, SHARDS[:3], time_limit_minutes=1)) == EXPECTED[:9]
    assert sorted(local.computed(folder)) == sorted([*local.NUMBERS[:9], 10, 11])
    assert "TIMEOUT" in caplog.text
    assert len(submissions(folder)) == 2


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
        server.wait_for(lost, "Crashed", seconds=200)
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


@pytest.mark.guarantee("node crashes in the middle of an array")
def test_shards_of_crashed_node_run_elsewhere(folder: Path) -> None:
    crashed = []

    def crash() -> None:
        [node] = {*queued("--states=RUNNING", "--format=%N")}
        crashed.append(node.removeprefix("node"))
        call_lab("kill-node", crashed[0])

    try:
        parts = run(folder, SHARDS[:2], seconds=1, on_progress=once(lambda: len(local.computed(folder)) >= 2, crash))
    finally:
        call_lab("start-node", *crashed)
    assert local.results(parts) == EXPECTED[:6]
    assert len(local.computed(folder)) > 6
    assert len(submissions(folder)) == 1  # Slurm requeued them


@pytest.mark.guarantee("node is drained")
@pytest.mark.slow
def test_drained_node_finishes_its_tasks(folder: Path) -> None:
    def drain() -> None:
        subprocess.run(["scontrol", "update", "nodename=node1", "state=drain", "reason=test"], check=True)

    drained = once(lambda: len(local.computed(folder)) >= 2, drain)
    try:
        parts = run(folder, seconds=0.3, parallel_jobs=2, on_progress=drained)
    finally:
        subprocess.run(["scontrol", "update", "nodename=node1", "state=resume"], check=True)
    assert local.results(parts) == EXPECTED
    assert sorted(local.computed(folder)) == local.NUMBERS


@pytest.mark.guarantee("task requeued by hand")
@pytest.mark.slow
def test_manually_requeued_task_is_recomputed(folder: Path) -> None:
    def requeue() -> None:
        subprocess.run(["scontrol", "requeue", queued("--states=RUNNING", "--format=%i")[0]], check=True)

    parts = run(folder, SHARDS[:2], seconds=3, on_progress=once(lambda: len(local.computed(folder)) >= 2, requeue))
    assert local.results(parts) == EXPECTED[:6]
    assert len(local.computed(folder)) > 6
    assert len(submissions(folder)) == 1


@pytest.mark.guarantee("task preempted")
def test_preempted_tasks_are_requeued_and_resume(folder: Path) -> None:
    preempted = once(lambda: len(local.computed(folder)) >= 2, preempt)
    parts = run(folder, SHARDS[:2], seconds=1, on_progress=preempted, slurm=Slurm(partition="main"))
    assert local.results(parts) == EXPECTED[:6]
    assert len(local.computed(folder)) > 6
    assert len(submissions(folder)) == 1


@pytest.mark.guarantee("Slurm controller restarted")
@pytest.mark.slow
def test_driver_survives_controller_restart(folder: Path) -> None:
    restarted = once(lambda: len(local.computed(folder)) >= 2, lambda: call_lab("restart-controller"))
    assert local.results(run(folder, seconds=0.5, parallel_jobs=2, on_progress=restarted)) == EXPECTED
    assert sorted(local.computed(folder)) == local.NUMBERS
    assert len(submissions(folder)) == 1


@pytest.mark.guarantee("Slurm controller killed")
@pytest.mark.slow
def test_driver_survives_killed_controller(folder: Path) -> None:
    """It reads its last saved state: it may not know later jobs, or that they run."""
    killed = once(lambda: len(local.computed(folder)) >= 2, lambda: call_lab("kill-controller"))
    assert local.results(run(folder, seconds=0.5, parallel_jobs=2, on_progress=killed)) == EXPECTED


@pytest.mark.guarantee("node fails to launch jobs")
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="nodes of an ordinary user's lab have no names of their own")
def test_jobs_not_launched_by_broken_node_run_elsewhere(folder: Path) -> None:
    """Slurm drains the node and requeues the jobs as held, to be released by an administrator."""
    broken = Path(os.environ["LAB"]) / "broken-node1"
    broken.touch()
    try:
        parts = run(folder, SHARDS[:3], slurm=ONE_A_NODE)
    finally:
        broken.unlink()
    assert local.results(parts) == EXPECTED[:9]
    assert sorted(local.computed(folder)) == local.NUMBERS[:9]
    assert len(submissions(folder)) > 1
    assert queued() == []


@pytest.mark.guarantee("damaged result or manifest")
@pytest.mark.slow
def test_damaged_truncated_and_stale_results_are_recomputed(folder: Path) -> None:
    stage = local.stage(folder, version=2)
    run(folder, SHARDS[4:5], stage=local.stage(folder, version=1))
    stale, manifest = (path.read_bytes() for path in (stage.part(0), stage.manifest(0)))
    run(folder, stage=stage)
    stage.part(0).write_text(stage.part(0).read_text()[:-3])
    stage.part(1).write_text(stage.part(1).read_text().replace("1", "2"))
    stage.part(2).unlink()
    stage.manifest(3).write_text(stage.manifest(3).read_text()[:20])
    stage.part(4).write_bytes(stale)
    stage.manifest(4).write_bytes(manifest)
    assert local.results(run(folder, stage=stage)) == EXPECTED
    again = [row["n"] for shard in SHARDS[:5] for row in shard]
    assert sorted(local.computed(folder)) == sorted([*local.NUMBERS, *again, *local.NUMBERS[12:15]])


@pytest.mark.guarantee("profile changed between two drivers")
@pytest.mark.slow
@pytest.mark.parametrize("first", ["slurm", "local"])
def test_jobs_of_previous_profile_are_cancelled(folder: Path, first: str) -> None:
    driver = start_driver(folder, seconds=0.6) if first == "slurm" else local.start_driver(folder)
    wait_until(lambda: len(local.computed(folder)) >= 2)
    driver.kill()
    driver.wait()
    assert queued() if first == "slurm" else local.jobs_alive(folder / "stage")
    assert local.results(local.run(folder, python=sys.executable) if first == "slurm" else run(folder)) == EXPECTED
    assert queued() == []
    assert local.jobs_alive(folder / "stage") == 0


@pytest.mark.guarantee("clocks of two nodes differ by two hours")
@pytest.mark.slow
def test_node_clock_may_be_wrong(folder: Path) -> None:
    """Clocks decide nothing: processes and files of node1 are an hour ahead, those of node2 an hour behind."""
    (folder / "sitecustomize.py").write_text(SKEW)
    (folder / "kill-11").touch()
    parts = run(folder, seconds=0.2, slurm=ONE_A_NODE, duplicate_stragglers_after=20)
    assert local.results(parts) == EXPECTED
    assert sorted(local.computed(folder)) == sorted([*local.NUMBERS, 10, 11])
    committed = [local.stage(folder).manifest(shard).stat().st_mtime for shard in range(len(SHARDS))]
    assert max(committed) - min(committed) > 3000
    assert local.results(run(folder, seconds=0.2)) == EXPECTED
    assert len(local.computed(folder)) == len(local.NUMBERS) + 2


@pytest.mark.guarantee("node hangs")
@pytest.mark.slow
def test_hanging_node_does_not_delay_stage(folder: Path) -> None:
    (folder / "squares_program.py").write_text(
        local.PROGRAM.replace(
            'time.sleep(settings["seconds"])',
            'time.sleep(600 if os.environ["SLURMD_NODENAME"] == "node1" else settings["seconds"])',
        )
    )
    parts = run(folder, SHARDS[:3], seconds=0.2, slurm=ONE_A_NODE, duplicate_stragglers_after=4)
    assert local.results(parts) == EXPECTED[:9]
    places = [{local.stage(folder).node_of(job_id) for job_id in s.ids or []} for s in submissions(folder)]
    assert "node1" in places[0]
    assert set.union(*places[1:]) == {"node2"}
    assert queued() == []


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["apptainer", "pyxis"])
def test_jobs_run_in_configured_container(folder: Path, monkeypatch: pytest.MonkeyPatch, runtime: str) -> None:
    """The runtimes are not installed: replacement commands record their arguments and run the job on the node."""
    said = folder / "said"
    if runtime == "apptainer":
        put_command(folder / "bin" / "apptainer", f'echo "$@" >>{said}; shift 4; exec "$@"')
    else:
        lines = f'echo "$@" >>{said}; for o; do shift; case $o in --container-*) ;; *) set -- "$@" "$o";; esac; done'
        put_command(folder / "bin" / "srun", f'{lines}; exec {shutil.which("srun")} "$@"')
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)
    container = Container(image="/images/worker.sqsh", runtime=runtime, mounts=(str(folder),))
    assert (
        local.results(run(folder, SHARDS[:1], slurm=Slurm(python=sys.executable, container=container))) == EXPECTED[:3]
    )
    expected = {
        "apptainer": f"exec --nv --bind={folder} /images/worker.sqsh {sys.executable} -P -u -m submitit",
        "pyxis": f"--container-image=/images/worker.sqsh --container-mounts={folder}:{folder} {sys.executable} -P -u",
    }
    assert expected[runtime] in said.read_text()


def test_array_limit_is_read_from_slurm() -> None:
    assert largest_array() == 501  # as set by docker/slurm/lab.sh


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


def processes(folder: Path, failing_rank: str = "") -> Stage:
    settings = {"folder": str(folder), "failing_rank": failing_rank}
    return Stage("processes", 1, "processes_program:open_processes", settings, {}, {}, folder / "stage", ".json")


def test_multi_node_job_processes_connect(folder: Path) -> None:
    (folder / "processes_program.py").write_text(PROCESSES_PROGRAM)
    [part] = run(folder, SHARDS[:1], stage=processes(folder), nodes=2, processes_per_node=1)
    assert part.read_text() == "0"
    ranks = [read_json(folder / f"rank-{rank}.json") for rank in range(2)]
    assert [(rank["RANK"], rank["WORLD_SIZE"], rank["LOCAL_RANK"]) for rank in ranks] == [
        ("0", "2", "0"),
        ("1", "2", "0"),
    ]
    assert ranks[0]["SLURM_NODEID"] != ranks[1]["SLURM_NODEID"]
    assert ranks[0]["MASTER_ADDR"] == ranks[1]["MASTER_ADDR"] == ranks[0]["node"]
    assert ranks[0]["MASTER_PORT"] == ranks[1]["MASTER_PORT"]


@pytest.mark.slow
def test_failing_process_ends_its_job(folder: Path) -> None:
    (folder / "processes_program.py").write_text(PROCESSES_PROGRAM)
    with pytest.raises(ShardsFailed, match="rank 1 is bad"):
        run(folder, SHARDS[:1], stage=processes(folder, failing_rank="1"), nodes=2)


@pytest.mark.slow
def test_doctor_passes_on_working_cluster(tmp_path: Path) -> None:
    code, output = doctor(tmp_path, {"slurm": {"partition": "main"}})
    assert code == 0, output
    for text in (
        "scheduler: answers",
        "accounting: none",
        "partition: main: 2 nodes",
        "sbatch options of generation, training, teacher_update, influence, evaluation: --cpus-per-task=2 --nodes=1",
        "sbatch options of judging: --cpus-per-task=1 --nodes=1 --ntasks-per-node=1 --partition=main --requeue --time=240",
        "sbatch options of driver: ",
        "see the same files",
        "training job: environment: Python 3",
        "all-reduce over 2 nodes: 2 processes, sum 2",
    ):
        assert text in output
    assert not list((tmp_path / "runs").iterdir())
    assert queued() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (
            {"slurm": {"partition": "nowhere"}},
            ["no partition nowhere; available: brief, main, urgent", "set cluster.slurm.partition"],
        ),
        (
            {"resources": {"influence": {"gpus_per_node": 8}}},
            ["GPUs of main: 2 per node, 8 requested", "gpus_per_node"],
        ),
        (
            {"slurm": {"partition": "brief"}},
            ["time limits of brief: 2 minutes in the partition, 240 requested", "time_limit_minutes"],
        ),
        (
            {"slurm": {"stages": {"judging": {"partition": "brief"}}}},
            ["time limits of brief: 2 minutes in the partition, 240 requested", "partition: main: 2 nodes"],
        ),
        (
            {"slurm": {"stages": {"judging": {"constraint": "nothing"}}}},
            [
                "sbatch options of judging: --constraint=nothing",
                "Invalid feature specification",
                "change cluster.slurm",
            ],
        ),
        (
            {"generation_python": sys.executable},
            ["generation job: environment", "vllm: ModuleNotFoundError", "make install-generation"],
        ),
        ({"slurm": {"max_array_size": 100_000}}, ["MaxArraySize is", "or less"]),
        (
            {"slurm": {"python": "/nowhere/python"}},
            ["training job: lost", "does the Python that the configuration names"],
        ),
        ({"resources": {"influence": {"memory_gb": 9000}}}, ["sbatch options of influence: ", "--mem=9000GB"]),
    ],
)
def test_doctor_names_faults_and_remedies(tmp_path: Path, change: dict[str, object], messages: list[str]) -> None:
    code, output = doctor(tmp_path, change)
    assert code == 1
    for message in messages:
        assert message in " ".join(output.split())
    assert queued() == []


@pytest.mark.slow
def test_doctor_detects_unshared_folder() -> None:
    """Each node of the lab has a separate /dev/shm, like /tmp on a cluster."""
    private = Path("/dev/shm") / f"montessori-doctor-{os.getpid()}"
    try:
        code, output = doctor(private, {})
    finally:
        shutil.rmtree(private, ignore_errors=True)
    assert code == 1
    assert "is this folder on a shared file system" in output


@pytest.mark.slow
def test_doctor_gives_up_on_jobs_that_wait_too_long(tmp_path: Path) -> None:
    code, output = doctor(tmp_path, {"slurm": {"extra": {"begin": "now+1hour"}}}, "--patience", "3")
    assert code == 1
    assert "no result within 3 s; its jobs were cancelled" in output
    assert queued() == []


@pytest.mark.slow
def test_doctor_cancels_its_jobs_at_hangup(tmp_path: Path) -> None:
    command, options = doctor_call(tmp_path, {"slurm": {"extra": {"begin": "now+1hour"}}}, "--patience", "150")
    with whole.hangups_end_children():
        process = subprocess.Popen(command, **options)
    wait_until(lambda: queued("--format=%l") == ["5:00"], 60)  # ends by itself if the doctor is killed
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert queued() == []


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


def doctor(folder: Path, cluster: dict[str, object], *options: str) -> tuple[int, str]:
    command, keywords = doctor_call(folder, cluster, *options)
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, **keywords)
    return outcome.returncode, outcome.stdout + outcome.stderr


def doctor_call(folder: Path, cluster: dict[str, object], *options: str) -> tuple[list[str], dict[str, Any]]:
    """Write a cluster file; return the command that checks it, and keywords of subprocess."""
    folder.mkdir(exist_ok=True)
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump({"profile": "slurm", "poll_seconds": 0.5} | cluster))
    command = [sys.executable, "-m", "flows.cli", "doctor", "--cluster", str(path), *options]
    return command, {"cwd": folder, "env": os.environ | {"PYTHONPATH": str(LAB.parent.parent)}}
