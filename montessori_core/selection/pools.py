"""Pools of scored rows: a file, the scored examples of a run, or an influence table with its examples.

A pool is read in order, as often as needed; its rows are never all in memory.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Set
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from montessori_core import layout
from montessori_core.config import DataSource
from montessori_core.data.bad_rows import RowError
from montessori_core.data.files import DataFile
from montessori_core.data.readers import shard_rows
from montessori_core.data.shards import find_local
from montessori_core.data.sources import FINISHED, Task, TaskReader
from montessori_core.data.tables import INFLUENCE, ROW_GROUP, check, name_of_table, open_parquet, take_rows
from montessori_core.errors import DataError
from montessori_core.export.formats import CONVERSATION_FORMATS
from montessori_core.export.sets import INSTRUCTION, OUTPUT, SCHEMAS, RunSet, open_set
from montessori_core.influence.table import ExamplesHash, hash_of_examples
from montessori_core.program import Row
from montessori_core.selection.columns import schema_of_rows, text_columns

_DATA_FILES = ("data/train.parquet", "data/train.jsonl")  # of an exported folder


class Pool(Protocol):
    """Rows with named columns, in an order.

    Attributes:
        name: for errors.
        schema: the columns; None if only the rows say which.
    """

    name: str
    schema: pa.Schema | None

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """Yield all rows in order, with some columns or all of them.

        Raises:
            DataError: the pool cannot be read, or has no such column.
        """
        ...

    def take(self, positions: Set[int], columns: Sequence[str] | None = None) -> Iterator[tuple[int, Row]]:
        """Yield (position, row) pairs of some rows, in order; positions count from 0.

        Raises:
            DataError: as `rows`.
        """
        last = max(positions, default=-1)
        for position, row in enumerate(self.rows(columns)):
            if position > last:
                return
            if position in positions:
                yield position, row


class FilesPool(Pool):
    """The rows of a file, a glob or a folder, of any kind that data sets have; the cells of CSV are texts.

    A row that lacks a column has null there, as in Parquet.

    Attributes:
        names: of the columns, in their order; empty before the end of the first pass.

    Args:
        path: of the files, or their name if they are given.
        files: the files.
    """

    schema = None

    def __init__(self, path: Path | str, files: Sequence[DataFile] | None = None) -> None:
        files = find_local(Path(path), "train", field="") if files is None else files
        if files is None:
            raise DataError(f"{path}: expected a data file, a glob, a folder of data files, or a run")
        self._files, self.name = files, str(path)
        self.names: dict[str, None] = {}

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        if self.names:
            check_columns(self.name, columns or (), list(self.names))
        names: dict[str, None] = {}
        for where, row in shard_rows(self._files):
            if isinstance(row, RowError):
                raise row
            if not isinstance(row, dict):
                raise DataError(f"{where}: expected an object with named fields, found {type(row).__name__}")
            names |= dict.fromkeys(row)
            yield row if columns is None else {name: row.get(name) for name in columns}
        self.names = names
        if names:
            check_columns(self.name, columns or (), list(names))


class ParquetPool(Pool):
    """The rows of a Parquet file; `name` is for errors."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        self._path, self.name = path, name or str(path)
        with open_parquet(path) as file:
            self.schema: pa.Schema | None = file.schema_arrow

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        check_columns(self.name, columns or (), self.schema.names if self.schema else ())
        with open_parquet(self._path) as file:
            for batch in file.iter_batches(ROW_GROUP, columns=columns):
                yield from batch.to_pylist()

    def take(self, positions: Set[int], columns: Sequence[str] | None = None) -> Iterator[tuple[int, Row]]:
        check_columns(self.name, columns or (), self.schema.names if self.schema else ())
        ordered = np.array(sorted(positions), np.int64)
        with open_parquet(self._path) as file:
            rows = (row for table in take_rows(file, columns, ordered) for row in table.to_pylist())
            yield from zip(ordered.tolist(), rows, strict=True)


class RunPool(Pool):
    """The scored examples of a run."""

    def __init__(self, data: RunSet) -> None:
        self._data, self.name, self.schema = data, str(data.run), data.schema

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        check_columns(self.name, columns or (), self.schema.names)
        for table in self._data.tables(columns):
            yield from table.to_pylist()


