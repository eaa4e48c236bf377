"""Run row programs in the process of a test."""

from pathlib import Path
from typing import cast

from cluster.partial_commits import compute_rows
from montessori_core.program import Compute, Report, Row, RowProgram


def as_compute(opened: Compute | RowProgram) -> Compute:
    """Return a function that computes a full shard of a row program without interruption."""
    program = cast(RowProgram, opened)

    def compute(rows: list[Row], output: Path, report: Report) -> None:
        compute_rows(program, rows, output.parent / f"{output.name}.partial", 0, "key", output, report)

    return compute


class Interrupted(Exception):
    """The end of a job."""


def interrupt_at(rows: int) -> Report:
    """Return a report that ends the job once `rows` rows are done."""

    def report(done: float) -> None:
        if done >= rows:
            raise Interrupted

    return report
