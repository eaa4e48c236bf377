"""Partial commits: a lost job loses half a minute, and the part equals that of an uninterrupted run."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.fanout import ShardsFailed, fan_out
from cluster.partial_commits import ShardRecorder, compute_rows, remove_partial_files
from cluster.progress import Progress
from cluster.stage import Stage
from montessori_core.config import Resources
from montessori_core.program import Recorder, Row, RowProgram
from support import squares as local
from support.row_programs import Interrupted, as_shards

folder = local.forking_folder
SCHEMA = pa.schema([pa.field("square", pa.int64(), nullable=False), pa.field("text", pa.string())], {"note": "kept"})
HEAD = """
import json, os, signal, time
from pathlib import Path
import pyarrow as pa
from montessori_core.program import RowProgram

SCHEMA = pa.schema([pa.field("square", pa.int64(), nullable=False), pa.field("text", pa.string())], {"note": "kept"})
"""
PROGRAM = HEAD + local.PROGRAM.replace(
    "def compute(rows, output, report):", "def compute(rows, recorder):\n        recorder.progress(0)"
).replace(
    "report(number)",
    'recorder.finish(number - 1, [{"square": row["n"] ** 2, "text": None}])\n            recorder.progress(number)',
).replace('output.write_text(json.dumps([row["n"] ** 2 for row in rows]))', "").replace(
    "return compute", "return RowProgram(SCHEMA, compute)"
)
CHILD = """
import sys
from pathlib import Path
from cluster.partial_commits import compute_rows
from squares_program import open_squares

