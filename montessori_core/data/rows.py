"""The input rows of programs: their types, and tables of them."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NotRequired, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from montessori_core.data.tables import ROW_GROUP, check, open_parquet, regroup, take_rows
from montessori_core.errors import DataError

Positions = npt.NDArray[np.int64]
"""Of rows in a table, from 0."""


class EarlierTurn(TypedDict):
    """A turn of a conversation before its last instruction, as a message of OpenAI's format.

    `weight` is 1 if the turn carries loss: only answers of the assistant do. A system turn comes first.
    """

    role: Literal["system", "user", "assistant"]
    content: str
    weight: int


class TaskRow(TypedDict):
    """An instruction and its response, the turns before them, and whether the response was cut.

    Sets of single turns lack the column of turns, sets of whole responses the last column.
    """

    example_id: str
    instruction: str
    response: str
    before: NotRequired[list[EarlierTurn] | None]
    unfinished: NotRequired[bool | None]


class TrainingRow(TypedDict):
    """A training example; `response_finished` is false if the response was cut at the token limit, `before` as in a task."""

    instruction: str
    response: str
    response_finished: bool
    before: NotRequired[list[EarlierTurn] | None]


class ExampleRow(TrainingRow):
    """A synthetic example with the id of its prompt, to be measured."""

    example_id: str
    prompt_id: str


class GenerationRow(TypedDict):
    """A text that a teacher continues or answers, with an example id and a seed for each sample.

    `turns` has one text; for a reply it has a request, its answer, and a second request.
    """

    example_ids: list[str]
    turns: list[str]
    seeds: list[int]


class SubsetRow(TypedDict):
    """A training on a subset of the examples: the positions of the examples of each step of an epoch."""

    training_id: str
    batches: list[list[int]]


class PairRow(TypedDict):
    """A preference pair: a prompt and two outputs of the teacher; see `training.dpo.encode_pair`."""

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
    """An instruction of AlpacaEval and two answers to it."""

    question_id: str
    instruction: str
    answer: str
    other: str


class DialogueRow(TypedDict):
    """Turn 1 or 2 of a question of MT-Bench, with the conversation up to it."""

    question_id: str
    category: str
    turn: int
    questions: list[str]
    answers: list[str]
    references: list[str]


class BenchmarkRow(TypedDict):
    """A task, tag or group of lm-evaluation-harness, and how many items of each task are listed (None: all).

    Its `shots`, those of its `ItemRow`s, are only checked.
    """

    benchmark: str
    limit: int | None
    shots: int | None


class ItemRow(TypedDict):
    """An item of a benchmark: its index in a task's evaluation set, and its few-shot examples (None: the task's default)."""

    benchmark: str
    task: str
    item: int
    shots: int | None


# Whole numbers are not negative, and seeds have 64 bits.
_TYPES = {str: pa.string(), bool: pa.bool_(), int: pa.uint64()}


def schema_of(kind: type, optional: Collection[str] = ()) -> pa.Schema:
    """Return the schema of a table of rows of a TypedDict: its required fields, and some `optional` ones."""

    def arrow(hint: Any) -> pa.DataType:
        if is_typeddict(hint):
            return pa.struct([field(name, part) for name, part in get_type_hints(hint).items()])
        if get_origin(hint) is Literal:
            return _TYPES[type(get_args(hint)[0])]
        return pa.list_(arrow(get_args(hint)[0])) if get_origin(hint) is list else _TYPES[hint]

    def field(name: str, hint: Any) -> pa.Field:
        nullable = NoneType in get_args(hint)
        [hint] = [option for option in get_args(hint) if option is not NoneType] if nullable else [hint]
        return pa.field(name, arrow(hint), nullable)

    absent = optional_fields(kind) - set(optional)
    return pa.schema([field(name, hint) for name, hint in get_type_hints(kind).items() if name not in absent])


def optional_fields(kind: type) -> frozenset[str]:
    """Return the fields that rows of a TypedDict may lack; a table has their columns only if a row has a value."""
    return frozenset(getattr(kind, "__optional_keys__", ()))


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a table in memory, or of a Parquet file, which is read one row group at a time.

    Attributes:
        source: the table or the file.
        schema: of the columns that are used.
        positions: [rows] positions of these rows in the source.
    """

    source: pa.Table | Path
    schema: pa.Schema
    positions: Positions

    @staticmethod
    def of(rows: Sequence[Mapping[str, object]], kind: type | None = None) -> "Rows":
        """Return rows in memory.

        Args:
            rows: with the same fields.
            kind: their TypedDict; without one, the values decide the types of the columns.

        Raises:
            DataError: a row has other fields, or a value that a table cannot hold.
        """
        optional = optional_fields(kind) if kind else frozenset()
        schema = schema_of(kind, [name for name in optional if any(row.get(name) for row in rows)]) if kind else None
        names = set(schema.names) - optional if schema else set(rows[0]) if rows else set()
        for row in rows:
            if row.keys() - optional != names:
                raise DataError(f"a row has the fields {sorted(row)}, expected {sorted(names)}")
        if optional:
            rows = [{**row, **{name: row.get(name) or None for name in optional}} for row in rows]
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
        """Return the rows of a table in memory with the columns of a TypedDict; without one, with all columns."""
        schema = schema_of(kind, table.column_names) if kind else table.schema
        cast = check(table.select(schema.names).cast(schema), schema, "rows")
        return Rows(cast, schema, np.arange(table.num_rows))

    @staticmethod
    def of_file(
        path: Path, table: pa.Schema, kind: type | None = None, first: int = 0, last: int | None = None
    ) -> "Rows":
        """Return rows `first` to `last` (None: to the end) of a file.

        Args:
            path: of the file.
            table: schema of the file.
            kind: TypedDict of the columns that are used; None uses all.
            first, last: a half-open range.

        Raises:
            DataError: the file is missing, damaged, or another table.
        """
        with open_parquet(path, "; delete it and resume the run") as file:
            used = [name for name in optional_fields(kind) if _has_values(file, name)] if kind else []
            schema = schema_of(kind, used) if kind else table
            check(file.schema_arrow.empty_table(), table, str(path), schema.names)
            return Rows(path, schema, np.arange(file.metadata.num_rows)[first:last])

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, which: slice | Positions) -> "Rows":
        return replace(self, positions=self.positions[which])

    def column(self, name: str) -> list[Any]:
        """Return the values of a column."""
        column = replace(self, schema=pa.schema([self.schema.field(name)]))
        return [value for table in column.tables() for value in table[name].to_pylist()]

    def tables(self, size: int = ROW_GROUP) -> Iterator[pa.Table]:
        """Yield tables of `size` rows; the last has fewer. Without rows, yield an empty table.

        Raises:
            DataError: the file is missing or damaged.
        """
        return regroup(self._read(), self.schema, size)

    def _read(self) -> Iterator[pa.Table]:
        names = self.schema.names
        if isinstance(self.source, Path):
            order = np.argsort(self.positions, kind="stable")
            with open_parquet(self.source, "; delete it and resume the run") as file:
                read = take_rows(file, names, self.positions[order])
                tables = (table.select(names).cast(self.schema) for table in read)
                if (order[1:] < order[:-1]).any():  # few rows in an order of their own, such as an audit
                    yield pa.concat_tables(tables).take(np.argsort(order))
                else:
                    yield from tables
        else:
            for start in range(0, len(self), ROW_GROUP):
                yield self.source.select(names).take(self.positions[start : start + ROW_GROUP])


def _has_values(file: pq.ParquetFile, name: str) -> bool:
    """Return whether a column of a Parquet file exists and has a value other than null."""
    metadata = file.metadata
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    columns = (group.column(place) for group in groups for place in range(metadata.num_columns))
    return any(
        column.path_in_schema.partition(".")[0] == name and column.statistics.null_count < column.num_values
        for column in columns
    )
