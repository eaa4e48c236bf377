"""When a program that does not open ends its stage."""

import pytest

from cluster.retry import Openings

NONE: frozenset[str] = frozenset()


@pytest.mark.parametrize("kind", ["code_error", "gpu_out_of_memory"])
def test_unopened_program_fails_on_two_nodes_or_the_only_one(kind: str) -> None:
    openings = Openings(3)
    assert openings.count_failure("1", "node1", NONE)
    assert openings.end_stage(kind, other_node=False)
    assert not openings.end_stage(kind, other_node=True)
    assert openings.nodes == {"node1"}
    openings.count_failure("2", "node2", NONE)
    assert openings.end_stage(kind, other_node=True)


def test_jobs_of_the_same_time_fail_once() -> None:
    """A file server hinders all of them."""
    openings = Openings(1)
    for job in range(8):
        openings.count_failure(f"{job}", f"node{job}", frozenset(map(str, range(8))))
        assert not openings.end_stage("file_system", other_node=True)
    openings.count_failure("8", "node9", NONE)
    assert openings.end_stage("file_system", other_node=True)


@pytest.mark.parametrize("kind", ["code_error", "lost"])
def test_job_that_opens_the_program_ends_the_row(kind: str) -> None:
    openings = Openings(2)
    openings.note_opened({"0"})
    for number in range(9):
        openings.count_failure(f"bad-{number}", "node1", NONE)
        assert openings.nodes == {"node1"}
        assert not openings.end_stage(kind, other_node=False)
        openings.note_opened({f"good-{number // 2}"})  # two failures in a row, at most
    openings.note_opened({"0"})  # it has been open all the time
    for number in range(3):
        openings.count_failure(f"worse-{number}", "node1", NONE)
    assert openings.end_stage(kind, other_node=True)


def test_broken_node_ends_no_stage_without_retries() -> None:
    openings = Openings(0)
    openings.count_failure("1", "node1", NONE)
    assert not openings.end_stage("lost", other_node=True)
    assert openings.end_stage("disk_full", other_node=True)
