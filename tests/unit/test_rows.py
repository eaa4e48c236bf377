"""Rows on their way to a job: what they held they hold, whatever file, order of columns or batches they come in."""

import random
import subprocess
import sys
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.shards import Shards
from cluster.stage import Stage
from montessori_core import programs
from montessori_core.data.rows import ExampleRow, GenerationRow, Rows, TaskRow, schema_of
from montessori_core.data.tables import EXAMPLES, ROW_GROUP, table_from_rows, write_table
from montessori_core.errors import DataError, UserError
from montessori_core.program import Program
from support import ROOT

_GROUPS = 8
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
PROMPTS = st.fixed_dictionaries(
    {
        "example_ids": st.lists(TEXT, max_size=3),
        "turns": st.lists(TEXT, max_size=3),
        "seeds": st.lists(st.integers(0, 2**64 - 1), max_size=3),
    }
)


class AnyRow(TypedDict):
    """One column of each type."""

    text: str | None
    tokens: list[int] | None
    flag: bool
    number: int | None
    batches: list[list[int]]


ANY = st.fixed_dictionaries(
    {
        "text": st.none() | TEXT,
        "tokens": st.none() | st.lists(st.integers(0, 2**31), max_size=3),
        "flag": st.booleans(),
        "number": st.none() | st.integers(0, 2**64 - 1),
        "batches": st.lists(st.lists(st.integers(0, 2**31), max_size=3), max_size=3),
    }
)


def stage(folder: Path) -> Stage:
    settings = {"rate": 1.0, "most": None, "names": ["ä"]}
    return Stage("p", 1, "m:f", settings, {"file": folder / "x"}, {"file": "0"}, folder)


def read_all(made: Stage, shards: Shards) -> list[dict[str, Any]]:
    return [row for index in range(len(shards)) for row in made.read_rows(index).to_pylist()]


@given(st.lists(PROMPTS, max_size=7) | st.lists(ANY, max_size=7), st.integers(1, 4))
def test_rows_reach_jobs_unchanged(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], size: int
) -> None:
    made = stage(tmp_path_factory.getbasetemp() / "unchanged")
    shards = Shards(Rows.of(rows, AnyRow if rows and "flag" in rows[0] else GenerationRow), size)
    made.write(shards)
    assert read_all(made, shards) == rows
    keys = [made.key(table) for table in shards]  # the driver's, and those of the jobs
    assert keys == [Stage.read(made.folder).key(made.read_rows(index)) for index in range(len(shards))]


def test_numbers_of_untyped_rows_survive(tmp_path: Path) -> None:
    rows = [{"x": 0.1, "n": -3, "ids": [[1], []]}, {"x": float("nan"), "n": None, "ids": None}]
    made, shards = stage(tmp_path), Shards(Rows.of(rows), 1)
    made.write(shards)
    first, second = read_all(made, shards)
    assert first == rows[0]
    assert np.isnan(second.pop("x"))
    assert second == {"n": None, "ids": None}


def test_key_depends_on_rows_alone(tmp_path: Path) -> None:
    made = stage(tmp_path)
    rows = [{"a": n, "b": str(n)} for n in range(9)]
    table = pa.Table.from_pylist(rows)
    others = [table.select(["b", "a"]), pa.concat_tables([table[:4], table[4:]]), pa.concat_tables([table, table])[9:]]
    assert {made.key(other) for other in others} == {made.key(table)}
    assert made.key(table.take([1, 0, *range(2, 9)])) != made.key(table)
    assert made.key(table[:8]) != made.key(table)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"example_id": "e", "instruction": "\ud800", "response": ""}, "half of a surrogate pair"),
        ({"example_id": "e", "instruction": "i"}, r"fields \['example_id', 'instruction'\], expected"),
        ({"example_id": "e", "instruction": None, "response": ""}, "table cannot hold.*instruction"),
        ({"example_id": "e", "instruction": 3, "response": ""}, "table cannot hold"),
    ],
)
def test_row_that_no_table_holds_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Rows.of([row], TaskRow)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An example table of several row groups."""
    path = tmp_path_factory.mktemp("examples") / "examples.parquet"
    same = {"prompt": "p", "raw_output": "o", "response": "r" * 500, "response_finished": True}
    rows: list[dict[str, object]] = [
        same | {"example_id": f"e{n}", "prompt_id": f"p{n // 4}", "instruction": str(n)}
        for n in range(_GROUPS * ROW_GROUP)
    ]
    write_table(table_from_rows(rows, EXAMPLES), path, EXAMPLES)
    return path


def test_rows_of_file_are_those_of_positions(examples: Path) -> None:
    rows = Rows.of_file(examples, EXAMPLES, ExampleRow, 5, 2 * ROW_GROUP + 7)
    assert len(rows) == 2 * ROW_GROUP + 2
    assert rows.column("example_id") == [f"e{n}" for n in range(5, 2 * ROW_GROUP + 7)]
    drawn = random.Random(0).sample(range(len(rows)), 50)
    for positions in (drawn, sorted(drawn)):
        assert rows[np.array(positions)].column("example_id") == [f"e{n + 5}" for n in positions]
    assert [len(table) for table in rows[:7].tables(3)] == [3, 3, 1]
    assert next(rows.tables(3)).schema == schema_of(ExampleRow)


PLAN = """
import sys
from pathlib import Path
import pyarrow as pa
from cluster.shards import Shards
from cluster.stage import Stage
from montessori_core.data.rows import ExampleRow, Rows
from montessori_core.data.tables import EXAMPLES

