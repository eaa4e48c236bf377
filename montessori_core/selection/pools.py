"""Pools of scored rows: a file, the scored examples of a run, or an influence table with its examples.

A pool is read in order, as often as needed; its rows are never all in memory.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from montessori_core import layout
from montessori_core.config import DataSource
from montessori_core.data.jsonl import jsonl_rows
from montessori_core.data.sources import FINISHED, Task, TaskReader
from montessori_core.data.tables import INFLUENCE, ROW_GROUP, check, name_of_table, open_parquet, take_rows
from montessori_core.errors import DataError
from montessori_core.export.formats import CONVERSATION_FORMATS
from montessori_core.export.sets import INSTRUCTION, OUTPUT, SCHEMAS, RunSet, open_set
from montessori_core.program import Row

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


class JsonlPool(Pool):
    """The rows of a JSONL file."""

    schema = None

    def __init__(self, path: Path) -> None:
        self._path, self.name = path, str(path)

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        for where, row in jsonl_rows(self._path):
            if not isinstance(row, dict):
                raise DataError(f"{where}: expected an object with named fields, found {type(row).__name__}")
            if columns is None:
                yield row
                continue
            _check_columns(where, columns, list(row))
            yield {name: row[name] for name in columns}


class ParquetPool(Pool):
    """The rows of a Parquet file."""

    def __init__(self, path: Path) -> None:
        self._path, self.name = path, str(path)
        with open_parquet(path) as file:
            self.schema: pa.Schema | None = file.schema_arrow

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        _check_columns(self.name, columns or (), self.schema.names if self.schema else ())
        with open_parquet(self._path) as file:
            for batch in file.iter_batches(ROW_GROUP, columns=columns):
                yield from batch.to_pylist()

    def take(self, positions: Set[int], columns: Sequence[str] | None = None) -> Iterator[tuple[int, Row]]:
        _check_columns(self.name, columns or (), self.schema.names if self.schema else ())
        ordered = np.array(sorted(positions), np.int64)
        with open_parquet(self._path) as file:
            rows = (row for table in take_rows(file, columns, ordered) for row in table.to_pylist())
            yield from zip(ordered.tolist(), rows, strict=True)


class RunPool(Pool):
    """The scored examples of a run."""

    def __init__(self, data: RunSet) -> None:
        self._data, self.name, self.schema = data, str(data.run), data.schema

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        _check_columns(self.name, columns or (), self.schema.names)
        for table in self._data.tables(columns):
            yield from table.to_pylist()


class InfluencePool(Pool):
    """The table of `montessori influence`, with the texts of the examples that were measured.

    With a format of conversations, a column of turns is in place of instruction and output; it is the format `messages` if
    one of the examples has earlier turns.

    Passes over its numbers read the table alone. Texts are read from the examples, and not held: those of examples in the
    order of the table are passed on at once.
    """

    def __init__(self, path: Path, examples: DataSource, form: str | None = None) -> None:
        self.name = str(path)
        self._path, self._examples = path, examples
        if form is None and any(task.before for task in self._tasks()):
            form = "messages"
        self._form = CONVERSATION_FORMATS[form] if form else None
        self._texts = {FINISHED, *((self._form.field.name,) if self._form else (INSTRUCTION, OUTPUT))}
        left_out = {"kind", "source", "teacher", "iteration", *((INSTRUCTION, OUTPUT) if self._form else ())}
        fields = [field for field in SCHEMAS["scored"] if field.name not in left_out]
        self.schema = pa.schema([*fields[:1], self._form.field, *fields[1:]] if self._form else fields)
        with open_parquet(path) as file:
            check(file.schema_arrow.empty_table(), INFLUENCE, self.name)

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        names = list(columns or self.schema.names)
        _check_columns(self.name, names, self.schema.names)
        if self._texts & set(names):
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
        _check_columns(self.name, names, self.schema.names)
        if not self._texts & set(names):
            yield from super().take(positions, names)
            return
        numbers = [name for name in self.schema.names if name not in self._texts]
        # Ids and numbers of the rows that are not yielded yet, in their order.
        wanted = {row["id"]: (position, row) for position, row in super().take(positions, numbers)}
        order = deque(sorted(positions))
        waiting: dict[int, Row] = {}
        for task in self._tasks():
            if task.example_id not in wanted:
                continue
            position, row = wanted.pop(task.example_id)
            waiting[position] = row | self._texts_of(task)
            while order and order[0] in waiting:
                complete = waiting.pop(order[0])
                yield order.popleft(), {name: complete[name] for name in names}
            if not wanted:
                return
        if wanted:
            raise DataError(
                f"{self.name}: example {next(iter(wanted))!r} is not in --examples; give the data that was measured"
            )

    def _tasks(self) -> Iterator[Task]:
        yield from TaskReader(self._examples, "examples", with_response=True)

    def _texts_of(self, task: Task) -> Row:
        row: Row = {FINISHED: not task.unfinished}
        if self._form:
            return row | {self._form.field.name: self._form.turns(task.before, task.instruction, task.response)}
        return row | {INSTRUCTION: task.instruction, OUTPUT: task.response}


_STORED = {"id": "example_id", "influence": "influence_student"}
"""Columns of an influence table that have another name in a pool."""


def open_pool(path: Path, examples: DataSource | None = None, form: str | None = None) -> Pool:
    """Open a pool.

    Args:
        path: a .parquet or .jsonl file, an exported folder, or the folder of a run: its last iteration with scored examples.
        examples: texts of an influence table's examples.
        form: how the texts of `examples` are written, a name of CONVERSATION_FORMATS; None: see `InfluencePool`.

    Raises:
        DataError: it is none of these, an influence table without its examples, or has no texts in another format.
    """
    path = Path(os.path.expanduser(path))
    pool = _open_pool(path, examples, form)
    if form is not None and not isinstance(pool, InfluencePool):
        raise DataError(f"{path}: only the texts of an influence table can be written as {form}; leave out --to")
    return pool


def _open_pool(path: Path, examples: DataSource | None, form: str | None) -> Pool:
    if (path / layout.CONFIG).is_file():
        return RunPool(open_set(path.resolve(), "scored"))
    path = data_file(path)
    if path.suffix == ".jsonl":
        return JsonlPool(path)
    if path.suffix != ".parquet":
        raise DataError(f"{path}: expected a .parquet or .jsonl file, an exported folder or the folder of a run")
    pool = ParquetPool(path)
    if name_of_table(pool.schema) != name_of_table(INFLUENCE):
        return pool
    if examples is None:
        raise DataError(f"{path}: an influence table has no texts; give the data that was measured with --examples")
    return InfluencePool(path, examples, form)


def data_file(path: Path) -> Path:
    """Return the data file of an exported folder; any other path unchanged."""
    return next((path / name for name in _DATA_FILES if (path / name).is_file()), path)


def _check_columns(where: str, needed: Sequence[str], present: Sequence[str]) -> None:
    for name in needed:
        if name not in present:
            raise DataError(f"{where}: no column {name!r} (found: {', '.join(present)})")
