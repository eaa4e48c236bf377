"""Which nodes get no jobs, and what ends a stage, when jobs do not open their program on some of eight nodes.

The lab of the other tests has two nodes, of which the loss of one leaves one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.driver_job import DriverStopped
from cluster.fanout import ShardsFailed
from cluster.progress import Progress
from support import squares
from support.simulated_slurm import Job, SimulatedSlurm, run

NODES = [f"n{number}" for number in range(1, 9)]


@pytest.fixture
def open_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SimulatedSlurm]:
    """Opens a Slurm of eight nodes whose jobs do as a test says; the driver makes no pauses."""
    monkeypatch.setattr("cluster.fanout._LONGEST_BACKOFF", 0.0)
    monkeypatch.setattr("cluster.nodes._PAUSE", 0.1)
    return lambda act, **options: SimulatedSlurm(squares.stage(tmp_path), act, list(NODES), **options)


@pytest.mark.guarantee("stale file handles")
@pytest.mark.parametrize("hit", [7, 8])
@pytest.mark.parametrize("kind", ["file_system", "lost"])
def test_nodes_that_a_passing_fault_hit_are_used_again(
    open_slurm: Callable[..., SimulatedSlurm], monkeypatch: pytest.MonkeyPatch, kind: str, hit: int
) -> None:
    """In the jobs that wait in the queue as well."""

    def act(slurm: SimulatedSlurm, job: Job) -> None:
        if job.number < hit:
            slurm.fail(job, kind)
        elif job.polls >= 3:
            slurm.finish(job)

    slurm = open_slurm(act)
    run(slurm, 32, monkeypatch)
    assert sum(slurm.starts.values()) == 32 + hit
    assert max(slurm.starts.values()) <= 9
    assert not any(job.avoid for job in slurm.jobs.values() if job.number >= 24)


def test_passing_fault_keeps_no_node_idle_while_others_compute(
    open_slurm: Callable[..., SimulatedSlurm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job on the other node takes longer than all other work."""

    def act(slurm: SimulatedSlurm, job: Job) -> None:
        if job.number < 7:
            slurm.fail(job, "file_system")
        elif job.number > 7 or (
            len(slurm.jobs) > 32 and all(other.ended or other is job for other in slurm.jobs.values())
        ):
            slurm.finish(job)

    slurm = open_slurm(act)
    run(slurm, 32, monkeypatch)
    assert slurm.starts["n8"] == 1


