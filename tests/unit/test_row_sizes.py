"""Bounds on rows of Parquet and Arrow files."""

import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from montessori_core.data.files import DataFile
from montessori_core.data.readers import file_rows
from montessori_core.data.row_sizes import values_size
from montessori_core.errors import DataError


def large_tables(size: int) -> dict[str, pa.Table]:
    """Return tables with `size` bytes of text in a row, as columns that a reader may decode in different ways."""
    text, short = "x" * size, pa.array(["Hi."])
    cells = {
        "text": pa.array([text]),
        "view": pa.array([text], pa.string_view()),
        "dictionary": pa.array([text], pa.dictionary(pa.int32(), pa.string())),
        "list": pa.array([[text[:1000]] * (size // 1000)], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
        "struct": pa.array([{"a": {"b": text}}]),
        "map": pa.array([[("a", text)]], pa.map_(pa.string(), pa.string())),
    }
    return {name: pa.table({"instruction": short, "output": short, "more": cell}) for name, cell in cells.items()}


@pytest.mark.guarantee("decompression bombs")
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_large_cell_is_refused(kind: str, tmp_path: Path) -> None:
    for name, table in large_tables(70 * 2**20).items():
        path = tmp_path / f"{name}.{kind}"
        if kind == "parquet":
            pq.write_table(table, path, compression="zstd")
        else:
            with pa.ipc.new_file(path, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
                writer.write_table(table)
        with pytest.raises(DataError, match=rf"{name}.{kind}, row 1: larger than 64 MiB"):
            next(file_rows(DataFile(str(path), str(path))))


@pytest.mark.guarantee("decompression bombs")
@pytest.mark.parametrize("encoding", ["RLE_DICTIONARY", "DELTA_BYTE_ARRAY", "nested"])
def test_value_of_many_rows_is_in_memory_once(encoding: str, tmp_path: Path) -> None:
    """A file of about a kilobyte with 256 MiB of text."""
    text, path = "x" * 2**20, tmp_path / "a.parquet"
    column = {"output": pa.array([text] * 256)} if encoding != "nested" else {"output": pa.array([[text] * 32] * 8)}
    delta = {"use_dictionary": False, "column_encoding": {"output": encoding}} if encoding.startswith("D") else {}
    pq.write_table(pa.table(column), path, compression="zstd", **delta)
    assert path.stat().st_size < 4000
    del column
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    rows = file_rows(DataFile(str(path), str(path)))
    _, first = next(rows)
    assert first["output"] in (text, [text] * 32)
    assert pa.total_allocated_bytes() - before < 2**27
    assert tracemalloc.get_traced_memory()[1] < 2**26
    assert sum(1 for _ in rows) == (7 if encoding == "nested" else 255)
    tracemalloc.stop()


TEXTS = st.none() | st.text(max_size=4)


@given(st.lists(st.lists(TEXTS, max_size=3), min_size=1, max_size=9), st.integers(0, 8))
def test_size_is_of_the_values_of_a_slice(rows: list[list[str | None]], start: int) -> None:
    """Of any type that shares values; offsets and validity count a few bytes more."""
    texts = [text for row in rows[start:] for text in row]
    size = sum(len((text or "").encode()) for text in texts)
    first = [row[0] if row else None for row in rows]
    flat = sum(len((text or "").encode()) for text in first[start:])
    shared = pa.dictionary(pa.int32(), pa.string())
    for array, expected in (
        (pa.array(first, shared), flat),
        (pa.array(first, pa.string_view()), flat),
        (pa.array([{"a": text} for text in first], pa.struct([("a", shared)])), flat),
        (pa.array(rows, pa.list_(shared)), size),
        (pa.array([[("k", text) for text in row] for row in rows], pa.map_(pa.string(), shared)), size),
    ):
        found = values_size(array.slice(start))
        assert expected <= found <= expected + 20 * (len(texts) + 1)
