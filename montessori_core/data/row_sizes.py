"""Sizes of rows of Arrow tables, before they become Python objects.

Values that several rows share (a dictionary, runs, views) are small in a file and in Arrow, and large in Python.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from montessori_core.data.jsonl import LONGEST_ROW
from montessori_core.errors import DataError

_SLICE = 2**24  # bytes of rows that become Python objects at once


def row_slices(batch: pa.RecordBatch, name: str, first: int) -> Iterator[pa.RecordBatch]:
    """Cut a batch into slices of a bounded size.

    Args:
        batch: the rows.
        name: of the file, for errors.
        first: number of the first row.

    Raises:
        DataError: a row is larger than LONGEST_ROW.
    """
    size = sum(map(values_size, batch.columns))
    if size <= (_SLICE if batch.num_rows > 1 else LONGEST_ROW):
        yield batch
        return
    if batch.num_rows == 1:
        raise DataError(f"{name}, row {first}: larger than {LONGEST_ROW >> 20} MiB; shorten or remove it")
    half = batch.num_rows // 2
    yield from row_slices(batch.slice(0, half), name, first)
    yield from row_slices(batch.slice(half), name, first + half)


def values_size(array: pa.Array) -> int:
    """Return the bytes of an array's values; a value that occurs several times counts each time."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        if not _is_binary(kind.value_type):
            return len(array) * int(array.dictionary.nbytes)
        return pc.sum(pc.take(pc.binary_length(array.dictionary), array.indices)).as_py() or 0
    if pa.types.is_struct(kind):
        return sum(map(values_size, array.flatten()))
    if pa.types.is_map(kind):
        first, last = array.offsets[0].as_py(), array.offsets[-1].as_py()
        return sum(values_size(part.slice(first, last - first)) for part in (array.keys, array.items))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return values_size(array.flatten())
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        lengths = np.frombuffer(array.buffers()[1], np.int32)[4 * array.offset : 4 * (array.offset + len(array)) : 4]
        return int(lengths.sum(dtype=np.int64))
    if pa.types.is_run_end_encoded(kind) or pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return len(array) * int(array.nbytes)
    return int(array.nbytes)


def _is_binary(kind: pa.DataType) -> bool:
    types = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(is_kind(kind) for is_kind in types)
