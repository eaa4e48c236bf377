"""Measure the influence of any data on any student, without a run."""

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa

from cluster.fanout import fan_out
from cluster.lock import only_driver
from cluster.shards import Shards, cut_for_jobs
from montessori_core import programs
from montessori_core.config import Cluster, DataSource, Influence, Student, Warmup
from montessori_core.data.bad_rows import BadRow, write_bad_rows
from montessori_core.data.rows import ExampleRow, Positions, Rows, optional_fields, schema_of
from montessori_core.data.sources import Task, TaskReader, read_tasks, write_tasks
from montessori_core.data.tables import INFLUENCE, ROW_GROUP, write_table
from montessori_core.errors import ConfigError, DataError
from montessori_core.files import commit, hash_path
from montessori_core.influence.table import join_influence
from montessori_core.layout import MOMENTS_FILE
from montessori_core.models.thinking import thinking_warning
from montessori_core.program import Program, SettingsT
from tasks.progress import ProgressBar
from tasks.run import Model, stage_of
from tasks.screening import estimate_influence
from tasks.students import open_student

log = logging.getLogger(__name__)

_SHARD = 16  # examples
_EXAMPLES = "examples.parquet"


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
        cluster: where jobs run.
    """

    student: Student
    warm_state: Path | None
    examples: DataSource
    reference: DataSource
    settings: Influence
    baseline: str
    cluster: Cluster


@dataclass(frozen=True)
class Inputs:
    """Inputs of a measurement.

    Attributes:
        rows: examples to measure, as rows of a program; read from a file, since they may be many.
        reference: the reference set.
        models: `student`, and `moments` if it is warm.
        files: `reference`, a copy of the reference set.
    """

    rows: Rows
    reference: list[Task]
    models: Mapping[str, Model]
    files: Mapping[str, Path]

    @property
    def examples(self) -> list[Task]:
        """The examples as tasks, in memory."""
        return list(_tasks_of(self.rows))


def measure_influence(measurement: Measurement, out: Path) -> None:
    """Measure every example and write the table to `out`.

    Finished shards are kept in a folder next to `out`, so that the measurement can be resumed.

    Raises:
        UserError: an option, a file or the model is invalid; the message names it. Or another process measures to `out`.
    """
    if measurement.settings.sequential is not None and measurement.baseline == "median":
        raise ConfigError(
            "--sequential decides signs one by one, but --baseline median has no threshold until all are measured"
        )
    folder = out.with_name(out.name + ".parts").resolve()
    stages = MeasurementStages(folder, measurement, open_inputs(measurement, folder))
    with only_driver(folder):
        write_table(estimate_influence(stages, measurement.settings, measurement.baseline), out, INFLUENCE)


def open_inputs(measurement: Measurement, folder: Path, bad_rows: Sequence[BadRow] = ()) -> Inputs:
    """Read the files and find the models of a measurement; create its folder.

    Rows that are left out are listed in the folder, after `bad_rows`, those of a set that was read before.

    Raises:
        UserError: a file or the model is invalid; the message names it.
    """
    left_out = list(bad_rows)
    with TemporaryDirectory() as scratch:  # the folder is created when all inputs are valid
        examples = Path(scratch) / _EXAMPLES
        _write_examples(measurement.examples, examples, left_out)
        models, reference = _other_inputs(measurement, folder, left_out)
        folder.mkdir(parents=True, exist_ok=True)
        with commit(folder / _EXAMPLES) as copy:
            shutil.copyfile(examples, copy)
    write_bad_rows(left_out, folder)
    file = folder / "reference.jsonl"
    write_tasks(reference, file)
    rows = Rows.of_file(folder / _EXAMPLES, schema_of(ExampleRow, optional_fields(ExampleRow)), ExampleRow)
    for name, tasks in (("examples", _tasks_of(rows)), ("reference", reference)):
        for warning in thinking_warning(name, tasks):
            log.warning(warning)
    return Inputs(rows, reference, models, {"reference": file})


def _tasks_of(rows: Rows) -> Iterator[Task]:
    """Yield the rows as tasks, with a few of them in memory."""
    for table in rows.tables():
        for row in table.to_pylist():
            yield Task.of(row)


def _write_examples(source: DataSource, path: Path, bad_rows: list[BadRow]) -> None:
    """Write the rows of examples to a table, with a few of them in memory."""
    reader = TaskReader(source, "examples", with_response=True)

    def batches() -> Iterator[pa.RecordBatch]:
        tasks = iter(reader)
        while chunk := list(islice(tasks, ROW_GROUP)):
            rows = [vars(task) | {"prompt_id": task.example_id, "response_finished": True} for task in chunk]
            for table in Rows.of(rows, ExampleRow).tables():
                # A chunk without conversations lacks their column.
                yield from pa.concat_tables([schema.empty_table(), table], promote_options="default").to_batches()

    schema = schema_of(ExampleRow, optional_fields(ExampleRow))
    write_table(pa.RecordBatchReader.from_batches(schema, batches()), path, schema)
    reader.report(bad_rows)


def _other_inputs(
    measurement: Measurement, folder: Path, bad_rows: list[BadRow]
) -> tuple[dict[str, Model], list[Task]]:
    """Find the models of a measurement and read its reference set; `bad_rows` takes the rows that are left out."""
    warm_state = measurement.warm_state
    if warm_state is not None and not (warm_state / MOMENTS_FILE).exists():
        raise DataError(f"--warm-state {warm_state}: no {MOMENTS_FILE} there; name the folder of a warm student")
    models = {"student": open_student(measurement.student, folder, "max_length")}
    if warm_state is not None:
        models["moments"] = Model(str(warm_state.resolve()), hash_path(warm_state / MOMENTS_FILE))
    return models, read_tasks(measurement.reference, "reference", True, bad_rows)


class MeasurementStages:
    """The stages of a measurement, each in its folder."""

    def __init__(self, folder: Path, measurement: Measurement, inputs: Inputs) -> None:
        self._folder, self._measurement, self._inputs = folder, measurement, inputs

    def measure_all(self, estimator: str) -> pa.RecordBatchReader:
        screened = self._measurement.settings.estimator == "screened"
        return self._execute("screen" if screened else estimator, estimator, self._inputs.rows)

    def measure_exactly(self, name: str, positions: Positions) -> pa.RecordBatchReader:
        return self._execute(name, "exact", self._inputs.rows[positions])

    def _execute(self, name: str, estimator: str, rows: Rows) -> pa.RecordBatchReader:
        measurement = self._measurement
        settings = programs.measurement_settings(
            measurement.settings, Warmup(), measurement.student.max_length, estimator, measurement.baseline
        )
        return join_influence(
            compute_parts(
                self._folder / name, programs.INFLUENCE, settings, rows, self._inputs, measurement.cluster, _SHARD
            )
        )


def compute_parts(
    folder: Path,
    program: Program[SettingsT],
    settings: SettingsT,
    rows: Rows,
    inputs: Inputs,
    cluster: Cluster,
    rows_per_shard: int | None = None,
) -> list[Path]:
    """Compute the rows of a program on the inputs' models and files; return the parts, in the order of the rows.

    Args:
        folder: folder of the stage.
        program, settings, rows: what is computed.
        inputs: models and files that the program reads.
        cluster: where jobs run.
        rows_per_shard: maximum number of rows of a shard; None: all rows are one shard.
    """
    resources = getattr(cluster.resources, program.kind)
    stage = stage_of(program, settings, folder, inputs.models, inputs.files)
    if rows_per_shard:
        shards = cut_for_jobs(folder, rows, resources.parallel_jobs, rows_per_shard)
    else:
        shards = Shards(rows, len(rows))
    with ProgressBar(f"{program.name}, {folder.name}") as bar:
        return fan_out(stage, shards, resources, cluster, bar.show)
