"""Held jobs on a real Slurm: jobs of several stages start in jobs that were queued once."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from cluster.backends.held import HeldBackend
from cluster.fanout import fan_out
from cluster.lock import driver_of, only_driver
from cluster.stage import Stage
from flows.cli.interrupt import interruptible  # noqa: F401 (for processes of these tests)
from flows.experiment import end_jobs_in
from montessori_core import layout
from montessori_core.config import Cluster, HeldJobs, Resources, Slurm
from montessori_core.errors import UserError
from support import squares as local
from support import wait_until
from support.row_programs import as_shards
from support.slurm_lab import call_lab, command_of, preempt, put_command, queued
from support.slurm_stage import ONE_A_NODE

PLACES_PROGRAM = local.PROGRAM.replace(
    "    def compute(rows, output, report):\n",
    """    def compute(rows, output, report):
        with (folder / "places.txt").open("a") as log:
            print(os.environ["SLURM_JOB_ID"], os.environ["CUDA_VISIBLE_DEVICES"], file=log)
""",
)

folder = local.folder


def stages(folder: Path, seconds: float) -> list[Stage]:
    """Return two stages with equal rows."""
    settings = {"folder": str(folder), "seconds": seconds}
    entry = "support.squares_program:open_squares"
    return [Stage(name, 1, entry, settings, {}, {}, folder / name, ".json") for name in ("first", "second")]


def drive(folder: Path, seconds: float, idle_minutes: float = 10, slurm: Slurm = Slurm(), **options: float) -> None:  # noqa: B008
    """Compute two stages in held jobs, with two jobs at a time."""
    held = slurm.model_copy(update={"hold": HeldJobs(idle_minutes=idle_minutes)})
    cluster = Cluster(profile="slurm", poll_seconds=0.3, slurm=held)
    resources = Resources(parallel_jobs=2, cpus_per_process=2, gpus_per_node=1, time_limit_minutes=30, **options)
    with only_driver(folder):
        for stage in stages(folder, seconds):
            fan_out(stage, as_shards(*local.SHARDS), resources, cluster)


def start(folder: Path, seconds: float, idle_minutes: float = 10) -> subprocess.Popen[bytes]:
    """Start a driver."""
    command = command_of("test_slurm_held", f"t.drive(Path({str(folder)!r}), {seconds!r}, {idle_minutes!r})")
    return subprocess.Popen(command, start_new_session=True)


def places(folder: Path) -> list[set[str | None]]:
    """Return the nodes of the first stage's jobs, a set for each submission."""
    stage = stages(folder, 0)[0]
    submissions = local.submissions(folder, "first")
    return [{stage.node_of(job_id.split(":")[0]) for job_id in s.ids or []} for s in submissions]


def results(folder: Path) -> list[list[int]]:
    return [local.results([stage.part(index) for index in range(len(local.SHARDS))]) for stage in stages(folder, 0)]


@pytest.mark.slow
def test_held_jobs_serve_all_stages(folder: Path) -> None:
    (folder / "squares_program.py").write_text(PLACES_PROGRAM)
    drive(folder, 0.1)
    assert results(folder) == [local.EXPECTED] * 2
    assert sorted(local.computed(folder)) == sorted(local.NUMBERS * 2)
    places = [line.split() for line in (folder / "places.txt").read_text().splitlines()]
    assert len({job for job, _ in places}) == 2  # of 12 shards in two stages
    assert all(gpu.isdecimal() for _, gpu in places)
    wait_until(lambda: queued() == [], 60)  # the driver ends them


@pytest.mark.slow
def test_ending_steps_hold_no_other_jobs(folder: Path) -> None:
    """A process of srun may outlive its step for a while."""
    driver = start(folder, 0.7)
    wait_until(lambda: len(local.computed(folder)) >= 4, 120)
    outliving = [
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", f"--jobid={job}"])
        for job in queued("--states=RUNNING", "--format=%A")
    ]
    assert len(outliving) == 2
    time.sleep(5)
    held = queued("--format=%A")
    for process in outliving:
        process.kill()
        process.wait()
    assert len(held) == 2
    assert driver.wait(300) == 0
    assert results(folder) == [local.EXPECTED] * 2