@pytest.mark.guarantee("program does not open on one node")
def test_nodes_are_used_again_when_the_last_other_one_crashes(
    open_slurm: Callable[..., SimulatedSlurm], monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(slurm: SimulatedSlurm, job: Job) -> None:
        if job.number < 7:
            slurm.fail(job, "lost")
        elif job.node != "n8":
            slurm.finish(job)
        elif job.polls == 30:
            slurm.take_down("n8")

    slurm = open_slurm(act)
    run(slurm, 20, monkeypatch)
    assert slurm.starts["n8"] == 1


def test_next_driver_uses_nodes_that_the_last_one_avoided(
    open_slurm: Callable[..., SimulatedSlurm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not know their failures. Jobs in the queue do."""

    def act(slurm: SimulatedSlurm, job: Job) -> None:
        if job.number < 7:
            slurm.fail(job, "lost")
        elif job.node != "n8" or len(slurm.up) == 1:
            slurm.finish(job)

    def stop(progress: Progress) -> None:
        if any(job.avoid for job in slurm.jobs.values()):
            raise DriverStopped

    slurm = open_slurm(act)
    with pytest.raises(DriverStopped):
        run(slurm, 20, monkeypatch, stop)
    assert all(len(job.avoid) == 7 for job in slurm.jobs.values() if job.waits)
    run(slurm, 20, monkeypatch, lambda progress: slurm.up.__delitem__(slice(7)) if len(progress.done) == 19 else None)
    assert slurm.starts["n8"] < 3


@pytest.mark.guarantee("program does not open on one node")
@pytest.mark.parametrize("silent", [False, True])
def test_broken_node_ends_no_stage(
    open_slurm: Callable[..., SimulatedSlurm], monkeypatch: pytest.MonkeyPatch, silent: bool
) -> None:
    """Even if Slurm moves no queued job, for example because its user may submit no more jobs."""

    def act(slurm: SimulatedSlurm, job: Job) -> None:
        if job.node == "n1":
            slurm.fail(job, "code_error")
        elif job.polls == 2:
            slurm.open_row(job)
        elif job.polls >= 40:
            slurm.finish(job)

    slurm = open_slurm(act, silent=silent)
    run(slurm, 20, monkeypatch)
    assert silent or slurm.starts["n1"] <= 8


@pytest.mark.guarantee("program does not open on one node")
@pytest.mark.parametrize("exclude_node_after", [3, 0])
def test_error_of_the_code_on_one_node_ends_no_stage_after_another_failure(
    open_slurm: Callable[..., SimulatedSlurm], monkeypatch: pytest.MonkeyPatch, exclude_node_after: int
) -> None:
    def act(slurm: SimulatedSlurm, job: Job) -> None:
        if job.node in ("n1", "n2"):
            slurm.fail(job, "file_system" if job.node == "n1" else "code_error")
        elif job.polls >= 10:
            slurm.finish(job)

    slurm = open_slurm(act)
    run(slurm, 20, monkeypatch, exclude_node_after=exclude_node_after, infrastructure_retries=0)


@pytest.mark.guarantee("program does not open on one node")
def test_jobs_that_opened_at_the_same_poll_count_first(
    open_slurm: Callable[..., SimulatedSlurm], monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(slurm: SimulatedSlurm, job: Job) -> None:
        if job.polls == 5 and job.node in ("n1", "n2"):
            slurm.fail(job, "code_error")
        elif job.polls == 5:
            slurm.open_row(job)
        elif job.polls >= 10:
            slurm.finish(job)

    run(open_slurm(act), 20, monkeypatch)


@pytest.mark.guarantee("program does not open on one node")
def test_node_of_the_failed_process_is_avoided(
    open_slurm: Callable[..., SimulatedSlurm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a job on several nodes, the record of its start names an arbitrary one."""
    avoided: set[frozenset[str]] = set()

    def act(slurm: SimulatedSlurm, job: Job) -> None:
        avoided.update(other.avoid for other in slurm.jobs.values() if other.waits)
        if job.node in ("n2", "n3") and "n1" not in job.avoid:  # it has a process on n1, too
            slurm.fail(job, "code_error", node="n1")
        elif job.polls >= 10:
            slurm.finish(job)

    run(open_slurm(act), 20, monkeypatch)
    assert avoided == {frozenset(), frozenset({"n1"})}


@pytest.mark.guarantee("program does not open")
@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("Slurm says OUT_OF_MEMORY (OutOfMemory) on n1", "out_of_memory"),
        ("Slurm says FAILED (NonZeroExitCode)", "lost"),
    ],
)
def test_program_whose_jobs_die_at_start_ends_the_stage(
    open_slurm: Callable[..., SimulatedSlurm], monkeypatch: pytest.MonkeyPatch, reason: str, kind: str
) -> None:
    def act(slurm: SimulatedSlurm, job: Job) -> None:
        job.ended = True

    slurm = open_slurm(act, reason=reason)
    with pytest.raises(
        ShardsFailed, match=f"80 of 80 shards failed.*\n.*{kind}.*so did jobs of other shards"
    ) as failure:
        run(slurm, 80, monkeypatch, infrastructure_retries=1)
    assert len(failure.value.failures) == 80
    assert sum(slurm.starts.values()) <= 32


def test_shard_whose_jobs_die_ends_no_stage(
    open_slurm: Callable[..., SimulatedSlurm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the first, on the only node, so that no job has computed anything yet."""

    def act(slurm: SimulatedSlurm, job: Job) -> None:
        if job.shard == 0:
            job.ended = True
        else:
            slurm.finish(job)

    slurm = open_slurm(act, reason="Slurm says FAILED")
    del slurm.up[1:]
    hold = slurm.plan_jobs
    monkeypatch.setattr(slurm, "plan_jobs", lambda shards, free, *rest: hold(shards[:1], min(free, 1), *rest))
    with pytest.raises(ShardsFailed, match="1 of 5 shards failed"):
        run(slurm, 5, monkeypatch)
    assert slurm.starts["n1"] == 8


@pytest.mark.guarantee("program does not open")
def test_program_that_loads_for_other_shards_fails_one_shard(
    open_slurm: Callable[..., SimulatedSlurm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its longest prompt needs too much memory."""

    def act(slurm: SimulatedSlurm, job: Job) -> None:
        if job.shard == 11:
            slurm.fail(job, "code_error", loading=True)
        elif job.polls >= 3:
            slurm.finish(job)

    slurm = open_slurm(act)
    with pytest.raises(ShardsFailed, match="1 of 20 shards failed") as failure:
        run(slurm, 20, monkeypatch, infrastructure_retries=2)
    assert [(failed.shard, failed.kind) for failed in failure.value.failures] == [(11, "code_error")]
    assert [job.shard for job in slurm.jobs.values()].count(11) == 3


@pytest.mark.guarantee("program does not open on one node")
@pytest.mark.parametrize("kind", ["code_error", "gpu_out_of_memory", "lost"])
def test_last_shard_that_a_broken_node_gets_is_computed_on_another(
    open_slurm: Callable[..., SimulatedSlurm], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """vLLM has loaded on all other nodes, and they compute for long."""
    monkeypatch.setattr("cluster.nodes._PAUSE", 60.0)

    def act(slurm: SimulatedSlurm, job: Job) -> None:
        if job.node == "n1":
            slurm.fail(job, kind, loading=True)
        elif job.polls == 2:
            slurm.open_row(job)
        elif job.polls >= 60:
            slurm.finish(job)

    slurm = open_slurm(act)
    run(slurm, 8, monkeypatch)
    assert slurm.starts["n1"] <= 2


@pytest.mark.guarantee("pending tasks cancelled by someone else")
def test_cancelled_queue_is_submitted_again(
    open_slurm: Callable[..., SimulatedSlurm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any job has started."""

    def act(slurm: SimulatedSlurm, job: Job) -> None:
        slurm.finish(job)

    slurm = open_slurm(act, reason="Slurm says CANCELLED")
    submit = slurm.submit

    def submit_and_cancel(*arguments: Any) -> list[str]:
        ids = submit(*arguments)
        if len(slurm.jobs) == len(ids):
            slurm.cancel(ids)
        return ids

    monkeypatch.setattr(slurm, "submit", submit_and_cancel)
    run(slurm, 32, monkeypatch)


@pytest.mark.guarantee("program does not open")
def test_program_that_loads_no_more_ends_the_stage(
    open_slurm: Callable[..., SimulatedSlurm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the retries of all shards are used up."""

    def act(slurm: SimulatedSlurm, job: Job) -> None:
        slurm.finish(job) if job.number < 8 else slurm.fail(job, "code_error", loading=True)

    slurm = open_slurm(act)
    with pytest.raises(ShardsFailed, match="40 of 48 shards failed"):
        run(slurm, 48, monkeypatch, infrastructure_retries=1)
    assert sum(slurm.starts.values()) < 48


@pytest.mark.parametrize("nodes", [1, 8])
def test_log_says_what_becomes_of_an_excluded_node(
    open_slurm: Callable[..., SimulatedSlurm],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    nodes: int,
) -> None:
    """The only node is used again."""

    def act(slurm: SimulatedSlurm, job: Job) -> None:
        if job.number == 0:
            slurm.fail(job, "file_system")
        elif job.polls >= 3:
            slurm.finish(job)

    slurm = open_slurm(act)
    del slurm.up[nodes:]
    run(slurm, 20, monkeypatch, exclude_node_after=1)
    assert ("lost 1 shards or jobs get no more of this stage: n1" in caplog.text) == (nodes == 8)
    assert ("lost 1 shards or jobs are used again, since no other can run its jobs: n1" in caplog.text) == (nodes == 1)
    assert slurm.starts["n1"] == 21 if nodes == 1 else slurm.starts["n1"] <= 2
