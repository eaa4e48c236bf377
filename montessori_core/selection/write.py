"""Write chosen rows to a file."""

import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from montessori_core.data.tables import ROW_GROUP
from montessori_core.errors import DataError, UserError
from montessori_core.export.jsonl import json_line
from montessori_core.files import commit, refuse_existing
from montessori_core.program import Row
from montessori_core.selection.pools import Pool

RANK = "rank"
"""The column that is added: 1 for the best row."""


def check_output(output: Path) -> None:
    """Check that a file can be written.

    Raises:
        UserError: it exists, or is neither .jsonl nor .parquet.
    """
    if output.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"--output {output}: the name of the file must end in .jsonl or .parquet")
    refuse_existing(output, "file")


def write_chosen(pool: Pool, positions: Sequence[int], output: Path) -> None:
    """Write rows of a pool with all columns and their rank, in the order of the pool.

    Args:
        pool: the rows.
        positions: of the chosen rows, best first.
        output: the file, .jsonl or .parquet.

    Raises:
        DataError: the pool cannot be read, or a Parquet file cannot hold its rows.
    """
    ranks = {position: rank for rank, position in enumerate(positions, 1)}
    rows = (row | {RANK: ranks[position]} for position, row in pool.take(ranks.keys()))
    output.parent.mkdir(parents=True, exist_ok=True)
    with commit(output) as temporary:
        if output.suffix == ".jsonl":
            with temporary.open("w", encoding="utf-8") as stream:
                stream.writelines(map(json_line, rows))
        else:
            _write_parquet(rows, pool, temporary)
        refuse_existing(output, "file")  # another command may have written it meanwhile


def _write_parquet(rows: Iterator[Row], pool: Pool, path: Path) -> None:
    schema = None
    if pool.schema is not None:
        fields = [field for field in pool.schema.remove_metadata() if field.name != RANK]
        schema = pa.schema([*fields, pa.field(RANK, pa.int64())])
    # Without a schema all rows decide the columns and their types.
    batches = iter(lambda: list(islice(rows, ROW_GROUP if schema else sys.maxsize)), [])
    batch = next(batches, [])
    names = dict.fromkeys(name for row in batch for name in row)  # from_pylist reads those of the first row alone
    try:
        first = pa.Table.from_pylist([names | row for row in batch], schema)
        with pq.ParquetWriter(path, first.schema, compression="zstd", write_page_checksum=True) as writer:
            writer.write_table(first)
            for batch in batches:
                writer.write_table(pa.Table.from_pylist(batch, first.schema))
    except (pa.ArrowException, OverflowError) as error:
        raise DataError(f"{pool.name}: a Parquet file cannot hold these rows ({error}); give a .jsonl file") from error
