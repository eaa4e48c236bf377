"""Measure the influence of any data on any student, without a run."""

import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa

from cluster.fanout import fan_out
from cluster.lock import only_driver
from cluster.records import Description, read_record
from cluster.shards import Shards, cut_for_jobs
from cluster.stage import Stage
from montessori_core import programs
from montessori_core.config import Cluster, DataSource, Influence, Student, Warmup
from montessori_core.data.bad_rows import BadRow, write_bad_rows
from montessori_core.data.rows import ExampleRow, Positions, Rows, TaskRow
from montessori_core.data.sources import Task, TaskReader, read_tasks, write_tasks
from montessori_core.data.tables import INFLUENCE, name_of_table, open_parquet, write_table
from montessori_core.data.task_tables import task_rows, write_task_rows
from montessori_core.errors import ConfigError, DataError, UserError
from montessori_core.files import commit, hash_path
from montessori_core.influence.stored_steps import estimate_from_steps
from montessori_core.influence.table import join_influence
from montessori_core.layout import CONFIG, DRIVER_LOCK, MOMENTS_FILE
from montessori_core.models.fingerprints import moments_recipe
from montessori_core.models.thinking import thinking_warning
from montessori_core.program import Program, SettingsT
from tasks.progress import ProgressBar
from tasks.resume import command_of, record_command
from tasks.run import Model, stage_of
from tasks.screening import estimate_influence
from tasks.students import check_student, open_student

log = logging.getLogger(__name__)

_SHARD = 16  # examples; more if there would be too many shards
_MOST_SHARDS = 8192
_EXAMPLES, _REFERENCE = "examples.parquet", "reference.jsonl"
_MAX_LENGTH = "max_length"  # the setting's name in errors


@dataclass(frozen=True)
class Store:
    """Projected steps of examples, kept for other reference sets.

    Attributes:
        folder: where they are.
        numbers: about how many numbers of a step are kept.
    """

    folder: Path
    numbers: int


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
        store: where steps are kept; None: they are not.
    """

    student: Student
    warm_state: Path | None
    examples: DataSource
    reference: DataSource
    settings: Influence
    baseline: str
    cluster: Cluster
    store: Store | None = None


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

    @property
    def adamw(self) -> dict[str, float]:
        """AdamW's settings of the steps that left the moments; empty if there are none, or they do not say."""
        moments = self.models.get("moments")
        return moments_recipe(Path(moments.path)) if moments else {}


def measure_influence(measurement: Measurement, out: Path, command: Sequence[str]) -> None:
    """Measure every example and write the table to `out`.

    Finished shards are kept in a folder next to `out`, so that the measurement can be resumed.

    Args:
        measurement: what is measured.
        out: the table.
        command: words after `montessori` of the command that resumes it.

    Raises:
        UserError: an option, a file or the model is invalid; the message names it. Or another process measures to `out`.
    """
    if measurement.settings.sequential is not None and measurement.baseline == "median":
        raise ConfigError(
            "--sequential decides signs one by one, but --baseline median has no threshold until all are measured"
        )
    if measurement.store is not None:
        _check_store_settings(measurement.settings)
    _check_out(out)
    folder = out.with_name(out.name + ".parts").resolve()
    with opened_inputs(measurement, folder) as inputs, _opened_store(measurement.store):
        record_command(folder, command, measurement.student.model, out, measurement.cluster)
        stages = MeasurementStages(folder, measurement, inputs)
        write_table(estimate_influence(stages, measurement.settings, measurement.baseline), out, INFLUENCE)


def _check_out(out: Path) -> None:
    """Raise a UserError if a file is there that is no influence table: nothing else is overwritten."""
    if not (out.exists() or out.is_symlink()):
        return
    with suppress(DataError), open_parquet(out) as file:
        if name_of_table(file.schema_arrow) == name_of_table(INFLUENCE):
            return
    raise UserError(f"--out {out}: exists, and is no influence table; nothing is overwritten: name another file")