class InfluencePool(Pool):
    """The table of `montessori influence`, with the texts and other columns of the examples that were measured.

    With a format of conversations, a column of turns is in place of instruction and output; it is the format `messages` if
    one of the examples has earlier turns. A column of the examples is left out if the table has one of its name.

    Passes over its numbers read the table alone. Texts are read from the examples, and not held: those of examples in the
    order of the table are passed on at once.
    """

    def __init__(self, path: Path, examples: DataSource, form: str | None = None, name: str | None = None) -> None:
        self.name = name or str(path)
        self._path, self._examples = path, examples
        left_out = {"kind", "source", "teacher", "iteration"}
        fields = [field for field in SCHEMAS["scored"] if field.name not in left_out]
        self._not_passed_on = text_columns(examples) | {field.name for field in fields}
        conversations, self._hash = 0, ExamplesHash()

        def columns() -> Iterator[Row]:
            nonlocal conversations
            for task, row in self._tasks():
                conversations += bool(task.before)
                self._hash.add(task)
                yield self._own_columns(row)

        own = schema_of_rows(columns())
        form = form or ("messages" if conversations else None)
        self._form = CONVERSATION_FORMATS[form] if form else None
        if self._form:
            fields = [field for field in fields if field.name not in (INSTRUCTION, OUTPUT)]
            fields.insert(1, self._form.field)
        self.schema = pa.schema([*fields, *own])
        texts = (self._form.field.name,) if self._form else (INSTRUCTION, OUTPUT)
        self._read = {FINISHED, *texts, *own.names}  # from the examples
        with open_parquet(path) as file:
            check(file.schema_arrow.empty_table(), INFLUENCE, self.name)
        self.check_examples(ParquetPool(path, name))

    def check_examples(self, table: ParquetPool) -> None:
        """Check that an influence table is of these examples, or of some of them; of earlier versions, any table passes.

        Raises:
            DataError: it is of others.
        """
        recorded = hash_of_examples(table.schema) if table.schema else None
        if recorded in (None, str(self._hash)):
            return
        measured = {row["example_id"] for row in table.rows(["example_id"])}
        if recorded != str(ExamplesHash(task for task, _ in self._tasks() if task.example_id in measured)):
            raise DataError(
                f"{table.name}: --examples {self._examples.path} is not the data that was measured; give that, unchanged and "
                "read as then (its turns and fields)"
            )

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        names = list(columns or self.schema.names)
        check_columns(self.name, names, self.schema.names)
        if self._read & set(names):
            with open_parquet(self._path) as file:
                everything = set(range(file.metadata.num_rows))
            yield from (row for _, row in self.take(everything, names))
            return
        stored = [_STORED.get(name, name) for name in names]
        with open_parquet(self._path) as file:
            for batch in file.iter_batches(ROW_GROUP, columns=list(dict.fromkeys(stored))):
                for measured in batch.to_pylist():
                    yield {name: measured[_STORED.get(name, name)] for name in names}

    def take(self, positions: Set[int], columns: Sequence[str] | None = None) -> Iterator[tuple[int, Row]]:
        names = list(columns or self.schema.names)
        check_columns(self.name, names, self.schema.names)
        if not self._read & set(names):
            yield from super().take(positions, names)
            return
        measured = super().take(positions, list({"id"} | (set(names) - self._read)))
        first = next(measured, None)
        for task, row in self._tasks():
            if first is None:
                return
            if task.example_id == first[1]["id"]:
                yield first[0], self._joined(first[1], task, row, names)
                first = next(measured, None)
        if first is not None:
            yield from self._take_in_other_order(chain([first], measured), names)

    def _take_in_other_order(
        self, measured: Iterable[tuple[int, Row]], names: Sequence[str]
    ) -> Iterator[tuple[int, Row]]:
        """Join rows with examples that are in another order than the table."""
        wanted = {row["id"]: (position, row) for position, row in measured}
        order = deque(position for position, _ in wanted.values())
        waiting: dict[int, Row] = {}
        for task, row in self._tasks():
            if task.example_id not in wanted:
                continue
            position, numbers = wanted.pop(task.example_id)
            waiting[position] = self._joined(numbers, task, row, names)
            while order and order[0] in waiting:
                yield order[0], waiting.pop(order.popleft())
            if not wanted:
                return
        raise DataError(
            f"{self.name}: example {next(iter(wanted))!r} is not in --examples; give the data that was measured"
        )

    def _tasks(self) -> Iterator[tuple[Task, Row]]:
        """Yield the examples, each with all its columns."""
        reader = TaskReader(self._examples, "examples", with_response=True)
        return ((task, dict(reader.row)) for task in reader)

    def _own_columns(self, row: Row) -> Row:
        return {name: value for name, value in row.items() if name not in self._not_passed_on}

    def _joined(self, numbers: Row, task: Task, row: Row, names: Sequence[str]) -> Row:
        joined: Row = {**self._own_columns(row), **numbers, FINISHED: not task.unfinished}
        if self._form:
            joined[self._form.field.name] = self._form.turns(task.before, task.instruction, task.response)
        else:
            joined |= {INSTRUCTION: task.instruction, OUTPUT: task.response}
        return {name: joined.get(name) for name in names}


