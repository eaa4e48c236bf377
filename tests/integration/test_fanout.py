"""The fan-out with local processes: faults of jobs and drivers do not change the parts."""

import errno
import itertools
import json
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import submitit
from hypothesis import given
from hypothesis import strategies as st

from cluster.backends.local import LocalBackend
from cluster.fanout import ShardsFailed, fan_out
from cluster.ledger import Ledger, Submission, close_submissions
from cluster.lock import only_driver
from cluster.processes import seconds_since, start_time
from cluster.progress import Progress
from cluster.retry import allowed_retries, classify_loss
from cluster.stage import RowClock, Stage
from cluster.status import logs_of, read_stage_status
from cluster.usage import cost_of, use_of
from cluster.worker import _compute_shards, classify_error
from montessori_core.config import Cluster, Resources
from montessori_core.errors import UserError
from montessori_core.files import commit, hash_json, hash_path, read_json, write_json
from montessori_core.models import flops
from montessori_core.program import Row
from support import squares, wait_until
from support.row_programs import as_shards
from support.slurm_lab import become_login_node
from support.squares import (
    CLUSTER,
    EXPECTED,
    NUMBERS,
    PROGRAM,
    SHARDS,
    computed,
    jobs_alive,
    key_of,
    results,
    run,
    stage,
    start_driver,
    submissions,
)

folder = squares.forking_folder


def write_opening(folder: Path, line: str) -> None:
    """Write the program of squares with a line more before it opens."""
    first = '    if (folder / "does-not-open")'
    (folder / "squares_program.py").write_text(PROGRAM.replace(first, f"    {line}\n{first}"))


def test_one_job_computes_all_shards_in_order(folder: Path) -> None:
    assert results(run(folder, jobs=1)) == EXPECTED
    assert len((folder / "opened.txt").read_text().split()) == 1  # one resident worker computed all shards


def test_finished_shards_are_not_recomputed(folder: Path) -> None:
    run(folder)
    before = computed(folder)
    assert results(run(folder, jobs=1)) == EXPECTED
    assert computed(folder) == before


@pytest.mark.guarantee("job killed in the middle of a shard")
@pytest.mark.parametrize(
    "python",
    [
        pytest.param(None, id="forked jobs"),
        pytest.param(sys.executable, id="new interpreters", marks=pytest.mark.slow),
    ],
)
def test_killed_worker_costs_only_its_shard(folder: Path, python: str | None) -> None:
    (folder / "kill-31").touch()
    assert results(run(folder, python=python)) == EXPECTED
    assert sorted(computed(folder)) == sorted([*NUMBERS, 30, 31])


