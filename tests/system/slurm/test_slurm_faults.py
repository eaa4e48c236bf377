"""Faults of tasks, nodes, drivers and the scheduler on a real Slurm do not change the parts."""

import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from cluster.fanout import ShardsFailed
from cluster.progress import Progress
from montessori_core.config import Slurm
from support import squares as local
from support import wait_until
from support.slurm_lab import call_lab, preempt, put_command, queued
from support.slurm_stage import ONE_A_NODE, once, run, start_driver
from support.squares import submissions

pytestmark = pytest.mark.guarantee("no sacct")

SHARDS, EXPECTED = local.SHARDS, local.EXPECTED

folder = local.folder


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


def break_squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> Path:
    """Make squeue fail `times` times; return a file with a line for each remaining failure."""
    failures = folder / "failures"
    squeue = f'if [ -s {failures} ]; then sed -i 1d {failures}; exit 1; fi; exec {shutil.which("squeue")} "$@"'
    put_command(folder / "bin" / "squeue", squeue)
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)
    failures.write_text("\n" * times)
    return failures


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
@pytest.mark.parametrize(
    "death", ["os._exit(9)", 'raise RuntimeError("CUDA error: uncorrectable ECC error encountered")']
)
def test_node_that_loses_shards_is_excluded(folder: Path, death: str) -> None:
    """A node whose jobs die at once would otherwise take all tasks of the queue."""
    broken = f'if os.environ["SLURMD_NODENAME"] == "node1": {death}'
    (folder / "squares_program.py").write_text(
        local.PROGRAM.replace("    folder = Path", f"    {broken}\n    folder = Path")
    )
    parts = run(folder, parallel_jobs=2, exclude_node_after=2, infrastructure_retries=10)
    assert local.results(parts) == EXPECTED
    places = [{local.stage(folder).node_of(job_id) for job_id in s.ids or []} for s in submissions(folder)]
    assert any("node1" in nodes for nodes in places)
    assert places[-1] == {"node2"}


@pytest.mark.guarantee("program does not open on one node")
@pytest.mark.slow
@pytest.mark.parametrize("broken", [("node1",), ("node1", "node2")])
def test_broken_node_takes_no_more_of_a_full_queue(folder: Path, broken: tuple[str, ...]) -> None:
    """All other nodes are busy, so each job of the queue would start on it."""
    opening = f"""if os.environ["SLURMD_NODENAME"] in {broken!r}:
        time.sleep(5)  # longer than the driver takes to see that a job has ended
        raise ImportError("libcudnn.so.9")
    if taken("""
    (folder / "squares_program.py").write_text(local.PROGRAM.replace("if taken(", opening, 1))
    command = ["sbatch", "--parsable", "--nodelist=node2", "--exclusive", "--output=/dev/null", "--wrap=sleep 600"]
    busy = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    wait_until(lambda: bool(queued(f"--jobs={busy}", "--states=RUNNING")), 60)
    opened, failures, waiting = folder / "opened.txt", folder / "stage" / "failures", []

    def free_node2(progress: Progress) -> None:
        if any(failures.iterdir()):
            waiting.append(queued("--states=PENDING", "--format=%i"))
        if len(waiting) == 30:  # polls, in 15 seconds
            subprocess.run(["scancel", busy], check=True)

    drive = partial(run, folder, slurm=ONE_A_NODE, parallel_jobs=6, on_progress=free_node2)
    if len(broken) == 1:
        assert local.results(drive()) == EXPECTED
    else:
        with pytest.raises(ShardsFailed, match="6 of 6 shards failed"):
            drive()
    assert len(waiting) >= 30  # the first failure did not end the stage
    nodes = [local.stage(folder).node_of(job_id) for s in submissions(folder) for job_id in s.ids or []]
    assert nodes.count("node1") <= 4  # the last may start before the driver sees the third fail
    if len(broken) == 2:
        assert len(opened.read_text().split()) <= 4


@pytest.mark.guarantee("program does not open on one node")
@pytest.mark.slow
def test_node_is_used_again_after_a_passing_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the jobs of the queue: the other node is busy for longer than the stage takes."""
    monkeypatch.setattr("cluster.nodes._PAUSE", 10.0)
    opening = """if taken(folder / "fault-1") or taken(folder / "fault-2"):
        time.sleep(5)  # longer than the driver takes to see that a job has ended
        raise ImportError("libcudnn.so.9")
    if taken("""
    (folder / "squares_program.py").write_text(local.PROGRAM.replace("if taken(", opening, 1))
    for number in (1, 2):
        (folder / f"fault-{number}").touch()
    command = ["sbatch", "--parsable", "--nodelist=node2", "--exclusive", "--output=/dev/null", "--wrap=sleep 600"]
    busy = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    wait_until(lambda: bool(queued(f"--jobs={busy}", "--states=RUNNING")), 60)
    excluded: list[str] = []

    def look(progress: Progress) -> None:
        excluded.extend(queued("--states=PENDING", "--format=%x"))

    assert local.results(run(folder, slurm=ONE_A_NODE, on_progress=look)) == EXPECTED
    assert "node1" in excluded
    assert queued(f"--jobs={busy}", "--states=RUNNING")


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


@pytest.mark.guarantee("task reaches its time limit")
@pytest.mark.slow
def test_task_that_cannot_be_requeued_is_resubmitted(folder: Path) -> None:
    """At its time limit there is no scontrol, as in a container without Slurm's commands."""
    put_command(folder / "bin" / "scontrol", "exit 1")
    signal_tasks = once(
        lambda: len(local.computed(folder)) >= 2, lambda: subprocess.run(["scancel", "--me", "--signal=USR2"])
    )
    without = Slurm(setup=[f"export PATH={folder / 'bin'}:$PATH"])
    parts = run(folder, SHARDS[:2], seconds=1, parallel_jobs=1, slurm=without, on_progress=signal_tasks)
    assert local.results(parts) == EXPECTED[:6]
    assert [set(s.lost.values()) for s in submissions(folder)] == [{"time_limit"}, set()]


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
