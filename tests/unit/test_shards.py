"""Sharding of a stage: work for all parallel jobs, and the same shards when a run is resumed."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.backends.base import split_for_array
from cluster.fanout import fan_out
from cluster.shards import cut_for_jobs, shard_size
from montessori_core import programs
from montessori_core.config import Resources, Sampling, parse_experiment
from montessori_core.data.rows import Rows
from support import squares
from support.squares import CLUSTER, computed, results, stage
from tasks.run import Run
from tasks.stage import Step

folder = squares.forking_folder


@given(rows=st.integers(1, 20_000), jobs=st.integers(1, 100), largest=st.integers(1, 600))
def test_shards_give_jobs_equal_work(rows: int, jobs: int, largest: int) -> None:
    """Up to rounding."""
    size = shard_size(rows, jobs, largest)
    assert 1 <= size <= largest
    shards = -(-rows // size)
    assert shards <= jobs * -(-rows // (jobs * largest))
    assert size == 1 or (size - 1) * jobs * -(-rows // (jobs * largest)) < rows  # one row less would need more shards


@pytest.mark.parametrize(
    ("rows", "jobs", "largest", "tasks"),
    [
        (100, 64, 64, 50),  # audit: two exact measurements per job instead of 64 and 36
        (800, 64, 64, 62),  # confirmation
        (10_000, 64, 64, 64),
        (3250, 8, 256, 8),  # generation
    ],
)
def test_array_has_tasks_for_all_jobs(rows: int, jobs: int, largest: int, tasks: int) -> None:
    size = shard_size(rows, jobs, largest)
    dealt = split_for_array(range(-(-rows // size)), jobs, 16)
    assert len(dealt) == tasks
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_array_task_respects_shard_limit() -> None:
    assert [len(task) for task in split_for_array(range(10), 2, 3)] == [3, 3, 2, 2]


def test_resumed_run_keeps_shards_when_jobs_change(folder: Path) -> None:
    rows = Rows.of([{"n": n} for n in range(12)])
    cuts = []
    for jobs in (2, 5, 1):
        shards = cut_for_jobs(stage(folder).folder, rows, jobs, 8)
        parts = fan_out(stage(folder), shards, Resources(parallel_jobs=jobs), CLUSTER)
        assert results(parts) == [n**2 for n in range(12)]
        cuts.append([table["n"].to_pylist() for table in shards])
    assert [len(shard) for shard in cuts[0]] == [6, 6]
    assert cuts[0] == cuts[1] == cuts[2]
    assert sorted(computed(folder)) == list(range(12))
    more = Rows.of([{"n": n} for n in range(48)])
    assert [len(shard) for shard in cut_for_jobs(stage(folder).folder, more, 2, 8)] == [8] * 6  # other rows


def test_step_shards_rows_for_parallel_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resources = {"influence": {"parallel_jobs": 64}, "generation": {"parallel_jobs": 8}}
    content = {"teacher": {"model": "t"}, "student": {"model": "s"}, "cluster": {"resources": resources}}
    step = Step(Run(tmp_path, parse_experiment(content, "test")), tmp_path, "test")
    tasks = [{"example_id": str(n), "instruction": "i", "response": "r"} for n in range(100)]
    prompts = [{"example_ids": [str(n)], "turns": ["t"], "seeds": [n]} for n in range(100)]
    monkeypatch.setattr(Step, "_compute", lambda self, program, settings, shards, *_, **__: shards)
    assert len(step.execute(programs.NORM_SIM, programs.Similarity(max_length=1), tasks, 64)) == 50
    sampling = programs.Generation(engine="auto", form="whole", sampling=Sampling())
    assert len(step.execute(programs.GENERATION, sampling, prompts, 256)) == 8
