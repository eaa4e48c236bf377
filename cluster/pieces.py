"""A shard's rows, committed a few at a time: a job that is preempted or killed loses only what it was at work on.

For programs whose rows do not depend on each other and whose result is a table. A piece's name carries the key of its
shard, so that pieces of other rows or settings are never taken for it; the shard's own commit removes them.
"""

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from montessori_core.atomic import commit
from montessori_core.errors import DataError
from montessori_core.program import Compute, Report, Row
from montessori_core.schema import read_parquet, write_parquet


def compute_in_pieces(
    folder: Path, index: int, key: str, rows: list[Row], size: int, compute: Compute, output: Path, report: Report
) -> None:
    """Compute the pieces of shard `index` that are not there yet, `size` rows each, and join them into `output`."""
    folder.mkdir(exist_ok=True)
    tables = []
    for start in range(0, len(rows), size):
        piece = folder / f"{index:05d}-{key[:16]}-{start:06d}-{size}.parquet"
        table = _read(piece)
        if table is None:
            report(start)  # pieces that were there say nothing of the pace
            with commit(piece) as temporary:
                compute(rows[start : start + size], temporary, lambda done, start=start: report(start + done))  # type: ignore[misc]
            table = read_parquet(piece)
            report(min(start + size, len(rows)))
        tables.append(table)
    whole = pa.concat_tables([table.replace_schema_metadata(tables[0].schema.metadata) for table in tables])
    write_parquet(whole.combine_chunks(), output)


def remove_pieces(folder: Path, indices: Iterable[int]) -> None:
    """Remove the pieces of shards that are done."""
    for index in indices:
        for piece in folder.glob(f"{index:05d}-*.parquet"):
            piece.unlink(missing_ok=True)


def _read(piece: Path) -> pa.Table | None:
    try:
        return read_parquet(piece)
    except DataError:
        return None  # not there, or damaged: it is computed again