def _check_store_settings(settings: Influence) -> None:
    """Raise a ConfigError if steps that are measured with these settings cannot be kept for another reference set."""
    estimator = settings.screening.estimator if settings.estimator == "screened" else settings.estimator
    if estimator != "first_order":
        name = "screen" if settings.estimator == "screened" else "estimator"
        raise ConfigError(
            f"--store keeps AdamW's own steps, which --{name} {estimator} does not take; leave out --{name}"
        )
    if settings.weight_per == "token":
        raise ConfigError(
            "--store keeps steps for any reference set, but with --weight-per token they depend on the responses of the "
            "reference set; use --weight-per example"
        )


@contextmanager
def _opened_store(store: Store | None) -> Iterator[None]:
    """Create the folder of a store if it does not exist, and hold its lock.

    Raises:
        UserError: another process fills it, or the folder holds something else.
    """
    if store is None:
        yield
        return
    folder = store.folder
    if folder.exists() and not (folder / "stage.json").exists() and any(folder.iterdir()):
        raise DataError(f"--store {folder}: the folder holds something else; give another one")
    folder.mkdir(parents=True, exist_ok=True)
    with only_driver(folder):
        yield


def _check_store(stage: Stage, rows: Rows) -> None:
    """Raise a DataError if the folder of a stage holds steps of other examples, of another student or of other settings."""
    kept = read_record(stage.folder / "stage.json", Description)
    if kept is None:
        return
    now, before = ({**settings["step"], **settings, "step": None} for settings in (stage.settings, kept.settings))
    differences = [f"{name} {before.get(name)}, not {now.get(name)}" for name in now if now[name] != before.get(name)]
    differences += [f"another {name}" for name, key in stage.input_hashes.items() if kept.input_hashes.get(name) != key]
    differences += ["no moments"] if kept.input_hashes.keys() - stage.input_hashes.keys() else []
    differences += [] if stage.version == kept.version else ["another version of Montessori"]
    differences += [] if stage.holds(rows) else ["other examples"]
    if differences:
        raise DataError(
            f"--store {stage.folder}: it holds the steps of {'; '.join(differences)}; give another folder, or remove this one"
        )


@contextmanager
def opened_inputs(measurement: Measurement, folder: Path, bad_rows: Sequence[BadRow] = ()) -> Iterator[Inputs]:
    """Read the files and find the models of a measurement; create its folder, and hold the folder's lock.

    Rows that are left out are listed in the folder, after `bad_rows`, those of a set that was read before.

    Raises:
        UserError: a file or the model is invalid; the message names it. Or another process measures in the folder.
    """
    is_run = (folder / CONFIG).exists()
    ours = (folder / DRIVER_LOCK).exists() or command_of(folder) is not None  # a user may have removed the lock
    if folder.exists() and (is_run or not ours) and any(folder.iterdir()):
        raise UserError(
            f"{folder}: the folder holds something else; nothing is overwritten: name another one with --out"
        )
    left_out = list(bad_rows)
    with TemporaryDirectory() as scratch:  # the folder is created when all inputs are valid
        examples = Path(scratch) / _EXAMPLES
        _write_examples(measurement.examples, examples, left_out)
        reference = _check_other_inputs(measurement, left_out)
        folder.mkdir(parents=True, exist_ok=True)
        with only_driver(folder):  # before the copies are written: jobs of another process may be reading them
            with commit(folder / _EXAMPLES) as copy:
                shutil.copyfile(examples, copy)
            examples.unlink()
            write_bad_rows(left_out, folder)
            write_tasks(reference, folder / _REFERENCE)
            rows = task_rows(folder / _EXAMPLES, ExampleRow)
            for name, tasks in (("examples", _tasks_of(rows)), ("reference", reference)):
                for warning in thinking_warning(name, tasks):
                    log.warning(warning)
            yield Inputs(rows, reference, _open_models(measurement, folder), {"reference": folder / _REFERENCE})


def _tasks_of(rows: Rows) -> Iterator[Task]:
    """Yield the rows as tasks, with a few of them in memory."""
    for table in rows.tables():
        for row in table.to_pylist():
            yield Task.of(row | {"unfinished": not row["response_finished"]})


