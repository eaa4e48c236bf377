"""The rows that programs compute: one kind a program, and the tables that they come from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, TypedDict, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from montessori_core.data.tables import ROW_GROUP, check, open_parquet, regroup, take_rows
from montessori_core.errors import DataError

Positions = npt.NDArray[np.int64]
"""Of rows in a table, from 0, ascending."""


class TaskRow(TypedDict):
    """A human-written example, or a synthetic one without its history."""

    example_id: str
    instruction: str
    response: str


class TrainingRow(TypedDict):
    """An example to train on; `response_finished` is false if the response was cut at the token limit."""

    instruction: str
    response: str
    response_finished: bool


class ExampleRow(TrainingRow):
    """An example to measure, and the prompt that it answers."""

    example_id: str
    prompt_id: str


class GenerationRow(TypedDict):
    """What a teacher continues or answers, once for each of its samples.

    `turns` is one text; for a reply it is a request, its answer, and what the request's author says then. `example_ids` and
    `seeds` have one entry a sample.
    """

    example_ids: list[str]
    turns: list[str]
    seeds: list[int]


class PairRow(TypedDict):
    """A preference pair: what the teacher continued, and two of its outputs; see `training.dpo.encode_pair`."""

    prompt: str
    chosen: str
    chosen_output_ids: list[int] | None
    chosen_vocabulary: str | None
    chosen_finished: bool
    rejected: str
    rejected_output_ids: list[int] | None
    rejected_vocabulary: str | None
    rejected_finished: bool


class ComparisonRow(TypedDict):
    """Two answers to a question of AlpacaEval."""

    question_id: str
    instruction: str
    answer: str
    other: str


class DialogueRow(TypedDict):
    """A turn of a question of MT-Bench, 1 or 2, and what was said until then."""

    question_id: str
    category: str
    turn: int
    questions: list[str]
    answers: list[str]
    references: list[str]


class BenchmarkRow(TypedDict):
    """A task, tag or group of lm-evaluation-harness, and how many items of each of its tasks are used (None: all)."""

    benchmark: str
    limit: int | None


class ItemRow(TypedDict):
    """An item of a benchmark: its place in a task's evaluation set, and its demonstrations (None: as the task says)."""

    benchmark: str
    task: str
    item: int
    shots: int | None


_TYPES = {str: pa.string(), bool: pa.bool_(), int: pa.uint64()}  # no whole number is negative, and seeds fill 64 bits


def schema_of(kind: type) -> pa.Schema:
    """The schema of a table of rows of a kind, which is a TypedDict."""

    def field(name: str, hint: Any) -> pa.Field:
        nullable = NoneType in get_args(hint)
        [hint] = [one for one in get_args(hint) if one is not NoneType] if nullable else [hint]
        columns = pa.list_(_TYPES[get_args(hint)[0]]) if get_origin(hint) is list else _TYPES[hint]
        return pa.field(name, columns, nullable)

    return pa.schema([field(name, hint) for name, hint in get_type_hints(kind).items()])


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a table in memory, or of a Parquet file, which is read a row group at a time.

    Attributes:
        source: the table or the file.
        schema: the columns that are used, and their types.
        positions: [rows] of these rows in the source.
    """

    source: pa.Table | Path
    schema: pa.Schema
    positions: Positions

    @staticmethod
    def of(rows: Sequence[Mapping[str, object]], kind: type | None = None) -> "Rows":
        """Rows in memory, of a kind; without one, the values decide the types of the columns.

        Raises:
            DataError: a row has other fields, or a value that a table cannot hold.
        """
        schema = schema_of(kind) if kind else None
        names = set(schema.names) if schema else set(rows[0]) if rows else set()
        for row in rows:
            if row.keys() != names:
                raise DataError(f"a row has the fields {sorted(row)}, expected {sorted(names)}")
        try:
            return Rows.of_table(pa.Table.from_pylist(rows, schema), kind)
        except UnicodeEncodeError as error:
            raise DataError(
                f"a text holds half of a surrogate pair ({error.object[error.start]!r}), which is no character; correct or "
                "remove it"
            ) from error
        except (pa.ArrowException, ValueError, OverflowError) as error:
            raise DataError(f"rows that a table cannot hold ({error}); correct them") from error

    @staticmethod
    def of_table(table: pa.Table, kind: type | None = None) -> "Rows":
        """The rows of a table in memory that has the columns of a kind; without one, all of its columns."""
        schema = schema_of(kind) if kind else table.schema
        cast = check(table.select(schema.names).cast(schema), schema, "rows")
        return Rows(cast, schema, np.arange(table.num_rows))

    @staticmethod
    def of_file(
        path: Path, table: pa.Schema, kind: type | None = None, first: int = 0, last: int | None = None
    ) -> "Rows":
        """Rows `first` to `last` (None: to the end) of a file.

        Args:
            path: of the file.
            table: its schema.
            kind: which of its columns; None takes all.
            first, last: its first row, and the one behind the last.

        Raises:
            DataError: the file is missing, damaged, or another table.
        """
        schema = schema_of(kind) if kind else table
        with open_parquet(path, "; delete it and resume the run") as file:
            check(file.schema_arrow.empty_table(), table, str(path), schema.names)
            return Rows(path, schema, np.arange(file.metadata.num_rows)[first:last])

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, which: slice | Positions) -> "Rows":
        return replace(self, positions=self.positions[which])

    def column(self, name: str) -> list[Any]:
        """The values of a column."""
        alone = replace(self, schema=pa.schema([self.schema.field(name)]))
        return [value for table in alone.tables() for value in table[name].to_pylist()]

    def tables(self, size: int = ROW_GROUP) -> Iterator[pa.Table]:
        """The rows, `size` at a time but the last; one empty table if there are none.

        Raises:
            DataError: the file is missing or damaged.
        """
        return regroup(self._read(), self.schema, size)

    def _read(self) -> Iterator[pa.Table]:
        names = self.schema.names
        if isinstance(self.source, Path):
            with open_parquet(self.source, "; delete it and resume the run") as file:
                for table in take_rows(file, names, self.positions):
                    yield table.select(names).cast(self.schema)
        else:
            for start in range(0, len(self), ROW_GROUP):
                yield self.source.select(names).take(self.positions[start : start + ROW_GROUP])
