"""Run programs in a job, and row programs in the process of a test."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from cluster.fanout import fan_out
from cluster.partial_commits import compute_rows
from cluster.shards import Shards
from cluster.stage import Stage
from montessori_core.config import Cluster, Resources
from montessori_core.data.rows import Rows
from montessori_core.files import read_json
from montessori_core.layout import LOG_FILE
from montessori_core.program import Compute, Program, Report, Row, RowProgram, SettingsT


def as_compute(opened: Compute[Any] | RowProgram[Any]) -> Compute[Any]:
    """Return a function that computes a full shard of a row program without interruption."""
    program = cast(RowProgram[Any], opened)

    def compute(rows: list[Row], output: Path, report: Report) -> None:
        compute_rows(program, rows, output.parent / f"{output.name}.partial", 0, "key", output, report)

    return compute


def as_shards(*shards: Sequence[Mapping[str, object]]) -> Shards:
    """Shards of these rows; all but the last have as many."""
    cut = Shards(Rows.of([row for shard in shards for row in shard]), len(shards[0]))
    assert [len(table) for table in cut] == [len(shard) for shard in shards]
    return cut


def run_in_job(
    folder: Path,
    program: Program[SettingsT],
    settings: SettingsT,
    inputs: Mapping[str, Path],
    rows: list[Row],
    processes: int = 1,
    cpus: int = 1,
) -> Path:
    """Compute all rows in one local job, whose processes have so many CPUs; return the part."""
    stage = Stage.of(program, settings, folder, inputs, {})
    resources = Resources(processes_per_node=processes, cpus_per_process=cpus)
    (part,) = fan_out(stage, as_shards(rows), resources, Cluster())
    return part


def logged(part: Path, name: str) -> list[float]:
    """Return what a training logged under a name, at each step."""
    return [entry[name] for entry in read_json(part / LOG_FILE)]


class Interrupted(Exception):
    """The end of a job."""


def interrupt_at(rows: int) -> Report:
    """Return a report that ends the job once `rows` rows are done."""

    def report(done: float) -> None:
        if done >= rows:
            raise Interrupted

    return report