def test_stage_usage_is_sum_of_jobs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "kill-31").touch()
    run(folder, jobs=1)
    use = use_of(folder / "stage")
    assert (use.shards, use.rows, use.jobs, use.retries, use.interruptions, use.gpus) == (6, 18, 2, 1, 0, 0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")  # Slurm sets it for a requeued job
    run(folder, [*SHARDS, [{"n": 60}]], jobs=1)
    use = use_of(folder / "stage")
    assert (use.shards, use.rows, use.jobs, use.retries, use.interruptions, use.gpus) == (7, 19, 3, 1, 2, 0)


@pytest.mark.slow
def test_stage_cost_is_read_from_manifests(folder: Path) -> None:
    kind = replace(stage(folder, seconds=0.2), kind="influence")
    fan_out(kind, as_shards(*SHARDS), Resources(cpus_per_process=1), CLUSTER, python=sys.executable)
    cost = cost_of(kind.folder)
    assert cost is not None
    assert (cost.kind, cost.rows, cost.shard_rows) == ("influence", 18, 3)
    assert cost.seconds_per_row >= 0.2  # a row sleeps 0.2 s
    assert 0.2 < cost.opening < 60  # interpreter and imports; the program itself opens at once
    assert cost.begun < cost.ended
    kind.manifest(3).unlink()
    assert cost_of(kind.folder) is None


@pytest.mark.slow
def test_single_shard_stage_reports_time_left(folder: Path) -> None:
    rows: list[Row] = [{"n": n} for n in range(12)]
    left: list[float] = []

    def look(progress: Progress) -> None:
        state = read_stage_status(folder / "stage", CLUSTER)
        for seen in (progress, state):
            if seen.rows_done < 1:
                assert seen.seconds_left is None
            elif 4 <= seen.rows_done < 12:
                assert seen.seconds_left is not None
                left.append(seen.seconds_left / (12 - seen.rows_done))

    fan_out(stage(folder, 0.3), as_shards(rows), Resources(cpus_per_process=1), CLUSTER, look)
    assert left
    assert all(0.3 <= seconds < 3 for seconds in left)


@pytest.mark.guarantee("error in the code")
def test_code_error_fails_only_its_shard(folder: Path) -> None:
    (folder / "fail-21").touch()
    with pytest.raises(ShardsFailed) as failure:
        run(folder, jobs=1)
    assert [(f.shard, f.kind, f.error) for f in failure.value.failures] == [
        (2, "code_error", "ValueError: row 21 is bad")
    ]
    assert "row 21 is bad" in Path(failure.value.failures[0].log).read_text()
    assert computed(folder).count(21) == 1
    assert sum(stage(folder).manifest(index).exists() for index in range(6)) == 5
    (folder / "fail-21").unlink()
    assert results(run(folder)) == EXPECTED
    assert computed(folder).count(20) == 2
    assert computed(folder).count(10) == 1


def test_program_that_fails_to_open_fails_once(folder: Path) -> None:
    (folder / "does-not-open").touch()
    with pytest.raises(ShardsFailed, match="the model does not load") as failure:
        run(folder, jobs=1)
    assert len(failure.value.failures) == 6
    assert len((folder / "opened.txt").read_text().split()) == 1


def test_program_that_fails_to_load_late_fails_once(folder: Path) -> None:
    """vLLM loads at the first requests."""
    (folder / "opens-late").touch()
    with pytest.raises(ShardsFailed, match="the engine does not load") as failure:
        run(folder, jobs=1)
    assert len(failure.value.failures) == 6
    assert len(computed(folder)) == 1


@pytest.mark.guarantee("program does not open")
def test_program_that_does_not_load_for_one_shard_fails_it_alone(folder: Path) -> None:
    """For example, vLLM has no room for its longest prompt; its job has other shards, too."""
    waits = "\n                while not any((folder / 'stage').glob('part-*.manifest.json')): time.sleep(0.01)"
    opens_late = 'if (folder / "opens-late").exists():'
    (folder / "squares_program.py").write_text(PROGRAM.replace(opens_late, f'if row["n"] == 10:{waits}'))
    with pytest.raises(ShardsFailed, match="the engine does not load; 2 times") as failure:
        run(folder, infrastructure_retries=1)
    assert [(failed.shard, failed.kind) for failed in failure.value.failures] == [(1, "code_error")]
    assert sorted({*computed(folder)}) == sorted({*NUMBERS} - {11, 12})


@pytest.mark.guarantee("program does not open on one node")
@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("if taken(", "ImportError('libcudnn.so.9')"),
        ("if taken(", "OutOfMemoryError('CUDA out of memory')"),
        ("for number", "NotOpened('vLLM did not load the model')"),
    ],
)
def test_failed_opening_ends_no_stage_that_opened(folder: Path, place: str, error: str) -> None:
    """A job of a node without some library, or whose GPU is smaller or in use, while others compute."""
    wait = "while not any((folder / 'stage').glob('part-*.manifest.json')): time.sleep(0.01)"
    lines = ["if taken(folder / 'broken'):", f"    {wait}", f"    raise {error}", place]
    indented = "\n".ljust(1 + PROGRAM.partition(place)[0][::-1].index("\n"))
    (folder / "squares_program.py").write_text(PROGRAM.replace(place, indented.join(lines), 1))
    (folder / "broken").touch()
    assert results(run(folder)) == EXPECTED
    assert sorted(computed(folder)) == NUMBERS


@pytest.mark.guarantee("program does not open")
@pytest.mark.parametrize(
    ("opens_first", "error", "starts"),
    [
        (False, "RuntimeError('No CUDA GPUs are available')", 2),
        (False, "MemoryError()", 2),
        (True, "ImportError('No module named transformers')", 3),
    ],
)
def test_program_that_opens_no_more_ends_the_stage(folder: Path, opens_first: bool, error: str, starts: int) -> None:
    """For example, an environment is removed while the first job runs: no shard uses up retries of its own."""
    write_opening(folder, f"if not taken(folder / 'environment'): raise {error}")
    if opens_first:
        (folder / "environment").touch()
        (folder / "kill-10").touch()
    with pytest.raises(ShardsFailed) as failure:
        run(folder, jobs=1, infrastructure_retries=1)
    assert [failed.shard for failed in failure.value.failures] == list(range(int(opens_first), 6))
    assert len((folder / "opened.txt").read_text().split()) == starts


@pytest.mark.guarantee("program does not open")
def test_program_whose_jobs_die_at_start_ends_the_stage(folder: Path) -> None:
    """Without an error of their own, for example because a library was built for another processor."""
    write_opening(folder, "os.kill(os.getpid(), signal.SIGILL)")
    with pytest.raises(ShardsFailed, match="6 of 6 shards failed"):
        run(folder, jobs=1, infrastructure_retries=0)
    assert len((folder / "opened.txt").read_text().split()) == 2  # the cause might be in one shard


@pytest.mark.guarantee("program does not open")
def test_jobs_that_have_opened_the_program_finish(folder: Path) -> None:
    lines = [
        "if not taken(folder / 'environment'):",
        "    while not any((folder / 'stage').glob('part-*.manifest.json')): time.sleep(0.01)",
        "    raise ImportError('libcudnn.so.9')",
    ]
    write_opening(folder, "\n    ".join(lines))
    (folder / "environment").touch()
    with pytest.raises(ShardsFailed) as failure:
        run(folder, jobs=2, seconds=0.7, infrastructure_retries=0)
    assert len(failure.value.failures) == 3
    assert len(computed(folder)) == 9  # all shards of the other job
    assert len((folder / "opened.txt").read_text().split()) == 3


