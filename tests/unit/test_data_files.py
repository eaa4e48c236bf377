"""Files of every kind and compression, shards, saved data sets and fsspec paths; damaged files and bombs."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from montessori_core.config import DataSource
from montessori_core.data import files, json_list, jsonl, readers
from montessori_core.data.files import COMPRESSIONS, KINDS
from montessori_core.data.sources import Task, TaskReader, load_tasks, read_tasks, write_tasks
from montessori_core.errors import DataError

ROWS = [{"id": f"r{n}", "instruction": f"Näme river\n“{n}”, please.", "output": f"Rhine, {n}."} for n in range(700)]
CARD = "---\nconfigs:\n- config_name: default\n  data_files: [{{split: train, path: '{}'}}]\n---\n"
TASKS = [Task(row["id"], row["instruction"], row["output"]) for row in ROWS]


def arrow_bytes(rows: list[Any], stream: bool = True) -> bytes:
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=300)
    return bytes(sink.getvalue())


def encoded(rows: list[Any], kind: str) -> bytes:
    """Return the bytes of a file of rows."""
    if kind in (".jsonl", ".ndjson"):
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if kind == ".json":
        return json.dumps(rows, indent=1).encode()
    if kind == ".csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    if kind == ".parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=300)
        return bytes(sink.getvalue())
    return arrow_bytes(rows)


def compressed(content: bytes, compression: str) -> bytes:
    if compression == ".zst":
        return bytes(pa.compress(content, "zstd", asbytes=True))
    return {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[compression](content)


def read(path: object, **fields: Any) -> list[Task]:
    return read_tasks(DataSource(path=str(path), **fields), "reference", with_response=True)


@pytest.mark.parametrize("compression", ["", *COMPRESSIONS])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_compression_is_read(kind: str, compression: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{kind}{compression}"
    path.write_bytes(compressed(encoded(ROWS, kind), compression))
    assert read(path) == TASKS
    assert read(path, limit=3) == TASKS[:3]


@pytest.mark.parametrize("kind", [".parquet", ".arrow"])
def test_conversations_of_several_row_groups_are_read(kind: str, tmp_path: Path) -> None:
    turns = [{"role": role, "content": text} for role, text in (("user", "Count."), ("assistant", "One."))]
    rows = [{"messages": [*turns, turns[0], {"role": "assistant", "content": f"Two, {n % 5}."}]} for n in range(1000)]
    (tmp_path / f"rows{kind}").write_bytes(encoded(rows, kind))
    assert [task.response for task in read(tmp_path / f"rows{kind}")] == [f"Two, {n % 5}." for n in range(1000)]


@pytest.mark.parametrize("kind", KINDS)
def test_cut_responses_are_read_as_unfinished(kind: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / f"rows{kind}.gz"
    rows = [row | {"response_finished": number != 2} for number, row in enumerate(ROWS[:4])]
    path.write_bytes(gzip.compress(encoded(rows, kind)))
    for place in (path, path.parent, f"{path.parent}/*", f"file://{path}"):
        tasks = read(place)
        assert [task.unfinished for task in tasks] == [False, False, True, False]
        write_tasks(tasks, tmp_path / "copy.jsonl")
        assert load_tasks(tmp_path / "copy.jsonl") == tasks
        assert [row["response_finished"] for row in map(Task.to_training_row, tasks)] == [True, True, False, True]


def test_first_of_several_answers_is_finished(tmp_path: Path) -> None:
    turns = [{"role": ("user", "assistant")[n % 2], "content": f"Turn {n}."} for n in range(4)]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns, "response_finished": False}))
    for choice, unfinished in (("first", False), ("last", True), ("all", True)):
        assert [task.unfinished for task in read(tmp_path / "a.jsonl", turns=choice)] == [unfinished]


def test_other_layouts_of_the_same_rows_are_read(tmp_path: Path) -> None:
    for name, content in {
        "lines.json": encoded(ROWS, ".jsonl"),
        "mark.json": b"\xef\xbb\xbf" + encoded(ROWS, ".json"),
        "mark.csv": b"\xef\xbb\xbf" + encoded(ROWS, ".csv"),
        "mac.jsonl": encoded(ROWS, ".jsonl").replace(b"\n", b"\r"),
        "windows.jsonl": encoded(ROWS, ".jsonl").replace(b"\n", b"\r\n\r\n"),
        "file.arrow": arrow_bytes(ROWS, stream=False),
        "two.jsonl.gz": gzip.compress(encoded(ROWS[:9], ".jsonl")) + gzip.compress(encoded(ROWS[9:], ".jsonl")),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name) == TASKS, name


def test_shards_are_read_in_name_order(tmp_path: Path) -> None:
    for place, name in enumerate(("c", "a", "b")):
        (tmp_path / f"part-{name}.jsonl.gz").write_bytes(gzip.compress(encoded(ROWS[place : place + 1], ".jsonl")))
    (tmp_path / "notes.txt").write_text("no data")
    (tmp_path / "_part.csv").write_text("no data")
    expected = [TASKS[1], TASKS[2], TASKS[0]]
    assert read(tmp_path) == read(tmp_path / "*.jsonl.gz") == read(f"file://{tmp_path}/part-?.jsonl.gz") == expected
    (tmp_path / "d.csv").write_bytes(encoded(ROWS, ".csv"))
    for path in (tmp_path, tmp_path / "*"):
        with pytest.raises(DataError, match=r"files of several kinds, e.g. .*d.csv and .*part-a.jsonl.gz; name those"):
            read(path)
    for path in (tmp_path / "*.parquet", tmp_path / "none"):
        (tmp_path / "none").mkdir(exist_ok=True)
        with pytest.raises(DataError, match="no data files"):
            read(path)


def test_fsspec_paths_are_read(tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    for place in range(2):
        system.pipe(f"/rows/{place}.parquet", encoded(ROWS[350 * place : 350 * (place + 1)], ".parquet"))
    system.pipe("/one/rows.jsonl.zst", compressed(encoded(ROWS, ".jsonl"), ".zst"))
    system.pipe("/deep/train/a/0.jsonl", encoded(ROWS, ".jsonl"))
    system.pipe("/deep/test/0.jsonl", encoded(ROWS[:1], ".jsonl"))
    system.pipe("/deep/.cache/0.jsonl", b"not data")
    for path in ("memory://rows", "memory://rows/*.parquet", "memory://one/rows.jsonl.zst", "memory://deep"):
        assert read(path) == TASKS, path
    assert read("memory://deep", split="test") == TASKS[:1]
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path, message in (
        ("memory://absent/rows.jsonl", "memory://absent/rows.jsonl: cannot be read"),
        ("memory://absent", "memory://absent: cannot be read"),
        ("file:///dev/zero", "file:///dev/zero: no data files there"),
        (f"file://{tmp_path}/pipe.jsonl", "pipe.jsonl: not a file"),
        ("nowhere://rows.jsonl", "nowhere://rows.jsonl: cannot be read .*Protocol not known"),
        ("gs://bucket/rows.jsonl", "install"),
    ):
        with pytest.raises(DataError, match=message):
            read(path)


def test_saved_data_set_is_read(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(str(tmp_path / "one"), num_shards=3)
    datasets.DatasetDict({"train": rows, "test": rows.select(range(5))}).save_to_disk(str(tmp_path / "splits"))
    assert read(tmp_path / "one") == read(tmp_path / "splits") == TASKS
    assert read(tmp_path / "splits", split="test") == TASKS[:5]
    with pytest.raises(DataError, match="has no split 'more'; set reference.split to one of train, test"):
        read(tmp_path / "splits", split="more")

    for part in ("one", "splits"):
        assert read(f"file://{tmp_path}/{part}") == TASKS
    assert read(f"file://{tmp_path}/splits", split="test") == TASKS[:5]
    with pytest.raises(DataError, match="has no split 'more'; set reference.split to one of train, test"):
        read(f"file://{tmp_path}/splits", split="more")
    state = tmp_path / "one" / "state.json"
    names = [entry["filename"] for entry in json.loads(state.read_text())["_data_files"]]
    state.write_text(json.dumps({"_data_files": [{"filename": name} for name in names[::-1]]}))
    assert read(f"file://{tmp_path}/one") == read(tmp_path / "one") != TASKS


@pytest.mark.guarantee("paths out of a data set's folder")
@pytest.mark.parametrize("name", ["../secret.arrow", "/tmp/secret.arrow", "a/../../secret.arrow", "..\\secret.arrow"])
def test_saved_data_set_does_not_leave_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret.arrow").write_bytes(arrow_bytes(ROWS))
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(DataError, match="outside of the folder"):
        read(folder)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": [".."]}))
    with pytest.raises(DataError, match="outside of the folder"):
        read(folder, split="..")


@pytest.mark.guarantee("paths out of a data set's folder")
@pytest.mark.parametrize("name", ["../secret.jsonl", "a/../../*.jsonl", "ABSOLUTE", "file://ABSOLUTE"])
def test_card_does_not_leave_its_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "secret.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    name = name.replace("ABSOLUTE", str(tmp_path / "secret.jsonl"))
    (tmp_path / "set" / "README.md").write_text(CARD.format(name))
    with pytest.raises(DataError, match="its card names .*outside of the folder"):
        read(tmp_path / "set")
    (tmp_path / "set" / "README.md").write_text(CARD.format("rows.jsonl"))
    (tmp_path / "link").symlink_to(tmp_path / "set")
    assert read(tmp_path / "set") == read(tmp_path / "link") == TASKS


def tar_bytes(content: bytes, compression: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=f"w:{compression}") as archive:
        member = tarfile.TarInfo("rows.jsonl")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def zip_bytes(content: bytes, before: bytes = b"") -> bytes:
    stream = io.BytesIO(before)
    with ZipFile(stream, "a", ZIP_DEFLATED) as archive:
        archive.writestr("rows.jsonl", content)
    return stream.getvalue()


def parquet_bomb(text: str) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"instruction": ["Go."], "output": [text]})
    pq.write_table(table, sink, compression="zstd", use_dictionary=False, write_statistics=False)
    return bytes(sink.getvalue())


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for a data set with a card."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(files, "FREE", 2**20)
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


BOMB = json.dumps(ROWS[0]).encode() + b" " * 2**22


@pytest.mark.guarantee("decompression bombs")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl.gz", gzip.compress(BOMB), "bytes grow to more than"),
        ("train.txt.gz", gzip.compress(BOMB), "bytes grow to more than"),
        ("train.txt.XZ", lzma.compress(BOMB), "bytes grow to more than"),
        ("train.jsonl", gzip.compress(BOMB), "its name does not say"),
        ("train.jsonl", lzma.compress(BOMB, lzma.FORMAT_ALONE), "its name does not say"),
        ("train.jsonl.xz", lzma.compress(BOMB, lzma.FORMAT_ALONE), "bytes grow to more than"),
        ("train.jsonl.gz-1", gzip.compress(BOMB), "its name does not say"),
        ("train.jsonl.bz2", bz2.compress(BOMB), "an archive"),
        ("train.csv.gz.gz", gzip.compress(gzip.compress(BOMB)), "an archive"),
        ("train.csv.gz", gzip.compress(gzip.compress(BOMB)), "its name does not say"),
        ("train.jsonl", tar_bytes(BOMB, ""), "an archive"),
        ("train.jsonl.gz", tar_bytes(json.dumps(ROWS[0]).encode(), "gz"), "an archive"),
        ("train.tar.gz", tar_bytes(BOMB, "gz"), "an archive"),
        ("train.tgz.tar", tar_bytes(BOMB, "gz"), "an archive"),
        ("train.jsonl", zip_bytes(BOMB), "an archive"),
        ("train.jsonl", zip_bytes(BOMB, before=json.dumps(ROWS[0]).encode() + b"\n"), "an archive"),
        ("train.zip", zip_bytes(BOMB), "an archive"),
        ("train.parquet", parquet_bomb(" " * 2**22), "bytes of column 'output' grow to"),
    ],
)
def test_bomb_in_folder_with_card_is_refused(
    name: str, content: bytes, message: str, data_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_LARGE", 2**20)
    (data_set / "other.jsonl").write_text(json.dumps(ROWS[0]))
    (data_set / name).write_bytes(content)
    (data_set / "README.md").write_text(CARD.format(name))
    with pytest.raises(DataError, match=rf"{name}.*{message}"):
        read(data_set)


@pytest.mark.guarantee("decompression bombs")
def test_file_in_archive_that_a_card_names_is_refused(data_set: Path) -> None:
    (data_set / "rows.zip").write_bytes(zip_bytes("\n".join(map(json.dumps, ROWS)).encode()))
    (data_set / "rows.jsonl").write_text(json.dumps(ROWS[0]))
    (data_set / "README.md").write_text(CARD.format(f"zip://rows.jsonl::{data_set}/rows.zip"))
    with pytest.raises(DataError, match=r"rows.zip: an archive.*unpack it"):
        read(data_set)


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("compression", ["", ".gz", ".xz"])
def test_files_in_folder_with_card_are_read(kind: str, compression: str, data_set: Path) -> None:
    name = f"rows.eval{kind}{compression}"
    (data_set / name).write_bytes(compressed(encoded(ROWS, kind), compression))
    (data_set / "README.md").write_text(CARD.format(name))
    assert read(data_set) == TASKS


@pytest.mark.guarantee("decompression bombs")
@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("line", [b"\n", b" " * 1000 + b"\n", b"x"])
def test_bomb_is_refused(compression: str, line: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FREE", 2**20)
    path = tmp_path / f"bomb.jsonl{compression}"
    path.write_bytes(compressed(line * (4 * 2**20 // len(line)), compression))
    with pytest.raises(DataError, match=r"bomb.jsonl.* bytes grow to more than .*200 times as many is the limit"):
        read(path)


@pytest.mark.parametrize("value", ['"80 inches', '"80" inches'])
def test_stray_quote_in_csv_is_refused(value: str, tmp_path: Path) -> None:
    """Else it makes one answer of all rows that follow."""
    rows = [f"question {number},answer {number}" for number in range(20)]
    rows[11] = f"How tall is a door?,{value}"
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(["instruction,output", *rows]) + "\n")
    with pytest.raises(DataError, match=r"rows.csv, line 13: the row .* not valid CSV .*is a quote not closed"):
        read(path)


@pytest.mark.guarantee("decompression bombs")
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_long_row_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"long{kind}"
    with path.open("wb") as stream:  # a sparse file of 2 GB
        stream.write(
            {".jsonl": b'{"instruction": "', ".json": b'[{"instruction": "', ".csv": b'instruction,output\n"'}[kind]
        )
        stream.seek(2**31)
        stream.write(b"\0")
    with pytest.raises(DataError, match=rf"long{kind}, line [12]: .*longer than 64 MiB"):
        read(path)
    for module in (jsonl, json_list, readers):
        monkeypatch.setattr(module, "LONGEST_ROW", 2000)
    path.write_bytes(encoded([{"instruction": "a\n" * 1500, "output": "b"}], kind))
    with pytest.raises(DataError, match=rf"long{kind}, line \d+: .*(longer|larger) than"):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"instruction,output\na,b\nc\n", "line 3: 1 values, but the header names 2 columns"),
        ("a.csv", b"output,output\na,b\n", "line 1: two columns have the same name"),
        ("a.csv", b"instruction,output\n\xff,b\n", "line 2: not UTF-8 text"),
        ("a.csv", b"instruction,output\na,\n", "line 2: field 'output' is empty"),
        ("a.csv", b'instruction,output\n"a\nb",c\n\nd,""\n', "line 5: field 'output' is empty"),
        ("a.json", b'[{"instruction": "a", "output": "b"},\n {"instruction": }]', "line 2: not valid JSON at entry 2"),
        ("a.json", b'[{"instruction": "a", "output": "b"}', "line 1: not valid JSON at entry 1 .it ends early"),
        ("a.json", b'[{"instruction": "a", "output": "b"}] []', "text after the end of the list"),
        ("a.json", b'[{"instruction": "a", "output": null}]', "entry 1: field 'output' is null"),
        ("a.json", b'{"data": []}', "line 1: field 'instruction' is missing .found: data"),
        ("a.json", b"[]", "has no examples"),
        ("a.json", b"[12, 3]", "entry 1: expected an object with named fields, found int"),
        ("a.jsonl.gz", b'{"instruction": "a"}', "a.jsonl.gz: cannot be read after 0 bytes"),
        ("a.jsonl.xz", lzma.compress(b'{"a": 1}')[:-9], "a.jsonl.xz: cannot be read after"),
        (
            "a.jsonl.zst",
            bytes(pa.compress(b'{"a": 1}', "zstd", asbytes=True))[:-3],
            "a.jsonl.zst: cannot be read after",
        ),
        ("a.arrow", b"ARROW1 nothing", "a.arrow: not a readable Arrow file"),
        ("a.parquet.gz", gzip.compress(b"PAR1 nothing", mtime=0), "a.parquet.gz: not a readable Parquet file"),
    ],
)
def test_broken_file_is_refused_with_its_place(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def refusal_of(read_rows: Callable[[], object]) -> str | None:
    try:
        read_rows()
    except DataError as refusal:
        return str(refusal)
    return None


@pytest.mark.guarantee("broken rows or wrong fields")
@given(st.data(), st.sampled_from(KINDS), st.sampled_from(["", *COMPRESSIONS]))
def test_mutated_file_gives_rows_or_a_named_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str, compression: str
) -> None:
    content = bytearray(encoded([row | {"n": {"m": [1, None]} if kind != ".csv" else 1} for row in ROWS[:6]], kind))
    inside = data.draw(st.booleans())
    content = content if inside else bytearray(compressed(bytes(content), compression))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))]
    path = tmp_path_factory.getbasetemp() / f"mutated{kind}{compression}"
    path.write_bytes(compressed(bytes(content), compression) if inside else bytes(content))
    for drop in (False, True):
        source = DataSource(path=str(path), drop_bad_rows=drop, max_bad_rows=1.0)
        refusal = refusal_of(lambda source=source: list(TaskReader(source, "reference", True)))  # type: ignore[misc]
        assert refusal is None or path.name in refusal


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "instruction",
                    "input",
                    "output",
                    "messages",
                    "conversations",
                    "prompt",
                    "completion",
                    "role",
                    "content",
                    "from",
                    "value",
                    "system",
                    "history",
                    "id",
                    "text",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@pytest.mark.guarantee("broken rows or wrong fields")
@given(
    st.lists(JSON, max_size=3),
    st.sampled_from(["auto", "alpaca", "messages", "sharegpt", "prompt_completion"]),
    st.sampled_from([None, "messages.0", "text"]),
)
def test_any_row_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], format: str, field: str | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "any-row.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = DataSource(path=str(path), format=format, conversation_field=field, turns="last", system_turn="prepend")
    for with_response in (False, True):
        refusal = refusal_of(lambda with_response=with_response: read_tasks(source, "reference", with_response))  # type: ignore[misc]
        assert refusal is None or "any-row.jsonl" in refusal


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_rows_stream(kind: str, tmp_path: Path) -> None:
    """Memory does not grow with the number of rows."""
    rows = [{"instruction": f"{n}", "output": "x" * 1000} for n in range(8000)]
    path = tmp_path / f"many{kind}"
    path.write_bytes(encoded(rows, kind))
    size = os.path.getsize(path) if kind in (".jsonl", ".json", ".csv") else 8_000_000
    del rows
    tracemalloc.start()
    count = sum(1 for _ in readers.file_rows(files.DataFile(str(path), str(path))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 8000
    assert peak < size / 2
