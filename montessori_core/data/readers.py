"""Rows of a data file, by its kind: JSON lines, a JSON list, CSV, Parquet or Arrow; a few rows in memory at a time."""

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from montessori_core.data.bad_rows import RowError
from montessori_core.data.files import MAX_EXPANSION, DataFile
from montessori_core.data.json_list import rows_of_list
from montessori_core.data.jsonl import LONGEST_ROW, read_lines, rows_of_lines
from montessori_core.data.row_sizes import row_slices
from montessori_core.errors import DataError

Rows = Iterator[tuple[str, Any]]
"""(Place in the file, row) pairs. A row that cannot be read is a RowError."""

_BATCH = 256  # rows of a table that become Python objects at once
_MOST_ROWS = 2048  # that Arrow decodes at once: each time costs a copy of the dictionary
_DICTIONARIES = {"RLE_DICTIONARY", "PLAIN_DICTIONARY"}
_LARGE = 2**30  # bytes of a row group, from which its expansion is checked


def file_rows(file: DataFile) -> Rows:
    """Yield the rows of a file.

    Raises:
        DataError: the file cannot be read, is damaged, or exceeds a bound (LONGEST_ROW, MAX_EXPANSION).
    """
    yield from _READERS[file.kind](file)


def _line_rows(file: DataFile) -> Rows:
    with file.open() as stream:
        yield from rows_of_lines(stream, file.name)


def _json_rows(file: DataFile) -> Rows:
    """Read a list, or one object per line; the first character tells which."""
    with file.open() as stream:
        start = b" "
        while start and start in b" \t\r\n\xef\xbb\xbf":
            start = stream.read(1)
    with file.open() as stream:
        yield from rows_of_list(stream, file.name) if start == b"[" else rows_of_lines(stream, file.name)


def _csv_rows(file: DataFile) -> Rows:
    """Read CSV with a header, as Python's `csv` does: commas, and quotes around texts with commas or new lines."""
    csv.field_size_limit(LONGEST_ROW)
    with file.open() as stream:
        lines = _CsvLines(stream, file.name)
        reader = csv.reader(lines, strict=True)  # else an open quote takes all rows that follow
        first = 1
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise DataError(
                    f"{file.name}, line 1: two columns have the same name ({', '.join(header)}); rename one"
                )
            first = reader.line_num + 1
            for values in reader:
                where, first, lines.row_bytes = f"{file.name}, line {first}", reader.line_num + 1, 0
                if not values:
                    continue
                if len(values) == len(header):
                    row = dict(zip(header, values, strict=True))
                    yield where, {name: value for name, value in row.items() if value or name != "id"}
                else:
                    problem = (
                        f"{len(values)} values, but the header names {len(header)} columns; quote texts with commas"
                    )
                    yield where, RowError(where, problem, "another number of values than columns")
        except csv.Error as error:
            raise DataError(
                f"{file.name}, line {first}: the row that begins here is not valid CSV ({error}); is a quote not closed?"
            ) from error