def test_loss_is_counted_after_a_file_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which comes after the driver has seen that the job is gone."""
    (folder / "fail-0").touch()
    save, failures = Ledger.save, [OSError(errno.ESTALE, "Stale file handle")]

    def save_late(ledger: Ledger) -> None:
        if failures and ledger.submissions[0].closed:
            raise failures.pop()
        save(ledger)

    monkeypatch.setattr(Ledger, "save", save_late)
    with pytest.raises(ShardsFailed, match="row 0 is bad"):
        run(folder, SHARDS[:1])
    assert failures == []
    assert computed(folder) == [0]


@pytest.mark.guarantee("memory of a GPU runs out")
def test_full_gpu_fails_only_its_shard(folder: Path) -> None:
    """A second attempt would need as much."""
    (folder / "gpu-21").touch()
    made = replace(stage(folder), kind="evaluation")
    with pytest.raises(ShardsFailed) as failure:
        fan_out(made, as_shards(*SHARDS), Resources(parallel_jobs=1, cpus_per_process=1), CLUSTER)
    [failed] = failure.value.failures
    assert (failed.shard, failed.kind) == (2, "gpu_out_of_memory")
    assert "2.00 GiB.; needs less memory: --set benchmarks.batch_size=1" in failed.error
    assert computed(folder).count(21) == 1
    [recorded] = read_stage_status(folder / "stage", CLUSTER).failures  # for later status calls
    assert (recorded.kind, recorded.error) == (failed.kind, failed.error)


def test_memory_error_at_opening_is_retried(folder: Path) -> None:
    (folder / "no-memory").touch()
    assert results(run(folder)) == EXPECTED
    assert sorted(computed(folder)) == NUMBERS


def test_shard_committed_during_takeover_is_not_recomputed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = stage(folder)
    made.write(as_shards(*SHARDS))
    ledger = Ledger(made.folder / "jobs")
    ledger.submissions = [Submission("never-noted", "w", [[1]], platform.node(), 0)]
    ledger.save()
    assert read_stage_status(made.folder, CLUSTER).queued == 1  # of a pending submission

    def commit_meanwhile(ledger: Ledger, cluster: Cluster, submissions: Sequence[Submission] | None = None) -> int:
        if submissions and not made.is_done(0):
            with made.commit_part(0, key_of(made, SHARDS[0]), len(SHARDS[0]), "7:0") as part:
                part.write_text(json.dumps([row["n"] ** 2 for row in SHARDS[0]]))
        return close_submissions(ledger, cluster, submissions)

    monkeypatch.setattr("cluster.fanout.close_submissions", commit_meanwhile)
    assert results(run(folder)) == EXPECTED
    assert not set(computed(folder)) & {row["n"] for row in SHARDS[0]}


def test_status_counts_jobs_of_a_remote_driver(folder: Path) -> None:
    """Nobody here can ask whether its processes run."""
    made = stage(folder)
    made.write(as_shards(*SHARDS))
    ledger = Ledger(made.folder / "jobs")
    tasks, ids = [[0, 1], [2], [3]], ["17:1", "18:1", "19:1"]
    ledger.submissions = [Submission("elsewhere", "w", tasks, "another-host", 3, ids=ids, missed={"19:1": 3})]
    ledger.save()
    assert read_stage_status(made.folder, CLUSTER).state == "incomplete"
    with only_driver(folder):
        status = read_stage_status(made.folder, CLUSTER)
    assert (status.state, status.running, status.queued) == ("running", 2, 1)


def test_lost_shard_fails_after_retry_budget(folder: Path) -> None:
    shards = [[{"n": 7}]]
    (folder / "kill-7").mkdir()  # a folder cannot be unlinked: the worker fails with IsADirectoryError
    with pytest.raises(ShardsFailed):
        run(folder, shards)
    (folder / "kill-7").rmdir()
    program = folder / "squares_program.py"
    program.write_text(
        program.read_text().replace("taken(folder / f\"kill-{row['n']}\")", "(folder / 'kill-7').exists()")
    )
    (folder / "kill-7").touch()
    with pytest.raises(ShardsFailed, match=r"lost.*2 times"):
        run(folder, shards, infrastructure_retries=1)
    [failed] = read_stage_status(folder / "stage", CLUSTER).failures  # for later status calls
    assert (failed.shard, failed.kind) == (0, "lost")
    assert "2 times" in failed.error


def test_lost_peer_is_retried_within_budget(folder: Path) -> None:
    (folder / "peer-21").touch()
    assert results(run(folder)) == EXPECTED
    assert computed(folder).count(21) == 2
    (folder / "peer-7").touch()
    with pytest.raises(ShardsFailed, match=r"lost.*Connection closed by peer.*1 times"):
        run(folder, [[{"n": 7}]], infrastructure_retries=0)


def test_last_error_of_a_shard_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that Slurm requeues keeps its id."""
    monkeypatch.setenv("SLURMD_NODENAME", "node3")
    for name, value in {"EXECUTOR": "local", "LOCAL_JOB_ID": "1", "LOCAL_GLOBALRANK": "0"}.items():
        monkeypatch.setenv(f"SUBMITIT_{name}", value)
    environment = submitit.JobEnvironment()
    own = stage(folder)
    own.write(as_shards([{"n": 5}]))
    (own.folder / "jobs").mkdir()
    for attempt, fault, kind in (("0", "peer-5", "lost"), ("1", "fail-5", "code_error"), ("1", "full-5", "code_error")):
        (folder / fault).touch()
        monkeypatch.setenv("SLURM_RESTART_COUNT", attempt)
        with pytest.raises((RuntimeError, ValueError, OSError)):
            _compute_shards(own, [0], 0, environment)
        failure = read_json(own.failure_file(0))
        assert failure["class"] == kind  # the first error of an attempt
        assert failure["node"] == "node3"  # whose process failed


