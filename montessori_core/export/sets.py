"""The data sets of a run that can be exported, read one row group at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from montessori_core import layout
from montessori_core.config import Experiment, read_experiment
from montessori_core.data.tables import (
    EXAMPLES,
    INFLUENCE,
    PREFERENCES,
    ROW_GROUP,
    check,
    open_parquet,
    read_table,
    take_rows,
)
from montessori_core.errors import DataError
from montessori_core.evaluation.kinds import KindClassifier, read_classifier
from montessori_core.export.published import name_of, public_names

SetName = Literal["training", "preferences", "scored"]
SETS: tuple[SetName, ...] = get_args(SetName)
INSTRUCTION, OUTPUT = "instruction", "output"
"""The columns with the texts of an example: the fields that a configuration reads by default."""


def _column(name: str, kind: pa.DataType, description: str) -> pa.Field:
    return pa.field(name, kind, metadata={"description": description})


def _kept(*names: str) -> list[pa.Field]:
    """Return columns of influence tables, which may be null."""
    return [INFLUENCE.field(name).with_nullable(True) for name in names]


_ORIGIN = (
    _column("source", pa.string(), "run, iteration and set"),
    _column("teacher", pa.string(), "model that wrote the instruction, and how often it was updated"),
    _column("iteration", pa.int32(), "iteration of the run, from 1"),
)
_EXAMPLE = (
    _column("id", pa.string(), "id of the example"),
    _column(INSTRUCTION, pa.string(), "instruction"),
    _column(OUTPUT, pa.string(), "response"),
    _column("response_finished", pa.bool_(), "false if the response was cut at the token limit"),
    _column(
        "influence",
        pa.float64(),
        "effect of one training step on the student's loss on the reference set, nats; positive helps; null if not measured",
    ),
    _column(
        "kind",
        pa.string(),
        "'wanted' if a classifier of words calls the instruction a task of the reference set's kind, else 'other'; null if "
        "it cannot tell",
    ),
)
_MEASURED = _kept(
    *("influence_null_step", "standard_error", "status", "tokens", "response_tokens", "truncated", "example_loss"),
    *("gradient_norm", "estimator"),
)
SCHEMAS: dict[SetName, pa.Schema] = {
    "training": pa.schema([*_EXAMPLE, *_ORIGIN]),
    "scored": pa.schema([*_EXAMPLE, *_MEASURED, *_ORIGIN]),
    "preferences": pa.schema(
        [
            _column("prompt", pa.string(), "the exact text that the teacher continued, chat template included"),
            _column("chosen", pa.string(), "output with the helpful instruction"),
            _column("rejected", pa.string(), "output with the harmful instruction"),
            _column("chosen_id", pa.string(), "example of the chosen output"),
            _column("rejected_id", pa.string(), "example of the rejected output"),
            _column("chosen_influence", pa.float64(), "influence of the chosen example, nats"),
            _column("rejected_influence", pa.float64(), "influence of the rejected example, nats"),
            *_ORIGIN,
        ]
    ),
}
_FILES: dict[SetName, str] = {
    "training": f"training/{layout.EXAMPLES}",
    "scored": layout.INFLUENCE,
    "preferences": layout.PREFERENCES,
}
_NAMES: dict[SetName, str] = {
    "training": "training set",
    "scored": "influence table",
    "preferences": "preference table",
}


@dataclass(frozen=True)
class RunSet:
    """A data set of a run.

    Attributes:
        run: folder of the run.
        experiment: its configuration.
        name: which set.
        iteration: its iteration, from 1.
    """

    run: Path
    experiment: Experiment
    name: SetName
    iteration: int

    @property
    def schema(self) -> pa.Schema:
        """Its columns, with descriptions."""
        return SCHEMAS[self.name]

    @property
    def title(self) -> str:
        """Its name for people."""
        return {"training": "training set", "preferences": "preference pairs", "scored": "scored examples"}[self.name]

    @property
    def folder(self) -> Path:
        """Folder of its iteration."""
        return self.run / layout.iteration(self.iteration)

    @property
    def teacher(self) -> str:
        """The teacher that wrote the instructions: a training set is the updated teacher's."""
        updates = self.iteration if self.name == "training" else self.iteration - 1
        model = self.name_of(self.experiment.teacher.model)
        return f"{model}, updated {updates} time{'s' * (updates > 1)}" if updates else model

    @property
    def source(self) -> str:
        """Name of the run, iteration and set."""
        return f"{self.experiment.name}/{layout.iteration(self.iteration)}/{self.name}"

    def name_of(self, name: str) -> str:
        """Return the name of a configured model or data set for publication: of a path only the last part."""
        return name_of(name, self._public)

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield the rows, or some columns of them, in tables of its schema, in the order of the run's table.

        Raises:
            DataError: a table of the run is missing or damaged.
        """
        schema = pa.schema([self.schema.field(name) for name in columns or self.schema.names])
        read: dict[SetName, Callable[[Path], Iterator[pa.Table]]] = {
            "training": _training,
            "scored": _scored,
            "preferences": _preferences,
        }
        origin = {"source": self.source, "teacher": self.teacher, "iteration": self.iteration}
        for table in read[self.name](self.folder):
            if "kind" in schema.names:
                table = table.append_column("kind", _kinds(table[INSTRUCTION], self._classifier))
            for name, value in origin.items():
                table = table.append_column(name, pa.repeat(pa.scalar(value), table.num_rows))
            yield table.select(schema.names).cast(schema)

    @cached_property
    def _public(self) -> set[str]:
        return public_names(self.run, self.experiment)

    @cached_property
    def _classifier(self) -> KindClassifier | None:
        return read_classifier(self.run)


def check_run(run: Path) -> None:
    """Raise a DataError if a folder is no run."""
    if not (run / layout.CONFIG).exists():
        raise DataError(f"{run}: not a run (no {layout.CONFIG}); give the folder of a run, of a study that of a seed")


def open_set(run: Path, name: SetName, iteration: int | None = None) -> RunSet:
    """Return a data set of a run.

    Args:
        run: folder of the run.
        name: which set.
        iteration: number of an iteration; None: the last that has the set.

    Raises:
        DataError: the folder is no run, or the run does not have the set (yet).
    """
    check_run(run)
    present = [number for number, folder in layout.iterations(run).items() if (folder / _FILES[name]).exists()]
    if not present or iteration not in (None, *present):
        which = f"iteration {iteration} of {run}" if present else str(run)
        raise DataError(
            f"{which} has no {_NAMES[name]} ({_FILES[name]}); "
            + (f"it exists for iteration {', '.join(map(str, present))}" if present else "resume the run first")
        )
    return RunSet(run, read_experiment(run / layout.CONFIG), name, iteration or present[-1])


def _kinds(instructions: pa.ChunkedArray, classifier: KindClassifier | None) -> pa.Array:
    """Return the column `kind` of an exported set."""
    if classifier is None or not classifier.usable:
        return pa.nulls(len(instructions), pa.string())
    kinds = ["wanted" if classifier.is_target(instruction) else "other" for instruction in instructions.to_pylist()]
    return pa.array(kinds, pa.string())


def _training(folder: Path) -> Iterator[pa.Table]:
    measured = folder / layout.TRAINING_INFLUENCE
    influence = read_table(measured, INFLUENCE, ["example_id", "influence_student"]) if measured.exists() else None
    for table in _read(folder / _FILES["training"], EXAMPLES, _TEXTS):
        values = pa.nulls(table.num_rows, pa.float64())
        if influence is not None:
            places = pc.index_in(table["example_id"], influence["example_id"])
            values = influence["influence_student"].take(places)
        yield _named(table).append_column("influence", values)


def _scored(folder: Path) -> Iterator[pa.Table]:
    examples = folder / layout.EXAMPLES
    ids = read_table(examples, EXAMPLES, ["example_id"])["example_id"]
    columns = ["example_id", "influence_student", *(field.name for field in _MEASURED)]
    with open_parquet(examples) as file:
        for table in _read(folder / layout.INFLUENCE, INFLUENCE, columns):
            places = pc.index_in(table["example_id"], ids)
            if places.null_count:
                raise DataError(f"{examples}: measured examples are missing; it is not the table that was measured")
            rows, order = np.unique(places.to_numpy(), return_inverse=True)
            texts = _named(pa.concat_tables(take_rows(file, list(_TEXTS), rows)).combine_chunks().take(order))
            for name in columns[1:]:
                texts = texts.append_column("influence" if name == "influence_student" else name, table[name])
            yield texts


def _preferences(folder: Path) -> Iterator[pa.Table]:
    roles = ("chosen", "rejected")
    influences = {f"{role}_influence_student": f"{role}_influence" for role in roles}
    columns = ["prompt", *roles, *(f"{role}_id" for role in roles), *influences]
    for table in _read(folder / layout.PREFERENCES, PREFERENCES, columns):
        yield table.rename_columns([influences.get(name, name) for name in columns])


_TEXTS = ("example_id", "instruction", "response", "response_finished")


def _named(table: pa.Table) -> pa.Table:
    """Return the columns _TEXTS of an example table with the names of an exported example."""
    return table.select(_TEXTS).rename_columns(["id", INSTRUCTION, OUTPUT, "response_finished"])


def _read(path: Path, schema: pa.Schema, columns: tuple[str, ...] | list[str]) -> Iterator[pa.Table]:
    """Yield columns of a run's table, a row group at a time.

    Raises:
        DataError: the table is missing, damaged, or another one.
    """
    with open_parquet(path, "; delete it and resume the run") as file:
        check(file.schema_arrow.empty_table(), schema, str(path), list(columns))
        for batch in file.iter_batches(ROW_GROUP, columns=list(columns)):
            yield pa.Table.from_batches([batch]).select(list(columns))
