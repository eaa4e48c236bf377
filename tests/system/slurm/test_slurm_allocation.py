"""The profile `allocation` on a real Slurm: shards run as steps of the allocation around the driver."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from cluster.fanout import fan_out
from flows.cli.interrupt import interruptible  # noqa: F401 (for processes of these tests)
from montessori_core.config import Cluster, Resources
from montessori_core.files import read_json
from support import squares as local
from support import wait_until
from support.row_programs import as_shards
from support.slurm_lab import command_of, queued
from support.squares import submissions

GPUS_PROGRAM = local.PROGRAM.replace(
    "    def compute(rows, output, report):\n",
    """    def compute(rows, output, report):
        place = f"{os.environ['SLURMD_NODENAME']}-{os.environ['CUDA_VISIBLE_DEVICES']}"
        with (folder / "places.txt").open("a") as log:
            log.write(f"{place} {len(rows)} {os.environ['SLURM_JOB_ID']} {os.environ['OMP_NUM_THREADS']}\\\\n")
""".replace("\\\\n", "\\n"),
)

folder = local.folder


def drive(folder: Path, seconds: float, **resources: float) -> None:
    """Compute the stage of squares in the allocation around this process."""
    defaults: dict[str, float] = {"parallel_jobs": 4, "cpus_per_process": 2, "gpus_per_node": 1}
    cluster = Cluster(profile="allocation", poll_seconds=0.3)
    fan_out(local.stage(folder, seconds), as_shards(*local.SHARDS), Resources(**defaults | resources), cluster)


def start(folder: Path, seconds: float, *options: str, **resources: float) -> subprocess.Popen[str]:
    """Start a driver in an allocation of two nodes with two GPUs each."""
    command = command_of("test_slurm_allocation", f"t.drive(Path({str(folder)!r}), {seconds!r}, **{resources!r})")
    nodes = ["salloc", "--quiet", "--nodes=2", "--cpus-per-task=4", "--gpus-per-node=2", "--mem=2000", *options]
    return subprocess.Popen([*nodes, *command], stderr=subprocess.PIPE, text=True, start_new_session=True)


def results(folder: Path) -> list[int]:
    stage = local.stage(folder)
    return local.results([stage.part(index) for index in range(len(local.SHARDS))])


def test_shards_use_all_gpus_of_allocation(folder: Path) -> None:
    (folder / "squares_program.py").write_text(GPUS_PROGRAM)
    driver = start(folder, 0.7)
    _, errors = driver.communicate(timeout=300)
    assert driver.returncode == 0, errors
    assert results(folder) == local.EXPECTED
    assert sorted(local.computed(folder)) == local.NUMBERS
    places = [line.split() for line in (folder / "places.txt").read_text().splitlines()]
    # A step may use another GPU of its node later, but each of the four computes.
    assert {place for place, *_ in places} == {f"node{node}-{gpu}" for node in (1, 2) for gpu in (0, 1)}
    assert len({job for _, _, job, _ in places}) == 1  # nothing was queued
    assert {threads for *_, threads in places} == {"2"}
    stage = local.stage(folder)
    ids = [job_id for entry in submissions(folder) for job_id in entry.ids or []]
    assert len(ids) > 4  # shards were handed out when GPUs became free
    assert {stage.node_of(job_id.split(":")[0]) for job_id in ids} == {"node1", "node2"}
    wait_until(lambda: queued() == [], 60)


@pytest.mark.guarantee("program does not open on one node")
@pytest.mark.slow
def test_broken_node_uses_up_no_retries(folder: Path) -> None:
    """It fails fast, so it always has a free GPU."""
    broken = "    if os.environ['SLURMD_NODENAME'] == 'node1': raise ImportError('libcudnn.so.9')\n    if taken("
    (folder / "squares_program.py").write_text(local.PROGRAM.replace("    if taken(", broken, 1))
    driver = start(folder, 0.5, shards_per_job=1, infrastructure_retries=1)
    _, errors = driver.communicate(timeout=300)
    assert driver.returncode == 0, errors
    assert results(folder) == local.EXPECTED
    assert sorted(local.computed(folder)) == local.NUMBERS
    nodes = [local.stage(folder).node_of(job_id) for entry in submissions(folder) for job_id in entry.ids or []]
    assert 1 <= nodes.count("node1") <= 6  # two at a time, which count once, until the node is excluded after three


@pytest.mark.guarantee("allocation ends")
@pytest.mark.slow
def test_next_allocation_continues_after_the_end_of_one(folder: Path) -> None:
    driver = start(folder, 2.0, shards_per_job=1)
    stage = local.stage(folder)
    wait_until(lambda: any(stage.is_done(index) for index in range(len(local.SHARDS))), 300)
    subprocess.run(["scancel", "--me"], check=True)
    driver.wait(120)
    wait_until(lambda: not queued(), 120)
    kept = {index for index in range(len(local.SHARDS)) if stage.is_done(index)}
    assert 0 < len(kept) < len(local.SHARDS)
    driver = start(folder, 2.0)
    _, errors = driver.communicate(timeout=300)
    assert driver.returncode == 0, errors
    assert results(folder) == local.EXPECTED
    again = sorted(local.computed(folder))
    assert [again.count(row["n"]) for index in kept for row in local.SHARDS[index]] == [1] * 3 * len(kept)


@pytest.mark.guarantee("driver in an allocation killed")
@pytest.mark.slow
def test_next_driver_in_allocation_awaits_steps(folder: Path) -> None:
    """The driver of an allocation may be killed without its end: the steps continue."""
    job = subprocess.run(
        ["salloc", "--quiet", "--no-shell", "--nodes=2", "--cpus-per-task=4", "--gpus-per-node=2", "--mem=2000"],
        capture_output=True,
        text=True,
    )
    assert job.returncode == 0, job.stderr
    [job_id] = queued("--format=%i")
    command = command_of("test_slurm_allocation", f"t.drive(Path({str(folder)!r}), 2.0)")
    environment = os.environ | {"SLURM_JOB_ID": job_id}
    driver = subprocess.Popen(command, env=environment, start_new_session=True)
    wait_until(lambda: len(local.computed(folder)) >= 4, 120)
    driver.kill()
    driver.wait()
    submitted = read_json(folder / "stage" / "jobs" / "ledger.json")
    subprocess.run(command, env=environment, check=True, timeout=300)
    assert results(folder) == local.EXPECTED
    assert sorted(local.computed(folder)) == local.NUMBERS
    assert [entry["ids"] for entry in read_json(folder / "stage" / "jobs" / "ledger.json")[: len(submitted)]] == [
        entry["ids"] for entry in submitted
    ]


@pytest.mark.slow
def test_interrupted_driver_ends_steps(folder: Path) -> None:
    driver = start(folder, 2.0)
    wait_until(lambda: len(local.computed(folder)) >= 4, 300)
    os.killpg(driver.pid, signal.SIGINT)
    driver.wait(120)
    rows = len(local.computed(folder))
    assert local.jobs_alive(folder / "stage") == 0
    assert rows < len(local.NUMBERS)
    assert all(entry.closed for entry in submissions(folder))


@pytest.mark.slow
def test_second_interrupt_ends_steps(folder: Path) -> None:
    """The allocation continues, as that of a shell; the driver does not wait for its steps to end."""
    job = subprocess.run(
        ["salloc", "--quiet", "--no-shell", "--nodes=2", "--cpus-per-task=4", "--gpus-per-node=2", "--mem=2000"],
        capture_output=True,
        text=True,
    )
    assert job.returncode == 0, job.stderr
    [job_id] = queued("--format=%i")
    place = f"Path({str(folder)!r})"
    call = f"t.interruptible(lambda: t.drive({place}, 60.0), {place}, t.Cluster(), '')"
    driver = subprocess.Popen(
        command_of("test_slurm_allocation", call),
        env=os.environ | {"SLURM_JOB_ID": job_id},
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: len(local.computed(folder)) >= 4, 240)
    driver.send_signal(signal.SIGINT)
    assert driver.stdout is not None
    wait_until(lambda: "interrupted: cancelling" in driver.stdout.readline(), 60)
    driver.send_signal(signal.SIGINT)
    driver.communicate(timeout=120)
    assert driver.returncode == 130
    wait_until(lambda: local.jobs_alive(folder / "stage") == 0, 60)
    assert queued("--states=RUNNING", "--format=%i") == [job_id]


def test_job_larger_than_allocation_is_refused(folder: Path) -> None:
    driver = start(folder, 0.0, gpus_per_node=3)
    _, errors = driver.communicate(timeout=300)
    assert driver.returncode == 1
    assert "a job needs 1 node(s) with 3 GPUs" in errors
    assert "lower cluster.resources, or ask for a larger allocation" in errors
