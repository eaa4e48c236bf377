"""Splits of a folder or URL, by the names of its files."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from montessori_core.config import DataSource
from montessori_core.data.hub import hub_rows
from montessori_core.data.sources import Task, read_tasks
from montessori_core.errors import DataError

ROWS = [{"id": f"r{n}", "instruction": f"Name river {n}.", "output": f"Rhine, {n}."} for n in range(5)]


def encoded(rows: list[dict[str, str]], kind: str) -> bytes:
    if kind == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def read(path: object, **fields: Any) -> list[Task]:
    return read_tasks(DataSource(path=str(path), **fields), "reference", with_response=True)


def write_files(folder: Path, rows: dict[str, int], kind: str = ".jsonl") -> None:
    """Write files with one row each, by its place in ROWS."""
    for name, place in rows.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content = encoded(ROWS[place : place + 1], kind)
        (folder / f"{name}{kind}").write_bytes(content)


SPLITS = {"train-0": 0, "x_train_1": 1, "test": 2, "dev.v1": 3, "notes": 4}
FOLDERS = {"training/a": 0, "my-train/b": 1, "test/c": 2, "val/d": 3}
SHARDS = {f"data/{name}-00000-of-00002": place for place, name in enumerate(("train_sft", "train_gen", "test_sft"))}


@pytest.mark.parametrize("kind", [".jsonl", ".csv"])
@pytest.mark.parametrize(
    ("names", "split", "places"),
    [
        (SPLITS, "train", [0, 1]),
        (SPLITS, "test", [2]),
        (SPLITS, "validation", [3]),
        (SPLITS, "more", "test, train, validation"),
        (FOLDERS, "train", [1, 0]),
        (FOLDERS, "validation", [3]),
        (SHARDS, "train_sft", [0]),
        (SHARDS, "train", "test_sft, train_gen, train_sft"),
        ({"part-00000-of-00002": 0, "part-00001-of-00002": 1}, "train", [0, 1]),
        ({"a/part": 0, "b/part": 1, ".cache/part": 2, "_more/part": 3}, "train", [0, 1]),
    ],
)
def test_folder_is_read_by_split(
    names: dict[str, int], split: str, places: list[int] | str, kind: str, tmp_path: Path
) -> None:
    """With and without a data card; a URL, whose subfolders are not read, as a folder of this machine."""
    write_files(tmp_path / "set", names, kind)
    (tmp_path / "set" / "README.md").write_text("---\nlicense: mit\n---\nconfigs: none\n")
    flat = all("/" not in name for name in names)
    for path in (tmp_path / "set", *([f"file://{tmp_path}/set"] if flat else [])):
        if isinstance(places, str):
            with pytest.raises(DataError, match=f"has no split {split!r}; set reference.split to one of {places}"):
                read(path, split=split)
        else:
            assert read(path, split=split) == [Task(*ROWS[place].values()) for place in places]


def test_split_of_folder_equals_that_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for number, names in enumerate((SPLITS, FOLDERS, SHARDS)):
        folder = tmp_path / str(number)
        write_files(folder, names)
        splits = {"train", "validation", "test"} if names is not SHARDS else {"train_sft", "train_gen", "test_sft"}
        for split in splits:
            source = DataSource(path=str(folder), split=split)
            expected = [row["id"] for _, row in hub_rows(source, "reference")]
            assert sorted(task.example_id for task in read(folder, split=split)) == sorted(expected)


def test_split_folder_is_read_as_a_flat_one(tmp_path: Path) -> None:
    """Compression, and cells of CSV that look like numbers, do not depend on a folder's names."""
    rows = [{"instruction": "Add 2 and 2.", "output": "4"}, {"instruction": "Add 2 and 3.", "output": "5"}]
    for name, content in {
        "train.csv": encoded(rows, ".csv"),
        "test.csv": encoded(rows[:1], ".csv"),
        "train.jsonl.zst": bytes(pa.compress(encoded(rows, ".jsonl"), "zstd", asbytes=True)),
    }.items():
        folder = tmp_path / name.partition(".")[2]
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        (folder / "README.md").write_text("# Rows\n")
    for kind in ("csv", "jsonl.zst"):
        assert [task.response for task in read(tmp_path / kind)] == ["4", "5"]
