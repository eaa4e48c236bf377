"""Stages on a real Slurm: results, options, arrays and jobs of several processes.

`docker/slurm/lab.sh` runs a cluster of two nodes on this machine during these tests (see `conftest.py`).
"""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.backends.base import JobsRemain
from cluster.backends.slurm import largest_array
from cluster.fanout import ShardsFailed
from cluster.progress import Progress
from cluster.status import cancel_jobs
from montessori_core.config import Cluster, Slurm
from montessori_core.config.slurm import Container, JobOptions
from montessori_core.errors import UserError
from montessori_core.files import read_json
from montessori_core.program import Row
from support import squares as local
from support import wait_until
from support.slurm_lab import command_of, put_command, queued
from support.slurm_stage import PROCESSES_PROGRAM, processes, run, start_driver
from support.squares import submissions

pytestmark = pytest.mark.guarantee("no sacct")

SHARDS, EXPECTED = local.SHARDS, local.EXPECTED

folder = local.folder


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
    """If one job is refused and none of ours is queued, waiting does not help."""
    refuse = 'echo "sbatch: error: Job violates accounting/QOS policy (job submit limit)" >&2; exit 1'
    sbatch = shutil.which("sbatch")
    put_command(folder / "bin" / "sbatch", f'[ -z "$(squeue -h --me)" ] || {{ {refuse}; }}; exec {sbatch} "$@"')
    with monkeypatch.context() as environment:
        environment.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)
        slurm = Slurm(max_array_size=2)
        assert local.results(run(folder, SHARDS[:4], 0.3, slurm=slurm, parallel_jobs=4)) == EXPECTED[:12]
    (folder / "bin" / "sbatch").write_text(f"#!/bin/sh\n{refuse}\n")
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)
    with pytest.raises(UserError, match=r"(?s)job submit limit.*See cluster.slurm"):
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
    subprocess.run([*job, *command_of("support.slurm_stage", call)], check=True)
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


@pytest.mark.guarantee("scancel fails")
def test_jobs_that_were_not_cancelled_are_cancelled_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(profile="slurm")
    driver = start_driver(folder, seconds=60, parallel_jobs=2)
    wait_until(lambda: len(local.computed(folder)) >= 2)
    driver.kill()
    driver.wait()
    failures = folder / "failures"
    scancel = f"[ ! -e {failures} ] || {{ sed -i 1d {failures}; [ -s {failures} ] || rm {failures}; exit 1; }}"
    put_command(folder / "bin" / "scancel", f'{scancel}; exec {shutil.which("scancel")} "$@"')
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)
    failures.write_text("\n" * 1000)
    with monkeypatch.context() as impatient:
        impatient.setattr("cluster.backends.slurm._CANCEL_TIMEOUT", 1.0)
        with pytest.raises(JobsRemain, match=r"may still run.*\nSlurm has not ended jobs"):
            cancel_jobs(folder, cluster)
    assert queued("--states=RUNNING")
    failures.write_text("\n" * 3)
    assert cancel_jobs(folder, cluster) == 1
    assert queued() == []
    assert cancel_jobs(folder, cluster) == 0