def _write_examples(source: DataSource, path: Path, bad_rows: list[BadRow]) -> None:
    """Write the rows of examples to a table; `bad_rows` takes those that are left out."""
    reader = TaskReader(source, "examples", with_response=True)
    write_task_rows(reader, path, ExampleRow, _example_row)
    reader.report(bad_rows)


def _example_row(task: Task) -> ExampleRow:
    return {**task.to_training_row(), "example_id": task.example_id, "prompt_id": task.example_id}


def _check_other_inputs(measurement: Measurement, bad_rows: list[BadRow]) -> list[Task]:
    """Check the models of a measurement and read its reference set; `bad_rows` takes the rows that are left out."""
    warm_state = measurement.warm_state
    if warm_state is not None and not (warm_state / MOMENTS_FILE).exists():
        raise DataError(f"--warm-state {warm_state}: no {MOMENTS_FILE} there; name the folder of a warm student")
    check_student(measurement.student, _MAX_LENGTH)
    return read_tasks(measurement.reference, "reference", True, bad_rows)


def _open_models(measurement: Measurement, folder: Path) -> dict[str, Model]:
    """Return the models of a measurement; links to a student with a configured chat template are in its folder."""
    models = {"student": open_student(measurement.student, folder, _MAX_LENGTH)}
    if measurement.warm_state is not None:
        warm_state = measurement.warm_state.resolve()
        models["moments"] = Model(str(warm_state), hash_path(warm_state / MOMENTS_FILE))
    return models


class MeasurementStages:
    """The stages of a measurement, each in its folder."""

    def __init__(self, folder: Path, measurement: Measurement, inputs: Inputs) -> None:
        self._folder, self._measurement, self._inputs = folder, measurement, inputs
        self._rows_per_shard = max(_SHARD, math.ceil(len(inputs.rows) / _MOST_SHARDS))

    def measure_all(self, estimator: str) -> pa.RecordBatchReader:
        screened = self._measurement.settings.estimator == "screened"
        if self._measurement.store is not None:
            return self._estimate_from_store(self._measurement.store)
        return self._execute("screen" if screened else estimator, estimator, self._inputs.rows)

    def measure_exactly(self, name: str, positions: Positions) -> pa.RecordBatchReader:
        return self._execute(name, "exact", self._inputs.rows[positions])

    def _settings(self, estimator: str) -> programs.InfluenceMeasurement:
        measurement, warmup = self._measurement, Warmup.model_validate(self._inputs.adamw)
        return programs.measurement_settings(
            measurement.settings, warmup, measurement.student.max_length, estimator, measurement.baseline
        )

    def _execute(self, name: str, estimator: str, rows: Rows) -> pa.RecordBatchReader:
        return join_influence(
            compute_parts(
                self._folder / name,
                programs.INFLUENCE,
                self._settings(estimator),
                rows,
                self._inputs,
                self._measurement.cluster,
                self._rows_per_shard,
            )
        )

    def _estimate_from_store(self, store: Store) -> pa.RecordBatchReader:
        settings, inputs = self._settings("first_order"), replace(self._inputs, files={})
        cluster, tasks = self._measurement.cluster, Rows.of([vars(task) for task in inputs.reference], TaskRow)
        steps = programs.StepProjection(
            **settings.model_dump(include={"max_length", "dtype", "state_dtype", "step"}), numbers=store.numbers
        )
        reference = programs.ReferenceProjection(
            **dict(steps),
            reference_reduction=settings.reference_reduction,
            reference_batch_tokens=settings.reference_batch_tokens,
        )
        _check_store(stage_of(programs.STEPS, steps, store.folder, inputs.models, {}), inputs.rows)
        kept = compute_parts(store.folder, programs.STEPS, steps, inputs.rows, inputs, cluster, self._rows_per_shard)
        (projected,) = compute_parts(
            self._folder / "reference", programs.REFERENCE_PROJECTION, reference, tasks, inputs, cluster
        )
        return estimate_from_steps(kept, projected)


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