def test_job_without_visible_gpu_is_lost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its node has a broken driver. With torch's build for CPUs, which has no GPU to lose, jobs compute."""
    import torch

    for name, value in {"EXECUTOR": "local", "LOCAL_JOB_ID": "1", "LOCAL_GLOBALRANK": "0"}.items():
        monkeypatch.setenv(f"SUBMITIT_{name}", value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    own = stage(folder)
    own.write(as_shards([{"n": 5}]))
    (own.folder / "jobs").mkdir()
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    with pytest.raises(RuntimeError, match="asked for 2"):
        _compute_shards(own, [0], 2, submitit.JobEnvironment())
    failure = read_json(own.failure_file(0))
    assert (failure["class"], failure["opening"]) == ("lost", True)
    _compute_shards(own, [0], 0, submitit.JobEnvironment())
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    own.write(as_shards([{"n": 6}]))
    _compute_shards(own, [0], 2, submitit.JobEnvironment())
    assert computed(folder) == [5, 6]


def test_full_disk_of_torch_is_recognised() -> None:
    """torch.save has no error of its own for it; transformers' checkpoints are written with it."""
    import torch

    with pytest.raises(RuntimeError) as failure:
        torch.save(torch.zeros(100_000), "/dev/full")
    assert classify_error(failure.value) == "disk_full"


@pytest.mark.guarantee("disk full")
def test_full_disk_is_named(folder: Path) -> None:
    (folder / "full-0").touch()
    with pytest.raises(ShardsFailed, match=r"shard 0 \(disk_full\)"):
        run(folder)
    (folder / "full-0").unlink()
    assert results(run(folder)) == EXPECTED
    assert len(computed(folder)) == len(EXPECTED) + 1


@pytest.mark.guarantee("disk full")
def test_shards_resume_after_disk_full(folder: Path) -> None:
    program = folder / "squares_program.py"
    program.write_text(PROGRAM.replace("for row in rows]))", "for row in rows]) + ' ' * 400_000)"))
    (folder / "stage").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    if subprocess.run([*mount, "size=1m", "tmpfs", str(folder / "stage")], check=False).returncode:
        pytest.skip("this machine lets nobody mount a small file system")
    try:
        with pytest.raises(ShardsFailed, match="disk_full"):
            run(folder, jobs=1)
        before = len(computed(folder))
        subprocess.run([*mount, "remount,size=64m", "tmpfs", str(folder / "stage")], check=True)
        assert results(run(folder)) == EXPECTED
        assert len(computed(folder)) < before + len(EXPECTED)  # finished shards are kept
    finally:
        subprocess.run(["umount", "--lazy", str(folder / "stage")], check=True)


@pytest.mark.guarantee("disk full")
def test_full_disk_of_a_node_is_a_loss(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other jobs filled its temporary folder; another node, or the same one later, computes the shard."""
    temporary = folder / "tmp"
    temporary.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(temporary)]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("this machine lets nobody mount a small file system")
    fill = "if taken(folder / f\"spill-{row['n']}\"): Path(os.environ['TMPDIR'], 'cache').write_bytes(bytes(2**21))"
    (folder / "squares_program.py").write_text(
        PROGRAM.replace('            if (folder / f"full', f'            {fill}\n            if (folder / f"full')
    )
    (folder / "spill-21").touch()
    monkeypatch.setenv("SLURM_TMPDIR", str(temporary))
    try:
        assert results(run(folder)) == EXPECTED
    finally:
        subprocess.run(["umount", "--lazy", str(temporary)], check=True)
    assert sorted(computed(folder)) == sorted([*NUMBERS, 20, 21])


@pytest.mark.guarantee("damaged result or manifest")
@pytest.mark.guarantee("damaged results")
@pytest.mark.parametrize("damage", ["cut part", "other bytes", "no part", "cut manifest", "no manifest"])
def test_damaged_result_is_recomputed(folder: Path, damage: str) -> None:
    run(folder)
    part, manifest = stage(folder).part(4), stage(folder).manifest(4)
    match damage:
        case "cut part":
            part.write_text(part.read_text()[:-3])
        case "other bytes":
            part.write_text(part.read_text().replace("1", "2"))
        case "no part":
            part.unlink()
        case "cut manifest":
            manifest.write_text(manifest.read_text()[:20])
        case "no manifest":
            manifest.unlink()
    assert results(run(folder)) == EXPECTED
    assert computed(folder).count(40) == 2
    assert computed(folder).count(30) == 1


def test_intermediate_files_are_kept_until_stage_is_done(folder: Path) -> None:
    made = stage(folder)
    checkpoint = made.folder / "checkpoints" / "0123456789abcdef" / "checkpoint-18" / "model.safetensors"
    result_of_killed_job = made.folder / ".part-00003.node-1.4711.0123abcd.tmp"
    model_of_killed_job = made.folder / ".part-00004.node-1.4711.0123abcd.tmp" / "model.safetensors"
    for path in (checkpoint, result_of_killed_job, model_of_killed_job):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"weights")
    (folder / "fail-32").touch()
    with pytest.raises(ShardsFailed):
        run(folder)
    assert checkpoint.exists()
    (folder / "fail-32").unlink()
    run(folder)
    assert not checkpoint.parent.parent.parent.exists()
    assert not list(made.folder.glob(".*"))


@pytest.mark.guarantee("result of another configuration")
def test_result_with_another_key_is_not_used(folder: Path) -> None:
    run(folder)
    fan_out(stage(folder, version=2), as_shards(*SHARDS), Resources(), CLUSTER)
    assert computed(folder).count(0) == 2
    changed = as_shards([{"n": 5}, *SHARDS[0][1:]], *SHARDS[1:])
    assert results(fan_out(stage(folder, version=2), changed, Resources(), CLUSTER))[0] == 25
    assert computed(folder).count(10) == 2


def test_key_does_not_depend_on_resources(folder: Path) -> None:
    run(folder, jobs=1)
    before = computed(folder)
    run(folder, jobs=3, time_limit_minutes=9, shards_per_job=1)
    assert computed(folder) == before


def test_progress_is_monotonic_and_complete(folder: Path) -> None:
    seen: list[Progress] = []
    fan_out(stage(folder, 0.3), as_shards(*SHARDS[:2]), Resources(cpus_per_process=1), CLUSTER, seen.append)
    done = [progress.rows_done for progress in seen]
    assert done == sorted(done)
    assert done[-1] == 6
    assert any(0 < rows < 6 for rows in done)


def kill_driver_with_jobs(folder: Path) -> None:
    """Start a driver, and kill it once its jobs have begun two rows."""
    driver = start_driver(folder)
    wait_until(lambda: len(computed(folder)) >= 2)
    driver.kill()
    driver.wait()


def test_next_driver_waits_for_jobs_of_killed_driver(folder: Path) -> None:
    kill_driver_with_jobs(folder)
    assert jobs_alive(folder / "stage") > 0
    assert results(run(folder, seconds=0.15)) == EXPECTED
    assert len(computed(folder)) == len(set(computed(folder)))  # nothing was computed twice
    assert len((folder / "opened.txt").read_text().split()) == 2


def test_jobs_that_end_without_a_driver_are_not_counted_as_losses(folder: Path) -> None:
    """A crash of the host ends both."""
    kill_driver_with_jobs(folder)
    for submission in submissions(folder):
        LocalBackend(Resources(), None).cancel(submission.ids or [])
    assert results(run(folder, seconds=0.15, infrastructure_retries=0)) == EXPECTED
    assert len(submissions(folder)) > 1


@pytest.mark.guarantee("run copied or moved to another path")
def test_copied_run_leaves_original_jobs_alone(folder: Path) -> None:
    kill_driver_with_jobs(folder)
    copy = replace(stage(folder, 0.15), folder=Path(shutil.copytree(folder / "stage", folder / "copy")))
    assert close_submissions(Ledger(copy.folder / "jobs"), CLUSTER) == 0
    assert jobs_alive(folder / "stage") > 0
    parts = fan_out(copy, as_shards(*SHARDS), Resources(parallel_jobs=2, cpus_per_process=1), CLUSTER)
    assert results(parts) == results(run(folder, seconds=0.15)) == EXPECTED
    assert len((folder / "opened.txt").read_text().split()) == 4  # two jobs of each


def test_moved_run_waits_until_its_jobs_end(folder: Path) -> None:
    kill_driver_with_jobs(folder)
    moved = replace(stage(folder, 0.15), folder=(folder / "stage").rename(folder / "moved"))
    assert len(Ledger(moved.folder / "jobs").open_submissions()) == 1
    assert close_submissions(Ledger(moved.folder / "jobs"), CLUSTER) == 1
    wait_until(lambda: jobs_alive(folder / "stage") == 0, 10)


def test_interrupted_driver_cancels_its_jobs(folder: Path) -> None:
    driver = start_driver(folder)
    wait_until(lambda: len(computed(folder)) >= 2)
    driver.send_signal(signal.SIGINT)
    driver.wait(30)
    wait_until(lambda: jobs_alive(folder / "stage") == 0, 10)
    assert all(submission.closed for submission in submissions(folder))
    assert results(run(folder)) == EXPECTED


@pytest.mark.guarantee("driver killed before it records a job id")
def test_jobs_with_unrecorded_ids_are_cancelled(folder: Path) -> None:
    kill_driver_with_jobs(folder)
    ledger = folder / "stage" / "jobs" / "ledger.json"
    entries = read_json(ledger)
    for entry in entries:
        entry["ids"] = None  # as if the driver had died between starting the jobs and recording them
    ledger.write_text(json.dumps(entries))
    assert results(run(folder, seconds=0.15)) == EXPECTED
    assert jobs_alive(folder / "stage") == 0


@pytest.mark.guarantee("driver killed at any moment")
def test_driver_killed_at_any_point_loses_nothing(folder: Path) -> None:
    for moment in (0.0, 0.1, 0.3, 0.6, 1.2):
        driver = start_driver(folder)
        assert driver.stdout is not None
        assert driver.stdout.readline() == "begun\n"  # after its imports
        time.sleep(moment)
        driver.kill()
        driver.wait()
    driver = start_driver(folder)
    output, errors = driver.communicate(timeout=120)
    assert output.splitlines() == ["begun", str(EXPECTED)], errors


@pytest.mark.slow
def test_hanging_shard_is_restarted_with_following_shards(folder: Path) -> None:
    (folder / "hang-21").touch()  # of two jobs, the first has shards 0, 2 and 4
    assert results(run(folder, seconds=0.1, duplicate_stragglers_after=5)) == EXPECTED
    assert sorted(computed(folder)) == sorted([*NUMBERS, 20, 21])
    assert len(submissions(folder)) == 2
    assert jobs_alive(folder / "stage") == 0


@pytest.mark.slow
@pytest.mark.guarantee("squeue fails for a while")
def test_silent_scheduler_makes_no_stragglers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shard has three rows. The queue is unknown while jobs compute the second row of their first shard."""
    together = "while len((folder / 'opened.txt').read_text().split()) < 4: time.sleep(0.01)"
    (folder / "squares_program.py").write_text(PROGRAM.replace("def compute", f"{together}\n    def compute"))
    running = LocalBackend.running

    def silent(backend: LocalBackend, name: str, ids: Sequence[str]) -> set[str] | None:
        return None if 8 <= len(computed(folder)) < 12 else running(backend, name, ids)

    monkeypatch.setattr(LocalBackend, "running", silent)
    assert results(run(folder, jobs=4, seconds=0.4, duplicate_stragglers_after=2)) == EXPECTED
    assert len(submissions(folder)) == 1


@pytest.mark.slow
def test_local_jobs_never_share_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a replacement job; only visible GPUs are used. The test needs no GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    (folder / "squares_program.py").write_text(
        PROGRAM.replace("def compute(rows", "gpu = os.environ['CUDA_VISIBLE_DEVICES']\n    def compute(rows").replace(
            'time.sleep(settings["seconds"])',
            'held = folder / f"gpu-{gpu}"; held.touch(exist_ok=False); time.sleep(0.2); held.unlink(); '
            'print(gpu, file=(folder / "used.txt").open("a"))',
        )
    )
    (folder / "kill-10").touch()
    with (folder / "used.txt").open("w"):
        assert results(run(folder, jobs=3, gpus_per_node=1)) == EXPECTED
    assert computed(folder).count(10) == 2
    assert set((folder / "used.txt").read_text().split()) == {"2", "5"}
    with pytest.raises(UserError, match=r"needs 3 GPUs.*has 2.*lower gpus_per_node"):
        run(folder, gpus_per_node=3)


@pytest.mark.slow
def test_copy_of_slow_shard_waits_for_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs may run, but there is one GPU: a copy would compute without it. The test needs no GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    (folder / "squares_program.py").write_text(PROGRAM.replace("time.sleep(600)", "time.sleep(3)"))
    (folder / "hang-51").touch()
    assert results(run(folder, seconds=0.05, gpus_per_node=1, duplicate_stragglers_after=3)) == EXPECTED
    assert computed(folder) == NUMBERS


def test_file_replaced_during_nfs_read_is_reread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json({"state": "new"}, tmp_path / "file.json")
    read, failures = Path.read_text, [errno.ESTALE, errno.ESTALE]

    def stale(path: Path, *arguments: object, **options: object) -> str:
        if failures:
            raise OSError(failures.pop(), "Stale file handle")
        return read(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", stale)
    assert read_json(tmp_path / "file.json") == {"state": "new"}
    assert failures == []
    failures.append(errno.EIO)
    with pytest.raises(OSError, match="Stale"):
        read_json(tmp_path / "file.json")


def test_first_result_of_a_shard_is_kept(folder: Path) -> None:
    shards = stage(folder)
    key = key_of(shards, SHARDS[0])
    shards.write(as_shards(SHARDS[0]))
    with shards.commit_part(0, key, 3, "slow") as slow:
        with shards.commit_part(0, key, 3, "fast") as fast:
            fast.write_text("fast")
        flops.record_operations(3, 5)
        slow.write_text("slow")
    assert shards.part(0).read_text() == "fast"
    assert read_json(shards.manifest(0))["job_id"] == "fast"
    assert shards.is_done(0, key, thorough=True)
    assert not list(shards.folder.glob(".*.tmp"))
    assert flops.read_and_reset() == 0  # the job's next shard does not count them


def test_result_of_earlier_settings_is_dropped(folder: Path) -> None:
    shards = as_shards(SHARDS[0])
    earlier, now = stage(folder), stage(folder, seconds=0.5)
    earlier.write(shards)
    with earlier.commit_part(0, key_of(earlier, SHARDS[0]), 3, "of another host") as late:
        now.write(shards)
        with now.commit_part(0, key_of(now, SHARDS[0]), 3, "of this host") as part:
            part.write_text("now")
        late.write_text("earlier")
    assert now.part(0).read_text() == "now"
    assert now.is_done(0, key_of(now, SHARDS[0]), thorough=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A stage with records of every kind; all shards are done except the last, which failed."""
    made = stage(tmp_path_factory.mktemp("finished"))
    made.write(as_shards(*SHARDS))
    for index, rows in enumerate(SHARDS[:-1]):
        with made.commit_part(index, key_of(made, rows), len(rows), "7:0.5") as part:
            part.write_text("[1, 2, 3]")
    RowClock(made.progress_file(5))(2)
    failure = {"job_id": "7", "attempt": "0", "class": "code_error", "opening": False, "error": "e", "traceback": "t"}
    write_json(failure, made.failure_file(5))
    made_jobs = Ledger(made.folder / "jobs")
    tasks = [[0, 1, 2], [3, 4, 5]]
    made_jobs.submissions = [Submission("n", "w", tasks, platform.node(), 2, ids=["7:0.5", "8:0.5"], closed=True)]
    made_jobs.save()
    made.record_start("7", "here", 1)
    return made


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def damaged(content: bytes, data: st.DataObject) -> bytes:
    """Draw other bytes, other JSON, or the content with one field removed or replaced."""
    note: Any = json.loads(content)
    entry = note[0] if isinstance(note, list) else note
    match data.draw(st.sampled_from(["bytes", "cut", "json", "field", "no field"])):
        case "bytes":
            return data.draw(st.binary(max_size=20) | st.just(b"[" * 100_000) | st.just(b"9" * 5000))
        case "cut":
            return content[: data.draw(st.integers(0, len(content)))]
        case "json":
            return json.dumps(data.draw(ANY_JSON)).encode()
        case "field":
            entry[data.draw(st.sampled_from(sorted(entry)))] = data.draw(ANY_JSON)
        case "no field":
            del entry[data.draw(st.sampled_from(sorted(entry)))]
    return json.dumps(note).encode()


@pytest.mark.guarantee("damaged results")
@given(st.data())
def test_damaged_record_counts_as_missing(finished: Stage, data: st.DataObject) -> None:
    results = {finished.part(index) for index in range(6)}
    note = data.draw(st.sampled_from(sorted(set(finished.folder.rglob("*.json")) - results)))
    before, refusal = note.read_bytes(), ""
    after = damaged(before, data)
    note.write_bytes(after)
    try:
        for index, thorough in itertools.product(range(6), (False, True)):
            if finished.is_done(index, key_of(finished, SHARDS[index]), thorough) and note == finished.manifest(index):
                fields = ("key", "bytes", "sha256") if thorough else ("key", "bytes")
                assert [json.loads(after)[name] == json.loads(before)[name] for name in fields] == [True] * len(fields)
        read_stage_status(finished.folder, CLUSTER)
        logs_of(finished.folder, range(6))
        use_of(finished.folder)
    except UserError as error:
        refusal = str(error)
    finally:
        note.write_bytes(before)
    assert not refusal or (note.name in ("stage.json", "ledger.json") and str(note) in refusal)


def test_nothing_starts_if_running_jobs_are_unknown(folder: Path) -> None:
    (folder / "stage" / "jobs").mkdir(parents=True)
    ledger = folder / "stage" / "jobs" / "ledger.json"
    ledger.write_text('[{"name": "montessori-squares", "ids"')
    with pytest.raises(UserError, match=r"ledger.json is corrupt.*squeue --me.*remove the file and resume"):
        run(folder)
    assert computed(folder) == []
    ledger.unlink()
    assert results(run(folder)) == EXPECTED


def test_slurm_jobs_without_slurm_are_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(folder / "stage" / "jobs")
    ledger.submissions = [Submission("montessori-squares", "w", [[0]], None, 1, ids=["17"])]
    ledger.save()
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(UserError, match=r"Slurm jobs .* no squeue here.* login node.* remove jobs/ledger\.json"):
        run(folder)
    assert computed(folder) == []


@pytest.mark.guarantee("squeue fails for a while")
def test_finished_stage_needs_no_scheduler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The controller goes down while the last job is leaving the queue."""
    parts = run(folder)
    made = stage(folder)
    ledger = Ledger(made.folder / "jobs")
    work = hash_json([key_of(made, rows) for rows in SHARDS])
    ledger.submissions = [Submission("montessori-squares", work, [[0]], None, 1, ids=["17"])]
    ledger.save()
    become_login_node(monkeypatch, folder, squeue="exit 1", scancel="exit 1", scontrol="exit 1")
    monkeypatch.setattr("cluster.backends.slurm._CANCEL_TIMEOUT", 1.0)
    slurm = Cluster(profile="slurm", poll_seconds=0.05)
    assert fan_out(made, as_shards(*SHARDS), Resources(), slurm) == parts
    assert len(Ledger(made.folder / "jobs").open_submissions()) == 1  # for `montessori cancel`


def test_cancelling_finished_local_job_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of this driver stays a zombie until the driver polls it; a job of an earlier driver disappears at once."""
    job = subprocess.Popen(["sleep", "600"])
    found = psutil.Process(job.pid)
    job.kill()
    job.wait()
    monkeypatch.setattr("cluster.backends.local.process_of", lambda job_id: found)
    LocalBackend(Resources(), None).cancel([f"{job.pid}:0"])


def test_local_job_survives_clock_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil's start times move with the clock, which NTP sets after a laptop or a virtual machine was suspended."""
    job = subprocess.Popen(["sleep", "600"])
    try:
        job_id = f"{job.pid}:{start_time(job.pid)}"
        backend = LocalBackend(Resources(), None)
        assert seconds_since(start_time(job.pid)) < 60
        monkeypatch.setattr("psutil._pslinux.boot_time", lambda: 1.0)
        assert backend.running("", [job_id]) == {job_id}
        assert backend.running("", [f"{job.pid}:{start_time(job.pid) - 1}"]) == set()  # an earlier process of this id
    finally:
        job.kill()
        job.wait()
    assert backend.running("", [job_id]) == set()


def test_local_job_past_its_limit_is_time_limit() -> None:
    backend = LocalBackend(Resources(time_limit_minutes=1), None)
    now = seconds_since(0.0)
    assert classify_loss(backend.exit_reason(f"1:{now - 61}")) == "time_limit"
    assert classify_loss(backend.exit_reason(f"1:{now - 50}")) == "lost"


def test_commit_is_atomic(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with commit(target) as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text("first")
    before = hash_path(target)

    def write_half() -> None:
        with commit(target) as temporary:
            temporary.mkdir()
            (temporary / "weights").write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_half()
    assert hash_path(target) == before
    assert list(tmp_path.iterdir()) == [target]


def test_jobs_with_other_settings_are_cancelled(folder: Path) -> None:
    kill_driver_with_jobs(folder)
    assert jobs_alive(folder / "stage") > 0
    changed = [[{"n": row["n"] + 1000} for row in shard] for shard in SHARDS]
    assert results(run(folder, changed)) == [row["n"] ** 2 for shard in changed for row in shard]
    assert jobs_alive(folder / "stage") == 0


def test_each_kind_of_loss_has_its_budget() -> None:
    said = {
        "Slurm says OUT_OF_MEMORY (None) on node1": ("out_of_memory", 1),
        "Slurm says PREEMPTED (None) on node1": ("preempted", 30),
        "Slurm says NODE_FAIL (None) on node1": ("node_failure", 6),
        "Slurm says TIMEOUT (TimeLimit) on node1": ("time_limit", 3),
        "slurmstepd: error: *** STEP 2.0 ON a CANCELLED AT 2026-11-28T19:07:04 DUE TO PREEMPTION ***": (
            "preempted",
            30,
        ),
        "slurmstepd: error: *** STEP 2.0 ON a CANCELLED AT 2026-11-28T19:07:04 DUE TO TIME LIMIT ***": (
            "time_limit",
            3,
        ),
        "srun: error: Node failure on a": ("node_failure", 6),
        "srun: error: a: task 0: Out Of Memory": ("out_of_memory", 1),
        "srun: error: a: task 0: Terminated": ("lost", 3),
        "the process ended without a result (killed, or out of memory)": ("lost", 3),
    }
    for reason, (kind, retries) in said.items():
        assert (classify_loss(reason), allowed_retries(classify_loss(reason), 3)) == (kind, retries)
    assert allowed_retries("out_of_memory", 0) == 0