class _CsvLines:
    """The lines of a CSV file as text; `row_bytes` are those since it was last set to 0."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._lines, self._name = read_lines(stream, name), name
        self.row_bytes = 0

    def __iter__(self) -> Iterator[str]:
        for number, line in self._lines:
            self.row_bytes += len(line)
            if self.row_bytes > LONGEST_ROW:
                raise DataError(
                    f"{self._name}, line {number}: a row is longer than {LONGEST_ROW >> 20} MiB; is a quote not closed?"
                )
            try:
                yield line.decode() + "\n"
            except UnicodeDecodeError as error:
                raise DataError(f"{self._name}, line {number}: not UTF-8 text; convert the file") from error


@contextmanager
def _table_errors(file: DataFile, what: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # Arrow raises many kinds for damaged files
        raise DataError(f"{file.name}: not a readable {what} file ({error}); copy or write it again") from error


def _parquet_rows(file: DataFile) -> Rows:
    with file.open_seekable() as stream, _table_errors(file, "Parquet"):
        metadata = pq.read_metadata(stream)
        _check_expansion(metadata, file.name)
        dictionaries, size = _dictionaries(metadata), _batch_size(metadata)
        with pq.ParquetFile(
            stream, metadata=metadata, read_dictionary=dictionaries, page_checksum_verification=True
        ) as parquet:
            number = 0
            # Arrow reads nested columns of one row group at a time.
            groups = range(metadata.num_row_groups)
            batches = chain.from_iterable(parquet.iter_batches(size, row_groups=[group]) for group in groups)
            for number, row in _batch_rows(batches, file.name):
                yield f"{file.name}, row {number}", row
        if number != metadata.num_rows:  # no checksum covers the number of rows
            raise DataError(f"{file.name}: {number} rows where {metadata.num_rows} were written; copy it again")


def _chunks(metadata: pq.FileMetaData) -> Iterator[tuple[pq.RowGroupMetaData, pq.ColumnChunkMetaData]]:
    """Yield (row group, column of it) pairs."""
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    return ((group, group.column(number)) for group in groups for number in range(metadata.num_columns))


def _dictionaries(metadata: pq.FileMetaData) -> list[str]:
    """Return the columns to read as dictionaries, so that a value of many rows is in memory once."""
    encodings: dict[str, set[str]] = {}
    for _, column in _chunks(metadata):
        if column.physical_type == "BYTE_ARRAY":
            encodings.setdefault(column.path_in_schema, set()).update(column.encodings)
    return [name for name, kinds in encodings.items() if _DICTIONARIES & kinds and "DELTA_BYTE_ARRAY" not in kinds]


def _batch_size(metadata: pq.FileMetaData) -> int:
    """Return a number of rows that take less than about LONGEST_ROW."""
    rows = _MOST_ROWS
    for group, column in _chunks(metadata):
        # A value of DELTA_BYTE_ARRAY names the bytes that it has in common with the one before.
        shared = 1 if "DELTA_BYTE_ARRAY" in column.encodings else max(group.num_rows, 1)
        rows = min(rows, LONGEST_ROW * shared // max(column.total_uncompressed_size, 1))
    return max(rows, 1)


def check_parquet(file: DataFile) -> None:
    """Check the sizes in the footer of a Parquet file.

    Raises:
        DataError: it is damaged, or a decompression bomb.
    """
    with file.open_seekable() as stream, _table_errors(file, "Parquet"):
        _check_expansion(pq.read_metadata(stream), file.name)


def _check_expansion(metadata: pq.FileMetaData, name: str) -> None:
    """Refuse a decompression bomb."""
    for _, column in _chunks(metadata):
        size, compressed = column.total_uncompressed_size, column.total_compressed_size
        if size > _LARGE and size > MAX_EXPANSION * max(compressed, 1):
            raise DataError(
                f"{name}: {compressed:,} bytes of column {column.path_in_schema!r} grow to {size:,} ({MAX_EXPANSION} "
                "times as many is the limit); if it is no decompression bomb, write smaller row groups"
            )


def _arrow_rows(file: DataFile) -> Rows:
    """Read an IPC file, or an IPC stream, which is what `datasets` writes."""
    with file.open_seekable() as stream, _table_errors(file, "Arrow"):
        magic = stream.read(6)
        stream.seek(0)
        with pa.ipc.open_file(stream) if magic == b"ARROW1" else pa.ipc.open_stream(stream) as reader:
            batches: Iterable[pa.RecordBatch] = (
                (reader.get_batch(index) for index in range(reader.num_record_batches))
                if magic == b"ARROW1"
                else reader
            )
            for number, row in _batch_rows(batches, file.name):
                yield f"{file.name}, row {number}", row


def _batch_rows(batches: Iterable[pa.RecordBatch], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, row) pairs of record batches."""
    number = 0
    for batch in batches:
        batch.validate(full=True)  # UTF-8 and list offsets
        for start in range(0, batch.num_rows, _BATCH):
            for part in row_slices(batch.slice(start, _BATCH), name, number + 1):
                try:
                    rows = _without_dictionaries(part).to_pylist()
                except (pa.ArrowException, ValueError, OverflowError) as error:
                    raise DataError(f"{name}: a column cannot be read ({error}); remove it") from error
                for row in rows:
                    number += 1
                    yield number, row


def _without_dictionaries(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Decode dictionaries, which `to_pylist` would do value by value."""
    columns = [
        column if (plain := _plain(column.type)) == column.type else column.cast(plain) for column in batch.columns
    ]
    return pa.RecordBatch.from_arrays(columns, batch.schema.names)


def _plain(kind: pa.DataType) -> pa.DataType:
    """Return a type without the dictionaries in it; those in maps and list views remain."""
    if pa.types.is_dictionary(kind):
        return kind.value_type
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain(field.type)) for field in kind])
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(_plain(kind.value_type)), kind.list_size)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        list_of = pa.list_ if pa.types.is_list(kind) else pa.large_list
        return list_of(kind.value_field.with_type(_plain(kind.value_type)))
    return kind


# Not pyarrow.dataset: it infers types of cells (an answer "4" would be a number), names no line of a bad row, and has no
# bound on a row or on what a file grows to.
_READERS: Mapping[str, Callable[[DataFile], Rows]] = {
    ".jsonl": _line_rows,
    ".ndjson": _line_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}


def shard_rows(files: Iterable[DataFile]) -> Rows:
    """Yield the rows of several files, in their order."""
    return chain.from_iterable(map(file_rows, files))