examples, folder, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
made = Stage("p", 1, "m:f", {}, {}, {}, folder)
shards = Shards(Rows.of_file(examples, EXAMPLES, ExampleRow, last=count), 100)
keys = [made.key(table) for table in shards]
made.write(shards)
made.write(shards)  # which compares
assert made.key(made.read_rows(3)) == keys[3]
print(pa.default_memory_pool().max_memory())
"""


def test_memory_of_driver_does_not_grow_with_rows(examples: Path, tmp_path: Path) -> None:
    """Each size in a process of its own, since Arrow counts the most it ever held."""

    def peak(count: int) -> int:
        command = [sys.executable, "-c", PLAN, str(examples), str(tmp_path / str(count)), str(count)]
        return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=ROOT).stdout)

    assert peak(_GROUPS * ROW_GROUP) < 1.2 * peak(_GROUPS * ROW_GROUP // 2)


def test_rows_are_written_once(tmp_path: Path) -> None:
    made, shards = stage(tmp_path), Shards(Rows.of([{"n": n} for n in range(5)]), 2)
    made.write(shards)
    files = [made.rows_file, tmp_path / "stage.json"]
    written = [(file.stat().st_ino, file.stat().st_mtime_ns) for file in files]
    made.write(shards)
    assert [(file.stat().st_ino, file.stat().st_mtime_ns) for file in files] == written
    made.write(Shards(Rows.of([{"n": n} for n in range(6)]), 2))
    assert made.read_rows(2).to_pylist() == [{"n": 4}, {"n": 5}]


@pytest.mark.guarantee("damaged results")
@given(st.data())
def test_damaged_rows_file_is_refused_and_rewritten(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    made = stage(tmp_path_factory.getbasetemp() / "damaged-rows")
    rows = [{"example_id": f"e{n}", "instruction": "ä" * n, "response": "r"} for n in range(9)]
    shards = Shards(Rows.of(rows, TaskRow), 4)
    made.write(shards)
    content = bytearray(made.rows_file.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    made.rows_file.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    refusal = f"{made.rows_file}: resume the run, which writes it again"
    try:
        held = read_all(made, shards)
    except UserError as error:
        held, refusal = rows, str(error)
    assert held == rows
    assert refusal.startswith(str(made.rows_file))
    assert refusal.endswith("resume the run, which writes it again")
    made.write(shards)
    assert read_all(made, shards) == rows


def test_missing_rows_file_is_named(tmp_path: Path) -> None:
    made = stage(tmp_path)
    made.write(Shards(Rows.of([{"n": 1}]), 1))
    made.rows_file.unlink()
    with pytest.raises(UserError, match=r"rows.parquet: missing; resume the run, which writes it again"):
        made.read_rows(0)


@pytest.mark.parametrize("program", [one for one in vars(programs).values() if isinstance(one, Program)])
def test_every_program_declares_its_rows(program: Program[Any]) -> None:
    assert schema_of(program.rows).names


def test_rows_of_file_keep_their_key(tmp_path: Path) -> None:
    rows = [
        {"example_id": f"e{n}", "prompt_id": f"e{n}", "instruction": "ä", "response": "b", "response_finished": True}
        for n in range(5)
    ]
    kept, schema = Rows.of(rows, ExampleRow), schema_of(ExampleRow)
    write_table(next(kept.tables()), tmp_path / "rows.parquet", schema)
    read = Rows.of_file(tmp_path / "rows.parquet", schema, ExampleRow)
    first, second = (next(source[np.arange(1, 4)].tables()) for source in (kept, read))
    assert list(first.to_pydict().items()) == list(second.to_pydict().items())
    assert stage(tmp_path).key(first) == stage(tmp_path).key(second)
