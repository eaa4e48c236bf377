"""When a program that does not open ends its stage."""

import pytest

from cluster.retry import Openings

NONE: frozenset[str] = frozenset()


@pytest.mark.parametrize("kind", ["code_error", "gpu_out_of_memory"])
def test_unopened_program_fails_on_two_nodes_or_the_only_one(kind: str) -> None:
    openings = Openings(3, 2)
    openings.count_failure("1", "node1", kind, NONE, True)
    assert openings.end_stage(kind, other_node=False)
    assert not openings.end_stage(kind, other_node=True)
    openings.count_failure("2", "node2", "file_system", NONE, True)
    assert not openings.end_stage("file_system", other_node=False)  # it may have passed on node2
    openings.count_failure("3", "node2", kind, NONE, False)
    assert openings.end_stage(kind, other_node=True)


def test_jobs_of_the_same_time_fail_once() -> None:
    """A file server hinders all of them."""
    openings = Openings(1, 2)
    for job in range(8):
        openings.count_failure(f"{job}", f"node{job}", "file_system", frozenset(map(str, range(8))), True)
        assert not openings.end_stage("file_system", other_node=True)
    openings.count_failure("8", "node9", "file_system", NONE, True)
    assert openings.end_stage("file_system", other_node=True)


def test_node_fails_once_while_another_may_be_tried() -> None:
    openings = Openings(0, 2)
    for job in range(9):
        openings.count_failure(f"{job}", "node1", "lost", NONE, True)
        assert not openings.end_stage("lost", other_node=True)
    openings.count_failure("9", "node1", "lost", NONE, False)
    assert openings.end_stage("lost", other_node=False)


@pytest.mark.parametrize("kind", ["code_error", "lost"])
def test_job_that_opens_the_program_ends_the_row(kind: str) -> None:
    openings = Openings(2, 2)
    openings.note_opened({"0"})
    for number in range(9):
        openings.count_failure(f"bad-{number}", "node1", kind, NONE, False)
        assert openings.nodes == {"node1"}
        assert not openings.end_stage(kind, other_node=False)
        openings.note_opened({f"good-{number // 2}"})  # two failures in a row, at most
    openings.note_opened({"0"})  # it has been open all the time
    for number in range(3):
        openings.count_failure(f"worse-{number}", f"node{number}", kind, NONE, True)
    assert openings.end_stage(kind, other_node=True)


def test_shards_that_may_be_the_cause_end_no_stage() -> None:
    """Until there are more of them than run at a time."""
    openings = Openings(1, 2)
    for job in range(9):
        openings.count_failure(f"{job}", "node1", "lost", NONE, False, shard=job % 2)
        assert not openings.end_stage("lost", other_node=False, shard=job % 2)
    openings.count_failure("9", "node1", "lost", NONE, False, shard=2)
    assert openings.end_stage("lost", other_node=False, shard=2)


def test_full_disk_ends_the_stage() -> None:
    openings = Openings(3, 2)
    openings.count_failure("1", "node1", "disk_full", NONE, True)
    assert openings.end_stage("disk_full", other_node=True)
