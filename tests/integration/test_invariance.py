"""Tables have the same bytes for any shards, workers, order, interruptions and retries."""

import random
import sys
from pathlib import Path

import pytest

from cluster.fanout import fan_out
from cluster.shards import Shards
from cluster.stage import Stage
from montessori_core import programs
from montessori_core.config import Cluster, Influence, Resources, Warmup
from montessori_core.data.rows import ExampleRow, Rows
from montessori_core.data.sources import Task, write_tasks
from montessori_core.data.tables import INFLUENCE, write_table
from montessori_core.influence.jobs import open_reference_loss
from montessori_core.influence.table import join_influence
from montessori_core.program import Row
from support.row_programs import Interrupted, as_compute, interrupt_at

DRAW = random.Random(5)
WORDS = ("hens", "ran", "over", "17", "green", "hills", "but", "slowly")
ROWS: list[Row] = [
    {
        "example_id": f"e{n:02d}",
        "prompt_id": f"p{n // 4}",
        "instruction": " ".join(DRAW.choices(WORDS, k=DRAW.randint(3, 30))),
        "response": " ".join(DRAW.choices(WORDS, k=DRAW.randint(1, 40))),
        "response_finished": n % 5 > 0,
    }
    for n in range(20)
]


def joined(
    folder: Path,
    model: Path,
    estimator: str,
    rows: list[Row],
    size: int,
    jobs: int,
    threads: int = 1,
    python: str | None = None,
) -> bytes:
    """Return the bytes of the joined table, with rows in the order of ROWS."""
    folder.mkdir()
    reference = folder / "reference.jsonl"
    write_tasks([Task(f"r{n}", f"Say {n} in words.", "well, " * (n % 6 + 1) + str(n)) for n in range(10)], reference)
    settings = programs.measurement_settings(Influence(learning_rate=1e-3), Warmup(), 64, estimator, "student")
    inputs = {"student": model, "reference": reference}
    stage = Stage.of(programs.INFLUENCE, settings, folder / "stage", inputs, {})
    resources = Resources(parallel_jobs=jobs, cpus_per_process=threads)
    parts = fan_out(stage, Shards(Rows.of(rows, ExampleRow), size), resources, Cluster(), python=python)
    table = join_influence(parts).read_all()
    write_table(table.sort_by("example_id").combine_chunks(), folder / "influence.parquet", INFLUENCE)
    return (folder / "influence.parquet").read_bytes()


@pytest.mark.parametrize("estimator", [pytest.param("exact", marks=pytest.mark.slow), "first_order"])
def test_influence_does_not_depend_on_shards(tiny_llama: Path, tmp_path: Path, estimator: str) -> None:
    expected = joined(tmp_path / "one-shard", tiny_llama, estimator, ROWS, 20, 1)
    shuffled = random.Random(1).sample(ROWS, len(ROWS))
    assert joined(tmp_path / "many-shards", tiny_llama, estimator, ROWS, 3, 2) == expected
    assert joined(tmp_path / "another-order", tiny_llama, estimator, shuffled, 7, 2) == expected


@pytest.mark.guarantee("any number of interruptions")
def test_reference_loss_does_not_depend_on_interruptions(tiny_llama: Path, tmp_path: Path) -> None:
    """Padding changes the last bits, so remaining rows must share the same batches as before."""
    settings = programs.ModelLoss(max_length=512, batch_tokens=1200)
    rows: list[Row] = [
        {"example_id": row["example_id"], "instruction": row["instruction"], "response": row["response"]}
        for row in ROWS
    ]
    compute = as_compute(open_reference_loss(settings, {"model": tiny_llama}))
    compute(rows, tmp_path / "calm.parquet", lambda done: None)
    for moment in (1, 9, 15):
        with pytest.raises(Interrupted):
            compute(rows, tmp_path / "stormy.parquet", interrupt_at(moment))
    compute(rows, tmp_path / "stormy.parquet", lambda done: None)
    assert (tmp_path / "stormy.parquet").read_bytes() == (tmp_path / "calm.parquet").read_bytes()


@pytest.mark.slow
def test_forked_job_measures_same_influence(tiny_llama: Path, tmp_path: Path) -> None:
    forked = joined(tmp_path / "forked", tiny_llama, "first_order", ROWS, 20, 1, threads=2)
    assert forked == joined(tmp_path / "new", tiny_llama, "first_order", ROWS, 20, 1, threads=2, python=sys.executable)
