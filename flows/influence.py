"""Measure the influence of any data on any student, without a run."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.fanout import fan_out
from cluster.lock import only_driver
from cluster.records import Description, read_record
from cluster.shards import Shards, cut_for_jobs
from cluster.stage import Stage
from flows.measurement import Inputs, Measurement, Store, names_of_targets, opened_inputs, tasks_of
from montessori_core import programs
from montessori_core.config import Cluster, Influence, Warmup
from montessori_core.data.rows import Positions, Rows, TaskRow
from montessori_core.data.tables import INFLUENCE, name_of_table, open_parquet, write_table
from montessori_core.errors import ConfigError, DataError, UserError
from montessori_core.influence.stored_steps import estimate_from_steps
from montessori_core.influence.table import ExamplesHash, join_influence, join_target, with_examples
from montessori_core.layout import CONFIG, DRIVER_LOCK
from montessori_core.program import Program, SettingsT
from tasks.progress import ProgressBar
from tasks.resume import STUDY, command_of, record_command, remove_stale
from tasks.run import stage_of
from tasks.screening import estimate_influence

log = logging.getLogger(__name__)

_SHARD = 16  # examples; more if there would be too many shards
_MOST_SHARDS = 8192
_JOINT = "targets"  # folder of the stage on several reference sets


def measure_influence(measurement: Measurement, out: Path, command: Sequence[str]) -> list[Path]:
    """Measure every example, write the table to `out`, and return the tables: with several reference sets, one for each.

    Finished shards are kept in a folder next to `out`, so that the measurement can be resumed.

    Args:
        measurement: what is measured.
        out: the table; see `tables_of`.
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
    if measurement.targets and measurement.settings.weight_per == "token":
        raise ConfigError(
            "--weight-per token depends on the responses of the reference set; with several, use --weight-per example, or "
            "measure on one at a time"
        )
    sources = [measurement.reference, *measurement.targets]
    for source in sources:
        if sources.count(source) > 1:
            raise UserError(f"--reference {source.path}: given twice; name each set once")
    tables = tables_of(measurement, out)
    for table in tables:
        _check_out(table)
    folder = out.with_name(out.name + ".parts").resolve()
    with opened_inputs(measurement, folder) as inputs, _opened_store(measurement.store):
        if measurement.store is not None:
            MeasurementStages(folder, measurement, inputs).check_store(measurement.store)
        examples = ExamplesHash(tasks_of(inputs.rows))
        unused = _folders_of_earlier_sets(folder, measurement)
        remove_stale(folder, _decides(measurement, inputs), tables)
        last = next((table for table in reversed(tables) if not table.exists()), tables[-1])  # written in order
        record_command(folder, command, measurement.student.model, last, measurement.cluster, unused)
        for number, (target, table) in enumerate(zip(inputs.targets, tables, strict=True)):
            of_target = folder / _folder_on(target.name) if measurement.targets else folder
            joint = JointStage(folder / _JOINT, number) if measurement.targets else None
            stages = MeasurementStages(of_target, measurement, inputs.on(target), joint)
            measured = estimate_influence(stages, measurement.settings, measurement.baseline)
            write_table(with_examples(measured, examples), table, INFLUENCE)
    return tables


def _decides(measurement: Measurement, inputs: Inputs) -> dict[str, Any]:
    """Return the settings and hashes of inputs that decide the tables of a measurement."""
    return {
        "settings": measurement.settings.model_dump(mode="json", exclude_none=True),
        "baseline": measurement.baseline,
        "max_length": measurement.student.max_length,
        "numbers": measurement.store.numbers if measurement.store else None,
        "inputs": inputs.hashes,
    }


def tables_of(measurement: Measurement, out: Path) -> list[Path]:
    """Return the tables of a measurement: `out`, or with several reference sets 'OUT-NAME.parquet' for each."""
    if not measurement.targets:
        return [out]
    return [out.with_name(f"{out.stem}-{name}{out.suffix}") for name in names_of_targets(measurement)]


def _folder_on(target: str) -> str:
    """Return the name of the folder with the stages on one of several reference sets."""
    return f"on-{target}"