def test_refused_held_jobs_are_an_error(folder: Path) -> None:
    with pytest.raises(UserError, match=r"sbatch rejected the jobs to hold: .*partition"):
        drive(folder, 0.0, slurm=Slurm(partition="absent"))


def test_held_jobs_beyond_partition_limit_are_refused(folder: Path) -> None:
    """Slurm accepts them, and never starts them."""
    with pytest.raises(UserError, match=r"partition's time limit.*hold\.minutes \(240\)"):
        drive(folder, 0.0, slurm=Slurm(partition="brief"))
    wait_until(lambda: queued() == [], 60)


def test_held_jobs_that_are_too_long_are_replaced_by_the_next_driver(folder: Path) -> None:
    """Those of a killed driver have the same name, but were submitted with other settings."""
    resources = Resources(parallel_jobs=2, cpus_per_process=2, gpus_per_node=1, time_limit_minutes=1)
    held, lasting = (Slurm(partition="brief", hold=HeldJobs(minutes=minutes)) for minutes in (1, 240))
    assert lasting.hold is not None
    assert HeldBackend(lasting, lasting.hold, resources, None, folder).plan_jobs([0, 1], 2, frozenset()) == []
    wait_until(lambda: queued("--format=%r") == ["PartitionTimeLimit"] * 2, 60)
    with only_driver(folder):
        stage = stages(folder, 0.0)[0]
        fan_out(stage, as_shards(*local.SHARDS), resources, Cluster(profile="slurm", poll_seconds=0.3, slurm=held))
    assert local.results([stage.part(index) for index in range(len(local.SHARDS))]) == local.EXPECTED
    wait_until(lambda: queued() == [], 60)


@pytest.mark.guarantee("jobs on one node die at start-up")
@pytest.mark.slow
def test_held_job_on_excluded_node_gets_no_shards(folder: Path) -> None:
    """A held job on it, which replaces a lost one, may start before the node is excluded."""
    broken = 'if os.environ["SLURMD_NODENAME"] == "node1": raise RuntimeError("No CUDA GPUs are available")'
    (folder / "squares_program.py").write_text(
        local.PROGRAM.replace("    folder = Path", f"    {broken}\n    folder = Path")
    )
    drive(folder, 1.0, slurm=ONE_A_NODE, exclude_node_after=2, infrastructure_retries=10)
    assert results(folder) == [local.EXPECTED] * 2
    assert sum("node1" in nodes for nodes in places(folder)) == 2


