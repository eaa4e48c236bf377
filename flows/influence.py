"""Measure the influence of any data on any student, without a run."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from cluster.fanout import fan_out
from cluster.shards import Shards
from montessori_core import programs
from montessori_core.config import Cluster, DataSource, Influence, Resources, Student, Warmup
from montessori_core.data.rows import ExampleRow, Positions, Rows
from montessori_core.data.sources import read_tasks, write_tasks
from montessori_core.data.tables import INFLUENCE, write_table
from montessori_core.errors import ConfigError, DataError
from montessori_core.files import hash_path
from montessori_core.influence.table import join_influence
from montessori_core.layout import MOMENTS_FILE
from montessori_core.models.fetch import fetch_model
from tasks.progress import ProgressBar
from tasks.run import Model, stage_of
from tasks.screening import estimate_influence

_SHARD = 16  # examples


@dataclass(frozen=True)
class Measurement:
    """A measurement of influence.

    Attributes:
        student: model whose loss is measured.
        warm_state: folder with AdamW's moments of the student; None: the step is AdamW's first.
        examples: examples to measure.
        reference: reference set.
        settings: settings of the estimator and its step.
        baseline: baseline of helping, see `config.Preferences`.
    """

    student: Student
    warm_state: Path | None
    examples: DataSource
    reference: DataSource
    settings: Influence
    baseline: str


def measure_influence(measurement: Measurement, out: Path) -> None:
    """Measure every example and write the table to `out`.

    Finished shards are kept in a folder next to `out`, so that the measurement can be resumed.

    Raises:
        UserError: an option, a file or the model is invalid; the message names it.
    """
    student, settings, warm_state = measurement.student, measurement.settings, measurement.warm_state
    if settings.sequential is not None and measurement.baseline == "median":
        raise ConfigError(
            "--sequential decides signs one by one, but --baseline median has no threshold until all are measured"
        )
    tasks = read_tasks(measurement.examples, "examples", with_response=True)
    if warm_state is not None and not (warm_state / MOMENTS_FILE).exists():
        raise DataError(f"--warm-state {warm_state}: no {MOMENTS_FILE} there; name the folder of a warm student")
    model = fetch_model(student.model, student.revision)
    folder = out.with_name(out.name + ".parts").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    reference_file = folder / "reference.jsonl"
    write_tasks(read_tasks(measurement.reference, "reference", with_response=True), reference_file)

    models = {"student": Model.of(model)}
    if warm_state is not None:
        models["moments"] = Model(str(warm_state.resolve()), hash_path(warm_state / MOMENTS_FILE))
    rows = [vars(task) | {"prompt_id": task.example_id, "response_finished": True} for task in tasks]
    stages = _Stages(folder, measurement, models, reference_file, Rows.of(rows, ExampleRow))
    write_table(estimate_influence(stages, settings, measurement.baseline), out, INFLUENCE)


class _Stages:
    """The stages of a measurement on this machine, each in its folder."""

    def __init__(
        self, folder: Path, measurement: Measurement, models: dict[str, Model], reference: Path, rows: Rows
    ) -> None:
        self._folder, self._measurement, self._rows = folder, measurement, rows
        self._models, self._files = models, {"reference": reference}

    def measure_all(self, estimator: str) -> pa.RecordBatchReader:
        screened = self._measurement.settings.estimator == "screened"
        return self._execute("screen" if screened else estimator, estimator, self._rows)

    def measure_exactly(self, name: str, positions: Positions) -> pa.RecordBatchReader:
        return self._execute(name, "exact", self._rows[positions])

    def _execute(self, name: str, estimator: str, rows: Rows) -> pa.RecordBatchReader:
        measurement = self._measurement
        settings = programs.measurement_settings(
            measurement.settings, Warmup(), measurement.student.max_length, estimator, measurement.baseline
        )
        stage = stage_of(programs.INFLUENCE, settings, self._folder / name, self._models, self._files)
        with ProgressBar(f"influence, {name}") as bar:
            parts = fan_out(stage, Shards(rows, _SHARD), Resources(), Cluster(), bar.show)
        return join_influence(parts)
