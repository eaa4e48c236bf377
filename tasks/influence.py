"""Local data influence (Section 3.2): measure shards of examples, and join their tables."""

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
from prefect import task
from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from montessori_core import programs
from montessori_core.config import Experiment
from montessori_core.data.rows import ExampleRow, Positions, Rows
from montessori_core.data.tables import EXAMPLES, INFLUENCE, read_table, write_table
from montessori_core.export.markdown import escape
from montessori_core.export.markdown import table as markdown_table
from montessori_core.influence.pilot import measure_after_pilot
from montessori_core.influence.preferences import threshold_of
from montessori_core.influence.screening import screening_report
from montessori_core.influence.table import (
    SUMMARIZED,
    describe_influence,
    influence_warnings,
    join_influence,
    summarize_influence,
)
from montessori_core.models.fingerprints import moments_fingerprint, moments_recipe
from tasks.plots import histogram
from tasks.run import Model
from tasks.screening import estimate_influence
from tasks.stage import Step, warn


def collect_influence(step: Step, student: Model, examples: Path, first: int, last: int, paired: bool = False) -> Path:
    """Measure rows `first` to `last` of an example table; write a table beside the step's folder, with its name.

    If the rows are to be `paired`, a pilot is measured first, which warns of too few pairs.
    """
    baseline = step.experiment.preferences.baseline
    stages = _Stages(step, student, examples, Rows.of_file(examples, EXAMPLES, ExampleRow, first, last), paired)
    joined = estimate_influence(stages, step.experiment.influence, baseline)
    table = step.folder.with_name(f"{step.folder.name}.parquet")
    return _join(f"{step.label}: table", joined, table, baseline, stages.parts, stages.warnings)


class _Stages:
    """Stages that measure rows of an example table on a student.

    Attributes:
        parts: of all stages so far.
        warnings: so far.
    """

    def __init__(self, step: Step, student: Model, examples: Path, rows: Rows, paired: bool) -> None:
        self._step, self._examples, self._rows, self._paired = step, examples, rows, paired
        folder = Path(student.path)
        self._models = {"student": student, "moments": Model(student.path, moments_fingerprint(folder))}
        self._adamw = moments_recipe(folder)
        self.parts: list[Path] = []
        self.warnings: list[str] = []

    def measure_all(self, estimator: str) -> pa.RecordBatchReader:
        step, pilot = self._step, self._step.beside("pilot", ", pilot")
        if self._step.experiment.influence.estimator == "screened":
            step = step.renamed(f"{step.label}, screen")
        if not self._paired:
            return join_influence(self._execute(step, estimator, self._rows))
        parts = measure_after_pilot(
            self._rows,
            lambda rows, is_pilot: self._execute(pilot if is_pilot else step, estimator, rows),
            self._step.experiment.preferences,
            self._warn,
        )
        return join_influence(parts)

    def measure_exactly(self, name: str, positions: Positions) -> pa.RecordBatchReader:
        step = self._step.beside(name, f", {name}")
        return join_influence(self._execute(step, "exact", self._rows[positions]))

    def _execute(self, step: Step, estimator: str, rows: Rows) -> list[Path]:
        parts = step.execute(
            programs.INFLUENCE,
            influence_settings(step.experiment, estimator, self._adamw),
            rows,
            step.experiment.influence.examples_per_shard,
            models=self._models,
            files={"reference": step.run.source_file("reference")},
            upstream=[self._examples, *self.parts[:1]],
        )
        self.parts.extend(parts)
        return parts

    def _warn(self, warning: str) -> None:
        self.warnings.append(warning)
        warn(self._step.label, warning)


@task(task_run_name="{label}", cache_policy=NO_CACHE, persist_result=False)
def _join(
    label: str, joined: pa.RecordBatchReader, table: Path, baseline: str, parts: list[Path], warnings: list[str]
) -> Path:
    """Write the joined table, and publish its summary."""
    write_table(joined, table, INFLUENCE)
    written = read_table(table, INFLUENCE, SUMMARIZED)
    threshold = threshold_of(written, baseline)
    summary = summarize_influence(written, threshold)
    of_table = influence_warnings(summary)
    for warning in of_table:
        warn(label, warning)
    screening = screening_report(written)
    lines = [*describe_influence(summary, baseline), *(screening.describe() if screening else ())]
    _publish(label, lines, [*warnings, *of_table])
    values = written["influence_student"].drop_null().to_numpy()
    if len(values):
        title = f"Influence of {len(values)} examples; right of the line they help"
        create_image_artifact(histogram(values, threshold, title), description=label)
    return table


def influence_settings(
    experiment: Experiment, estimator: str, adamw: Mapping[str, float]
) -> programs.InfluenceMeasurement:
    """Return the settings of a measurement.

    Args:
        experiment: the step has the peak rate of its warm-up, unless `influence` sets another.
        estimator: 'exact', 'first_order' or 'linear'.
        adamw: AdamW's settings of the steps that left the student's moments, see `moments_recipe`. A student of a later
            iteration has no warm-up.
    """
    return programs.measurement_settings(
        experiment.influence,
        experiment.warmup.model_copy(update=adamw),
        experiment.student.max_length,
        estimator,
        experiment.preferences.baseline,
    )


def _publish(label: str, lines: list[tuple[str, str]], warnings: list[str]) -> None:
    notes = "".join(f"\n**Warning**: {escape(warning)}\n" for warning in warnings)
    create_markdown_artifact(f"### {label}\n\n{markdown_table(('', ''), lines)}{notes}", description=label)