@pytest.mark.slow
def test_excluded_nodes_are_used_as_last_resort(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.backends.held._REFUSAL_PAUSE", 1.0)
    broken = 'if taken(folder / os.environ["SLURMD_NODENAME"]): raise RuntimeError("No CUDA GPUs are available")'
    (folder / "squares_program.py").write_text(
        local.PROGRAM.replace("    with (folder", f"    {broken}\n    with (folder", 1)
    )
    for node in ("node1", "node2"):
        (folder / node).touch()
    drive(folder, 0.0, slurm=ONE_A_NODE, exclude_node_after=1)
    assert results(folder) == [local.EXPECTED] * 2
    assert not (folder / "node1").exists()
    assert not (folder / "node2").exists()


@pytest.mark.guarantee("node hangs")
@pytest.mark.slow
def test_copy_of_a_straggler_starts_on_another_node(folder: Path) -> None:
    """Not in a free held job on the node that hangs."""
    (folder / "hang-0").touch()
    drive(folder, 0.2, duplicate_stragglers_after=4)
    assert results(folder) == [local.EXPECTED] * 2
    assert places(folder)[0] == {"node1"}
    assert places(folder)[-1] == {"node2"}


@pytest.mark.slow
def test_stage_waits_for_jobs_that_exhaust_limits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch refuses the first jobs to hold, as a site does whose users may submit only so many jobs."""
    real, refused = shutil.which("sbatch"), folder / "refused"
    refusal = "Batch job submission failed: Job violates accounting/QOS policy (job submit limit)"
    line = f'[ -e {refused} ] && exec {real} "$@"; touch {refused}; echo "sbatch: error: {refusal}" >&2; exit 1'
    put_command(folder / "bin" / "sbatch", line)
    other = ["sbatch", "--ntasks=1", "--mem=100", "--output=/dev/null", "--wrap=sleep 600"]
    subprocess.run(other, check=True, capture_output=True)
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)
    monkeypatch.setattr("cluster.backends.held._REFUSAL_PAUSE", 1.0)
    drive(folder, 0.0)
    assert refused.exists()
    assert results(folder) == [local.EXPECTED] * 2


@pytest.mark.guarantee("held job lost")
def test_lost_held_job_is_replaced(folder: Path) -> None:
    driver = start(folder, 0.7)
    wait_until(lambda: len(local.computed(folder)) >= 4, 120)
    running = queued("--states=RUNNING", "--format=%A")
    assert len(running) == 2
    subprocess.run(["scancel", running[0]], check=True)
    assert driver.wait(300) == 0
    assert results(folder) == [local.EXPECTED] * 2
    wait_until(lambda: queued() == [], 60)


@pytest.mark.guarantee("held job lost")
@pytest.mark.parametrize("kind", ["preempted", pytest.param("node_failure", marks=pytest.mark.slow)])
def test_steps_have_the_loss_class_of_their_held_job(folder: Path, kind: str) -> None:
    driver = start(folder, 0.4)
    wait_until(lambda: len(local.computed(folder)) >= 4, 120)
    preempt() if kind == "preempted" else call_lab("kill-node", "1")
    assert driver.wait(300) == 0
    if kind == "node_failure":
        call_lab("start-node", "1")
    assert results(folder) == [local.EXPECTED] * 2
    submissions = [s for name in ("first", "second") for s in local.submissions(folder, name)]
    assert [lost for submission in submissions for lost in submission.lost.values()] == [kind] * 2


@pytest.mark.slow
def test_steps_of_an_earlier_driver_have_the_loss_class_of_their_held_job(folder: Path) -> None:
    first = start(folder, 2.0)
    wait_until(lambda: len(local.computed(folder)) >= 2, 120)
    first.kill()
    first.wait()
    driver = start(folder, 2.0)
    wait_until(lambda: (holder := driver_of(folder)) is not None and holder.process == driver.pid, 60)
    time.sleep(4)  # until the driver has taken over the steps
    preempt()
    assert driver.wait(300) == 0
    assert results(folder) == [local.EXPECTED] * 2
    earlier = local.submissions(folder, "first")[0]
    assert set(earlier.lost) == set(earlier.ids or [])
    assert set(earlier.lost.values()) == {"preempted"}


@pytest.mark.slow
def test_lost_step_costs_only_its_held_job(folder: Path) -> None:
    """To Slurm, the id of one job of an array is that of the array."""
    driver = start(folder, 0.7)
    wait_until(lambda: len(local.computed(folder)) >= 4, 120)
    ids = [line.split("|") for line in queued("--states=RUNNING", "--format=%A|%F")]
    [hit] = [job for job, array in ids if job == array]
    [sibling] = [job for job, array in ids if job != array]
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or [""]
        if Path(command[0]).name == "srun" and f"--jobid={hit}" in command:
            process.kill()
    wait_until(lambda: hit not in queued("--format=%A"), 60)
    assert sibling in queued("--states=RUNNING", "--format=%A")
    assert driver.wait(300) == 0
    assert results(folder) == [local.EXPECTED] * 2


@pytest.mark.guarantee("driver that holds jobs killed")
@pytest.mark.slow
def test_next_driver_uses_held_jobs(folder: Path) -> None:
    driver = start(folder, 0.7)
    wait_until(lambda: len(local.computed(folder)) >= 4, 120)
    logs = {path.name for path in (folder / layout.HELD).glob("*.log")}
    driver.kill()
    driver.wait()
    drive(folder, 0.7)
    assert results(folder) == [local.EXPECTED] * 2
    assert sorted(local.computed(folder)) == sorted(local.NUMBERS * 2)  # steps of the first driver were awaited
    assert {path.name for path in (folder / layout.HELD).glob("*.log")} == logs  # no other was submitted


def kill_sruns() -> None:
    """Kill the srun processes of this file's cluster; tests of another file may use another one."""
    killed = []
    for process in psutil.process_iter(["name"]):
        if process.info["name"] == "srun":
            with suppress(psutil.Error):  # it has just ended, or is of another user
                if process.environ().get("SLURM_CONF") == os.environ["SLURM_CONF"]:
                    process.kill()
                    killed.append(process.pid)
    assert killed


@pytest.mark.guarantee("host of a driver that holds jobs crashes")
@pytest.mark.slow
def test_driver_on_another_host_reuses_held_jobs(folder: Path) -> None:
    (folder / "hang-0").touch()  # its step would run for ten minutes
    driver = start(folder, 0.7)
    wait_until(lambda: len(local.computed(folder)) >= 4, 120)
    logs = {path.name for path in (folder / layout.HELD).glob("*.log")}
    driver.kill()
    driver.wait()
    kill_sruns()  # the crash leaves steps without srun
    drive(folder, 0.7, infrastructure_retries=0)
    assert results(folder) == [local.EXPECTED] * 2
    assert {path.name for path in (folder / layout.HELD).glob("*.log")} == logs


@pytest.mark.guarantee("driver that holds jobs interrupted")
@pytest.mark.slow
def test_held_jobs_end_with_an_interrupted_driver(folder: Path) -> None:
    driver = start(folder, 2.0)
    wait_until(lambda: len(local.computed(folder)) >= 2, 120)
    os.killpg(driver.pid, signal.SIGINT)
    driver.wait(120)
    wait_until(lambda: queued() == [], 60)


@pytest.mark.slow
def test_held_jobs_end_with_a_cancelled_flow_run(folder: Path) -> None:
    """Prefect kills a flow run that does not end in time, and calls the hook in another process."""
    driver = start(folder, 2.0)
    wait_until(lambda: len(local.computed(folder)) >= 2, 120)
    driver.kill()
    driver.wait()
    assert len(queued("--format=%A")) == 2
    end_jobs_in(folder, Cluster(profile="slurm"), SimpleNamespace(parameters={}))
    wait_until(lambda: queued() == [], 30)


@pytest.mark.slow
def test_held_jobs_end_with_a_driver_that_exits_at_once(folder: Path) -> None:
    """After a second Ctrl-C."""
    place = f"Path({str(folder)!r})"
    call = f"t.interruptible(lambda: t.drive({place}, 60.0), {place}, t.Cluster(), '')"
    driver = subprocess.Popen(
        command_of("test_slurm_held", call), start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    wait_until(lambda: len(local.computed(folder)) >= 2, 240)
    driver.send_signal(signal.SIGINT)
    assert driver.stdout is not None
    wait_until(lambda: "interrupted: cancelling" in driver.stdout.readline(), 60)
    driver.send_signal(signal.SIGINT)
    driver.communicate(timeout=120)
    assert driver.returncode == 130
    wait_until(lambda: queued() == [], 60)


@pytest.mark.guarantee("driver that holds jobs killed")
@pytest.mark.slow
def test_idle_held_jobs_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs that a killed driver held end by themselves, but not while a step runs; nor if the user's squeue hides it."""
    with monkeypatch.context() as environment:
        environment.setenv("SQUEUE_USERS", "nobody")
        driver = start(folder, 4.0, idle_minutes=0.1)
    wait_until(lambda: len(local.computed(folder)) >= 2, 120)
    driver.kill()
    driver.wait()
    stage = stages(folder, 0)[0]
    wait_until(lambda: stage.is_done(0) and stage.is_done(1), 120)  # longer than a job may be idle
    wait_until(lambda: queued() == [], 180)