_STORED = {"id": "example_id", "influence": "influence_student"}
"""Columns of an influence table that have another name in a pool."""


def open_pool(path: Path, examples: DataSource | None = None, form: str | None = None, name: str | None = None) -> Pool:
    """Open a pool.

    Args:
        path: a file, a glob or a folder of files, an exported folder, or the folder of a run: its last iteration with
            scored examples.
        examples: texts of an influence table's examples.
        form: how the texts of `examples` are written, a name of CONVERSATION_FORMATS; None: see `InfluencePool`.
        name: of a Parquet file, for errors; None: its path.

    Raises:
        DataError: it is none of these, an influence table without its examples, or another pool with examples or a form.
    """
    path = Path(os.path.expanduser(path))
    pool = _open_pool(path, examples, form, name)
    check_texts(pool, examples, form)
    return pool


def check_texts(pool: Pool, examples: DataSource | None, form: str | None) -> None:
    """Raise a DataError if a pool with texts of its own gets those of examples, or another form; see `open_pool`."""
    if isinstance(pool, InfluencePool) or (form is None and examples is None):
        return
    refuse_lost_table(pool)
    if form is not None:
        raise DataError(f"{pool.name}: only the texts of an influence table can be written as {form}; leave out --to")
    raise DataError(f"{pool.name}: has its own texts; leave out --examples, which is for influence tables")


def refuse_lost_table(pool: Pool) -> None:
    """Raise a DataError if a pool has the columns of an influence table: its metadata is lost, or it is of several tables."""
    if set(_STORED.values()) <= set(column_names(pool)):
        raise DataError(
            f"{pool.name}: has the columns of an influence table, but is not one as montessori influence wrote it; give that "
            "file, or each of several by its own name (a glob without quotes)"
        )


def _open_pool(path: Path, examples: DataSource | None, form: str | None, name: str | None) -> Pool:
    if (path / layout.CONFIG).is_file():
        return RunPool(open_set(path.resolve(), "scored"))
    path = data_file(path)
    if path.suffix != ".parquet" or not path.is_file():
        return FilesPool(path)
    pool = ParquetPool(path, name)
    return (
        open_influence(path, examples, form, name) if name_of_table(pool.schema) == name_of_table(INFLUENCE) else pool
    )


def open_influence(path: Path, examples: DataSource | None, form: str | None, name: str | None = None) -> InfluencePool:
    """Open an influence table with its examples; see `open_pool`."""
    if examples is None:
        raise DataError(
            f"{name or path}: an influence table has no texts; give the data that was measured with --examples"
        )
    return InfluencePool(path, examples, form, name)


def data_file(path: Path) -> Path:
    """Return the data file of an exported folder; any other path unchanged."""
    return next((path / name for name in _DATA_FILES if (path / name).is_file()), path)


def column_names(pool: Pool) -> list[str]:
    """Return the names of a pool's columns; without a schema, those of the last pass over its rows, or of its first row.

    Raises:
        DataError: the pool cannot be read.
    """
    if isinstance(pool, FilesPool) and pool.names:
        return list(pool.names)
    return pool.schema.names if pool.schema is not None else list(next(pool.rows(), {}))


def check_columns(where: str, needed: Sequence[str], present: Sequence[str]) -> None:
    """Check that columns are there.

    Raises:
        DataError: one is not; the message names those that are.
    """
    for name in needed:
        if name not in present:
            raise DataError(f"{where}: no column {name!r} (found: {', '.join(present)})")