folder = Path(sys.argv[1])
program = open_squares({"folder": str(folder), "seconds": 0.02}, {})
rows = [{"n": n} for n in range(40)]
compute_rows(program, rows, folder / "partial", 3, "key", folder / "part.parquet", lambda done: None, seconds=0.25)
"""
SHARDS: list[list[Row]] = [[{"n": n} for n in range(10)], [{"n": n} for n in range(10, 15)]]
EXPECTED = [n**2 for n in range(15)]


def records_of(row: Row) -> list[Row]:
    """Return zero, one or two records of a row."""
    return [{"square": row["n"] ** 2, "text": None if row["n"] % 5 else "five"}] * (row["n"] % 3)


def compute(
    path: Path, rows: list[Row], batches: list[list[int]] | None = None, stop: int | None = None, seconds: float = 0.0
) -> list[int]:
    """Compute a shard in batches of rows, up to a number of batches; return the rows that were computed."""
    computed = []

    def work(given: list[Row], recorder: Recorder) -> None:
        recorder.progress(0)
        for number, batch in enumerate(batches or [[position] for position in range(len(given))]):
            for position in batch:
                if position < len(given):
                    computed.append(given[position]["n"])
                    recorder.finish(position, records_of(given[position]))
            recorder.progress(len(computed))
            if number + 1 == stop:
                raise Interrupted

    program = RowProgram(SCHEMA, work)
    try:
        compute_rows(program, rows, path / "partial", 0, "key", path / "part.parquet", lambda done: None, seconds)
    except Interrupted:
        assert not (path / "part.parquet").exists()
    return computed


def stage(folder: Path, version: int = 1) -> Stage:
    (folder / "squares_program.py").write_text(PROGRAM)
    settings = {"folder": str(folder), "seconds": 0.0}
    return Stage("squares", version, "support.squares_program:open_squares", settings, {}, {}, folder / "stage")


def run(folder: Path, version: int = 1) -> list[Path]:
    return fan_out(stage(folder, version), as_shards(*SHARDS), Resources(cpus_per_process=1), local.CLUSTER)


def squares(parts: list[Path]) -> list[int]:
    return [value for part in parts for value in pq.read_table(part)["square"].to_pylist()]


@pytest.mark.guarantee("job fails or is stopped in the middle of a shard")
def test_failed_job_keeps_its_finished_rows(folder: Path) -> None:
    (folder / "fail-7").touch()
    with pytest.raises(ShardsFailed):
        run(folder)
    (folder / "fail-7").unlink()
    parts = run(folder)
    assert squares(parts) == EXPECTED
    assert [local.computed(folder).count(n) for n in range(10)] == [1, 1, 1, 1, 1, 1, 1, 2, 1, 1]
    assert not (folder / "stage" / "partial").exists()
    assert pq.read_schema(parts[0]).metadata == {b"note": b"kept"}


@pytest.mark.parametrize("advances", [True, False])
def test_time_limits_count_until_a_shard_advances(folder: Path, advances: bool) -> None:
    """Each job reaches its limit after one more row, or before it; two limits without progress are too many."""
    limited = stage(folder)
    line = "recorder.progress(number)" if advances else 'time.sleep(settings["seconds"])'
    program = PROGRAM.replace(line, f"{line}\n            raise UncompletedJobError('requeued too often')")
    (folder / "squares_program.py").write_text("from submitit.core.utils import UncompletedJobError\n" + program)
    rows: list[Row] = [{"n": n} for n in range(4)]
    resources = Resources(cpus_per_process=1, infrastructure_retries=1)
    if advances:
        assert squares(fan_out(limited, as_shards(rows), resources, local.CLUSTER)) == [0, 1, 4, 9]
        assert local.computed(folder) == [0, 1, 2, 3]
    else:
        with pytest.raises(
            ShardsFailed, match=r"requeued too often; 2 times; give the stage more time; .*time_limit_minutes=MINUTES"
        ):
            fan_out(limited, as_shards(rows), resources, local.CLUSTER)


@pytest.mark.slow
def test_pace_ignores_resumed_rows(folder: Path) -> None:
    """A row takes 0.2 s; resumed rows would lower the mean."""
    slow = replace(stage(folder), settings={"folder": str(folder), "seconds": 0.2})
    (folder / "fail-12").touch()
    rows: list[Row] = [{"n": n} for n in range(20)]
    left: list[float] = []

    def look(progress: Progress) -> None:
        if progress.seconds_left is not None and progress.rows_done < 20:
            left.append(progress.seconds_left / (20 - progress.rows_done))

    with pytest.raises(ShardsFailed):
        fan_out(slow, as_shards(rows), Resources(cpus_per_process=1), local.CLUSTER)
    (folder / "fail-12").unlink()
    fan_out(slow, as_shards(rows), Resources(cpus_per_process=1), local.CLUSTER, look)
    assert left
    assert min(left) >= 0.2


def test_killed_job_is_recomputed(folder: Path) -> None:
    (folder / "kill-7").touch()
    assert squares(run(folder)) == EXPECTED
    assert local.computed(folder).count(7) == 2
    assert local.computed(folder).count(12) == 1


@pytest.mark.guarantee("job killed in the middle of a shard")
def test_killed_job_loses_less_than_an_interval(folder: Path) -> None:
    (folder / "squares_program.py").write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])}
    draw, kills = random.Random(3), 0
    while not (folder / "part.parquet").exists():
        before = len(local.computed(folder))
        job = subprocess.Popen([sys.executable, "-c", CHILD, str(folder)], env=environment)
        moment = before + draw.randint(14, 22)
        while job.poll() is None and len(local.computed(folder)) < moment:
            time.sleep(0.002)
        if job.poll() is None:
            job.kill()
            kills += 1
        assert job.wait() in (0, -signal.SIGKILL)
    assert squares([folder / "part.parquet"]) == [n**2 for n in range(40)]
    # Each row sleeps 0.02 s, so at least 14 begin within 0.25 s.
    assert kills >= 2
    assert len(local.computed(folder)) <= 40 + 14 * kills
    undisturbed = folder / "undisturbed"
    undisturbed.mkdir()
    subprocess.run([sys.executable, "-c", CHILD, str(undisturbed)], check=True, env=environment)
    assert (undisturbed / "part.parquet").read_bytes() == (folder / "part.parquet").read_bytes()


@pytest.mark.guarantee("any number of interruptions")
@given(st.data())
def test_table_does_not_depend_on_interruptions(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    rows: list[Row] = [{"n": n} for n in data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=12))]
    calm, stormy = tmp_path_factory.mktemp("calm"), tmp_path_factory.mktemp("stormy")
    compute(calm, rows)
    times: list[int] = []
    while not (stormy / "part.parquet").exists():
        order = data.draw(st.permutations(range(len(rows))))
        size = data.draw(st.integers(1, len(rows)))
        batches = [order[start : start + size] for start in range(0, len(rows), size)]
        times += compute(stormy, rows, batches, data.draw(st.integers(1, 9)), data.draw(st.sampled_from([0.0, 60.0])))
    assert (stormy / "part.parquet").read_bytes() == (calm / "part.parquet").read_bytes()
    assert sorted(times) == sorted(row["n"] for row in rows)  # an error loses no finished row


def test_rows_between_progress_reports_share_a_commit(tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    partial.mkdir()
    recorder = ShardRecorder(partial, 0, "key", 4, SCHEMA, lambda done: None, 0.0)
    for position in range(3):
        recorder.finish(position, [])
        assert not list(partial.iterdir())
    recorder.progress(3)
    assert len(list(partial.iterdir())) == 1
    assert ShardRecorder(partial, 0, "key", 4, SCHEMA, lambda done: None, 0.0).unfinished == [3]
    assert ShardRecorder(partial, 0, "other", 4, SCHEMA, lambda done: None, 0.0).unfinished == [0, 1, 2, 3]
    assert ShardRecorder(partial, 1, "key", 4, SCHEMA, lambda done: None, 0.0).unfinished == [0, 1, 2, 3]


def test_program_that_leaves_rows_unfinished_fails(tmp_path: Path) -> None:
    program = RowProgram(SCHEMA, lambda rows, recorder: recorder.finish(1, []))
    with pytest.raises(RuntimeError, match="2 of 3 rows unfinished"):
        compute_rows(program, SHARDS[0][:3], tmp_path / "partial", 0, "key", tmp_path / "part", lambda done: None)
    assert not (tmp_path / "part").exists()


@pytest.mark.guarantee("damaged result or manifest")
@pytest.mark.parametrize("damage", ["cut", "records", "positions", "another table", "name"])
def test_damaged_partial_commit_is_recomputed(tmp_path: Path, damage: str) -> None:
    rows: list[Row] = [{"n": n} for n in range(8)]
    compute(tmp_path, rows, [[0, 1, 2, 3, 4]], stop=1)
    [file] = (tmp_path / "partial").iterdir()
    content = file.read_bytes()
    match damage:
        case "cut":
            file.write_bytes(content[:-9])
        case "records":
            file.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
        case "positions":
            assert content.count(b"[[0, 0], [1, 1]") == 1
            file.write_bytes(content.replace(b"[[0, 0], [1, 1]", b"[[0, 0], [7, 1]"))
        case "another table":
            pq.write_table(pa.table({"square": [1]}), file)
        case "name":
            file.rename(file.with_name(file.name.replace("key", "old")))
    assert compute(tmp_path, rows) == list(range(8))
    assert squares([tmp_path / "part.parquet"]) == [r["square"] for row in rows for r in records_of(row)]


@pytest.mark.guarantee("result of another configuration")
def test_partial_commits_of_another_version_are_not_used(folder: Path) -> None:
    (folder / "fail-7").touch()
    with pytest.raises(ShardsFailed):
        run(folder)
    (folder / "fail-7").unlink()
    assert squares(run(folder, version=2)) == EXPECTED
    assert local.computed(folder).count(3) == 2


def test_two_jobs_can_compute_one_shard(tmp_path: Path) -> None:
    rows: list[Row] = [{"n": n} for n in range(6)]
    other = tmp_path / "part-of-the-first.parquet"

    def slow(given: list[Row], recorder: Recorder) -> None:
        for position, row in enumerate(given):
            recorder.finish(position, records_of(row))
            recorder.progress(position + 1)
            if position == 2:  # another job computes the shard and removes the partial files of both
                assert compute(tmp_path, rows) == [3, 4, 5]
                (tmp_path / "part.parquet").rename(other)
                remove_partial_files(tmp_path / "partial", 0)
                assert not list((tmp_path / "partial").iterdir())

    program = RowProgram(SCHEMA, slow)
    part = tmp_path / "part.parquet"
    compute_rows(program, rows, tmp_path / "partial", 0, "key", part, lambda done: None, 0.0)
    assert part.read_bytes() == other.read_bytes()


def steps(path: Path, stop: int, drafts_of: Callable[[Mapping[int, Any]], Mapping[int, Any]]) -> list[tuple[int, int]]:
    """Run four rows of five steps each, up to `stop` steps; return the steps taken."""
    taken = []

    def work(given: list[Row], recorder: Recorder) -> None:
        drafts: dict[int, Any] = {}
        for position, row in enumerate(given):
            for step in range(recorder.drafts.get(position, {"3": 0})["3"], 5):
                if len(taken) == stop:
                    raise Interrupted
                taken.append((row["n"], step))
                drafts = {position: {3: step + 1}}
                recorder.keep(lambda drafts=drafts: drafts_of(drafts))  # type: ignore[misc]
            recorder.finish(position, [{"square": row["n"] ** 2, "text": None}])
            recorder.progress(position + 1)

    rows: list[Row] = [{"n": n} for n in range(4)]
    part = path / "part.parquet"
    with suppress(Interrupted):
        compute_rows(RowProgram(SCHEMA, work), rows, path / "partial", 0, "key", part, lambda done: None, 0.0)
    return taken


@pytest.mark.guarantee("job killed in the middle of a shard")
def test_drafts_resume_unfinished_rows(tmp_path: Path) -> None:
    taken = steps(tmp_path, 8, lambda drafts: drafts)
    taken += steps(tmp_path, 0, lambda drafts: drafts)  # a job that dies at once keeps the drafts of the previous one
    taken += steps(tmp_path, 100, lambda drafts: drafts)
    assert taken == [(n, step) for n in range(4) for step in range(5)]
    assert squares([tmp_path / "part.parquet"]) == [0, 1, 4, 9]


def test_draft_is_kept_until_replaced(tmp_path: Path) -> None:
    assert steps(tmp_path, 3, lambda drafts: drafts | {2: {3: 4}})[-1] == (0, 2)
    assert steps(tmp_path, 3, lambda drafts: drafts)[-1] == (1, 0)
    assert steps(tmp_path, 100, lambda drafts: drafts) == [(1, 1), (1, 2), (1, 3), (1, 4), (2, 4)] + [
        (3, step) for step in range(5)
    ]


@pytest.mark.guarantee("damaged result or manifest")
def test_damaged_draft_is_not_used(tmp_path: Path) -> None:
    steps(tmp_path, 3, lambda drafts: drafts)
    [file] = (tmp_path / "partial").glob("*-drafts.json")
    content = file.read_text()
    for damaged in (content.replace(": 3}", ": 2}"), content[:-5], "[]"):
        assert damaged != content
        file.write_text(damaged)
        assert steps(tmp_path, 1, lambda drafts: {}) == [(0, 0)]


def test_drafts_are_requested_when_due(tmp_path: Path) -> None:
    (tmp_path / "partial").mkdir()
    recorder = ShardRecorder(tmp_path / "partial", 0, "key", 1, SCHEMA, lambda done: None, 60.0)
    recorder.keep(lambda: pytest.fail("a minute has not passed"))


@pytest.mark.guarantee("job fails or is stopped in the middle of a shard")
def test_termination_signal_commits_finished_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(number: int, frame: object) -> None:
        assert len(list((tmp_path / "partial").glob("*.parquet"))) == 1
        raise Interrupted

    def work(given: list[Row], recorder: Recorder) -> None:
        recorder.finish(0, records_of(given[0]))
        os.kill(os.getpid(), signal.SIGUSR2)
        pytest.fail("the job did not leave")

    before = signal.signal(signal.SIGUSR2, leave)
    try:
        with pytest.raises(Interrupted):
            compute_rows(
                RowProgram(SCHEMA, work),
                SHARDS[0],
                tmp_path / "partial",
                0,
                "key",
                tmp_path / "part",
                lambda done: None,
            )
        assert signal.getsignal(signal.SIGUSR2) is leave
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert compute(tmp_path, SHARDS[0]) == list(range(1, 10))


def test_signal_during_commit_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "partial").mkdir()

    def recorder() -> ShardRecorder:
        return ShardRecorder(tmp_path / "partial", 0, "key", 3, SCHEMA, lambda done: None, 60.0)

    leaving = recorder()

    def interrupted(*arguments: Any) -> None:
        monkeypatch.undo()
        leaving.commit()  # in the signal handler, which does not return
        raise Interrupted

    monkeypatch.setattr("cluster.partial_commits.write_table", interrupted)
    leaving.finish(0, [{"square": 0, "text": None}])
    with pytest.raises(Interrupted):
        leaving.commit()
    assert recorder().unfinished == [1, 2]


def test_progress_counts_rows_of_earlier_jobs(tmp_path: Path) -> None:
    rows: list[Row] = [{"n": n} for n in range(5)]
    compute(tmp_path, rows, [[0, 3]], stop=1)
    seen: list[float] = []

    def work(given: list[Row], recorder: Recorder) -> None:
        for done in (0.0, 0.25, 0.125, 9.0):  # progress neither falls nor exceeds the end
            recorder.progress(done)
        for position in range(len(given)):
            recorder.finish(position, [])

    compute_rows(RowProgram(SCHEMA, work), rows, tmp_path / "partial", 0, "key", tmp_path / "part", seen.append)
    assert seen == [2.0, 2.25, 2.25, 5.0]
