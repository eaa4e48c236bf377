"""A pool with several scores: influence tables of the same examples, each measured on the reference set of a target."""

from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import chain
from pathlib import Path

import pyarrow as pa

from montessori_core.config import DataSource
from montessori_core.data.tables import INFLUENCE, name_of_table
from montessori_core.errors import DataError
from montessori_core.program import Row
from montessori_core.selection.pools import (
    FilesPool,
    InfluencePool,
    ParquetPool,
    Pool,
    check_columns,
    open_influence,
    open_pool,
    refuse_lost_table,
)

INFLUENCE_COLUMN = "influence"
"""The column of a pool with one score, unless another is named."""
_STORED, _ID = "influence_student", "example_id"
_OF_A_REFERENCE = ("influence_null_step", "standard_error", "status", "estimator")


class TargetsPool(Pool):
    """The examples of influence tables, with the column `influence_NAME` of each instead of `influence`.

    Args:
        pool: of the first table and its examples.
        tables: all tables, by the name of their column; of the same examples, in the same order.
    """

    def __init__(self, pool: InfluencePool, tables: Mapping[str, Path]) -> None:
        self._pool, self.name = pool, " and ".join(map(str, tables.values()))
        self._tables = {column: ParquetPool(path) for column, path in tables.items()}
        left_out = {INFLUENCE_COLUMN, *_OF_A_REFERENCE, *tables}
        fields = [field for field in pool.schema if field.name not in left_out]
        self.schema = pa.schema([*fields, *(pa.field(column, pa.float64()) for column in tables)])
        first, *others = self._tables.values()
        for other in others:
            _check_same_examples(first, other)
            pool.check_examples(other)

    @property
    def targets(self) -> list[str]:
        """The columns with the scores."""
        return list(self._tables)

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        scores = (table.rows([_STORED]) for table in self._tables.values())
        for row, *influences in zip(self._pool.rows(self._others(columns)), *scores, strict=True):
            yield self._joined(row, influences, columns)

    def take(self, positions: Set[int], columns: Sequence[str] | None = None) -> Iterator[tuple[int, Row]]:
        scores = (table.take(positions, [_STORED]) for table in self._tables.values())
        for (position, row), *influences in zip(
            self._pool.take(positions, self._others(columns)), *scores, strict=True
        ):
            yield position, self._joined(row, [influence for _, influence in influences], columns)

    def _others(self, columns: Sequence[str] | None) -> list[str]:
        """Return the columns to read of the pool of the first table; at least its ids."""
        names = columns or self.schema.names
        check_columns(self.name, names, self.schema.names)
        return ["id", *(name for name in names if name not in self._tables and name != "id")]

    def _joined(self, row: Row, influences: Sequence[Row], columns: Sequence[str] | None) -> Row:
        joined = row | {column: scored[_STORED] for column, scored in zip(self._tables, influences, strict=True)}
        return {name: joined[name] for name in columns or self.schema.names}


def open_pools(
    paths: Sequence[Path], examples: DataSource | None = None, form: str | None = None
) -> tuple[Pool, list[str]]:
    """Open a pool, also of several influence tables; return it with its columns of scores.

    Args:
        paths: one pool, as of `open_pool`, or influence tables of the same examples.
        examples, form: as of `open_pool`.

    Raises:
        DataError: as `open_pool`, or several are not influence tables with different names and the same examples.
    """
    if len(paths) == 1:
        return open_pool(paths[0], examples, form), [INFLUENCE_COLUMN]
    tables = {f"{INFLUENCE_COLUMN}_{path.stem}": path.expanduser() for path in paths}
    if len(tables) < len(paths):
        raise DataError("several tables have the same file name, which names their column of scores; rename them")
    for path in tables.values():
        table = ParquetPool(path) if path.suffix == ".parquet" else FilesPool(path)
        if table.schema is None or name_of_table(table.schema) != name_of_table(INFLUENCE):
            refuse_lost_table(table)
            raise DataError(
                f"{path}: no table of montessori influence. Only such tables are joined; of other data, give one file "
                "with a column per target and name these with --by"
            )
    pool = TargetsPool(open_influence(next(iter(tables.values())), examples, form), tables)
    return pool, pool.targets


def _check_same_examples(first: ParquetPool, other: ParquetPool) -> None:
    """Check that two tables are of the same examples, in the same order.

    Raises:
        DataError: they are not.
    """
    ends = (chain(table.rows([_ID]), [{_ID: "(none)"}]) for table in (first, other))
    for number, (row, other_row) in enumerate(zip(*ends, strict=False), 1):
        if row[_ID] != other_row[_ID]:
            raise DataError(
                f"{other.name}, row {number}: example {other_row[_ID]!r}, but {first.name} has {row[_ID]!r} there; measure "
                "the same --examples for each target"
            )
