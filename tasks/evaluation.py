"""Evaluation of a model: held-out loss and the configured benchmarks."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from montessori_core import programs
from montessori_core.data.sources import load_tasks
from montessori_core.data.tables import REFERENCE_LOSS, read_table
from montessori_core.evaluation.statistics import mean_and_error
from tasks.benchmarks import BenchmarkResult, measure_benchmarks
from tasks.run import Model
from tasks.stage import Step


@dataclass(frozen=True)
class StudentEvaluation:
    """Results of evaluating a student.

    Attributes:
        losses: table of held-out losses, schema `REFERENCE_LOSS`.
        benchmarks: scores and answers.
    """

    losses: Path
    benchmarks: BenchmarkResult


def evaluate(step: Step, model: Model) -> StudentEvaluation:
    """Evaluate a model. Call `tasks.benchmarks.list_items` first."""
    return StudentEvaluation(measure_loss(step, model), measure_benchmarks(step.beside("benchmarks"), model))


def measure_loss(step: Step, model: Model) -> Path:
    """Measure a model's loss on each held-out example; return the table."""
    experiment = step.experiment
    settings = programs.ModelLoss(
        max_length=experiment.student.max_length, batch_tokens=experiment.influence.reference_batch_tokens
    )
    measuring = step.renamed(f"{step.label}: held-out loss")
    rows = [vars(task) for task in load_tasks(step.run.source_file("evaluation"))]
    (table,) = measuring.execute(programs.REFERENCE_LOSS, settings, rows, models={"model": model})
    return table


def per_token(losses: pa.Table) -> npt.NDArray[np.float64]:
    """Return the [examples] losses in nats per token of a table of schema `REFERENCE_LOSS`."""
    mean: npt.NDArray[np.float64] = losses["loss"].to_numpy() / losses["response_tokens"].to_numpy()
    return mean


def summarize_loss(table: Path) -> dict[str, float]:
    """Return the mean over examples of the loss per token (Eq. 2) and its standard error."""
    return _summarize(per_token(read_table(table, REFERENCE_LOSS)))


def summarize_gain(before: Path, after: Path) -> dict[str, float]:
    """Return the paired difference of two models' losses (positive: `after` is better) and its standard error."""
    first, second = (read_table(table, REFERENCE_LOSS) for table in (before, after))
    return _summarize((first["loss"].to_numpy() - second["loss"].to_numpy()) / first["response_tokens"].to_numpy())


def _summarize(values: npt.NDArray[np.float64]) -> dict[str, float]:
    return dict(zip(("mean", "standard_error"), mean_and_error(values), strict=True))