def _folders_of_earlier_sets(folder: Path, measurement: Measurement) -> list[str]:
    """Return the names of folders that a measurement on other reference sets has left."""
    names = [path.name for path in sorted(folder.iterdir()) if path.is_dir()]
    if not measurement.targets:
        return [name for name in names if name == _JOINT or name.startswith(_folder_on(""))]
    return [name for name in names if name not in (_JOINT, *map(_folder_on, names_of_targets(measurement)))]


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
    begun = any((folder / name).exists() for name in ("stage.json", DRIVER_LOCK))  # the lock alone: interrupted early
    other = any((folder / name).exists() for name in (CONFIG, STUDY)) or command_of(folder) is not None
    if folder.exists() and (other or not begun) and any(folder.iterdir()):
        raise DataError(f"--store {folder}: the folder holds something else; give another one")
    folder.mkdir(parents=True, exist_ok=True)
    with only_driver(folder):
        yield


def _check_store(stage: Stage, rows: Rows) -> None:
    """Raise a DataError if the folder of a stage holds steps of other examples, of another student or of other settings."""
    kept = read_record(stage.folder / "stage.json", Description)
    if kept is None:
        return
    recorded = {"state_dtype": "float32", **kept.settings}  # a store made before this setting
    now, before = ({**settings["step"], **settings, "step": None} for settings in (stage.settings, recorded))
    differences = [f"{name} {before.get(name)}, not {now.get(name)}" for name in now if now[name] != before.get(name)]
    differences += [f"another {name}" for name, key in stage.input_hashes.items() if kept.input_hashes.get(name) != key]
    differences += ["no moments"] if kept.input_hashes.keys() - stage.input_hashes.keys() else []
    differences += [] if stage.version == kept.version else ["another version of Montessori"]
    differences += [] if stage.holds(rows) else ["other examples"]
    if differences:
        raise DataError(
            f"--store {stage.folder}: it holds the steps of {'; '.join(differences)}; give another folder, or remove this one"
        )


@dataclass(frozen=True)
class JointStage:
    """The folder of a stage on all reference sets, and the number of one of them."""

    folder: Path
    number: int


class MeasurementStages:
    """The stages of a measurement, each in its folder."""

    def __init__(self, folder: Path, measurement: Measurement, inputs: Inputs, joint: JointStage | None = None) -> None:
        """`joint`: with several reference sets, what measures all of them to first order; it runs for the first."""
        self._folder, self._measurement, self._inputs, self._joint = folder, measurement, inputs, joint
        self._rows_per_shard = max(_SHARD, math.ceil(len(inputs.rows) / _MOST_SHARDS))

    def measure_all(self, estimator: str) -> pa.RecordBatchReader:
        screened = self._measurement.settings.estimator == "screened"
        if self._measurement.store is not None:
            return self._estimate_from_store(self._measurement.store)
        if self._joint is not None and estimator == "first_order":
            return self._measure_jointly(self._joint)
        return self._execute("screen" if screened else estimator, estimator, self._inputs.rows)

    def _measure_jointly(self, joint: JointStage) -> pa.RecordBatchReader:
        files = {f"reference_{number + 1}": target.file for number, target in enumerate(self._inputs.targets)}
        inputs = replace(self._inputs, files=files)
        parts = compute_parts(
            joint.folder,
            programs.INFLUENCE_BY_TARGET,
            self._settings("first_order"),
            inputs.rows,
            inputs,
            self._measurement.cluster,
            self._rows_per_shard,
        )
        return join_target(parts, joint.number)

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

    def check_store(self, store: Store) -> None:
        """Raise a DataError if a store holds other steps than those of this measurement."""
        steps = self._stored_steps(store)
        _check_store(stage_of(programs.STEPS, steps, store.folder, self._inputs.models, {}), self._inputs.rows)

    def _stored_steps(self, store: Store) -> programs.StepProjection:
        settings = self._settings("first_order").model_dump(include={"max_length", "dtype", "state_dtype", "step"})
        return programs.StepProjection(**settings, numbers=store.numbers)

    def _estimate_from_store(self, store: Store) -> pa.RecordBatchReader:
        """Estimate influence by the steps of a store, see `check_store`."""
        settings, inputs = self._settings("first_order"), replace(self._inputs, files={})
        cluster, tasks = self._measurement.cluster, Rows.of([vars(task) for task in inputs.reference], TaskRow)
        steps = self._stored_steps(store)
        reference = programs.ReferenceProjection(
            **dict(steps),
            reference_reduction=settings.reference_reduction,
            reference_batch_tokens=settings.reference_batch_tokens,
        )
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
    on = _folder_on("")
    target = folder.parent.name.removeprefix(on) if folder.parent.name.startswith(on) else ""
    with ProgressBar(", ".join(filter(None, [program.name, target, folder.name]))) as bar:
        return fan_out(stage, shards, resources, cluster, bar.show)
