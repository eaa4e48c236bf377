"""Shards committed piece by piece: what a killed job has finished is kept, and the part is that of an undisturbed run."""

import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import test_fanout as local

from cluster.fanout import ShardsFailed, fan_out
from cluster.stage import Stage
from montessori_core.config import Resources

folder = local.folder
TABLES = local.PROGRAM.replace(
    'output.write_text(json.dumps([row["n"] ** 2 for row in rows]))',
    "import pyarrow as pa, pyarrow.parquet as pq\n"
    '        table = pa.table({"square": [row["n"] ** 2 for row in rows]})\n'
    '        pq.write_table(table.replace_schema_metadata({"note": "kept"}), output)',
)
SHARDS = [[{"n": n} for n in range(10)], [{"n": n} for n in range(10, 15)]]


def stage(folder: Path, version: int = 1) -> Stage:
    (folder / "squares_program.py").write_text(TABLES)
    settings = {"folder": str(folder), "seconds": 0.0}
    return Stage(
        "squares", version, "squares_program:open_squares", settings, {}, {}, folder / "stage", ".parquet", piece_rows=3
    )


def run(folder: Path, version: int = 1) -> list[Path]:
    return fan_out(stage(folder, version), SHARDS, Resources(cpus_per_process=1), local.CLUSTER, python=sys.executable)


def squares(parts: list[Path]) -> list[int]:
    return [value for part in parts for value in pq.read_table(part)["square"].to_pylist()]


EXPECTED = [n**2 for n in range(15)]


def test_killed_job_loses_only_the_piece_it_was_at_work_on(folder: Path) -> None:
    (folder / "kill-7").touch()
    parts = run(folder)
    assert squares(parts) == EXPECTED
    assert [local.computed(folder).count(n) for n in range(10)] == [1, 1, 1, 1, 1, 1, 2, 2, 1, 1]
    assert not list((folder / "stage" / "pieces").iterdir())
    assert pq.read_schema(parts[0]).metadata == {b"note": b"kept"}
    undisturbed = folder / "undisturbed"
    undisturbed.mkdir()
    assert [part.read_bytes() for part in run(folder_of(undisturbed, folder))] == [part.read_bytes() for part in parts]


def folder_of(fresh: Path, imported: Path) -> Path:
    """A fresh folder; workers still import the program from the first, which has the same text."""
    (fresh / "squares_program.py").write_text((imported / "squares_program.py").read_text())
    return fresh


def test_damaged_pieces_are_computed_again_and_those_of_another_version_never_used(folder: Path) -> None:
    (folder / "fail-7").touch()
    with pytest.raises(ShardsFailed):
        run(folder)
    pieces = sorted((folder / "stage" / "pieces").glob("00000-*"))
    assert len(pieces) == 2
    pieces[0].write_bytes(pieces[0].read_bytes()[:-9])
    (folder / "fail-7").unlink()
    assert squares(run(folder)) == EXPECTED
    assert local.computed(folder).count(0) == 2
    assert local.computed(folder).count(3) == 1
    assert squares(run(folder, version=2)) == EXPECTED
    assert local.computed(folder).count(3) == 2
