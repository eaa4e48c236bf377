"""Partial commits: finished rows of a shard, written every 30 seconds, so that a lost job loses no more than that.

A partial file holds the records of some rows. Its name has the shard's index and key, so that rows of other shards or
settings are never used, and a hash of the positions inside. It is removed when its shard is done.
"""

import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow as pa

from cluster.records import DraftRows, read_record
from montessori_core.data.tables import read_table, table_from_rows, write_table
from montessori_core.errors import DataError
from montessori_core.files import hash_json, write_json
from montessori_core.program import Report, Row, RowProgram

COMMIT_SECONDS = 30.0
"""Seconds between two partial commits."""
_POSITIONS = b"montessori.positions"
"""Metadata of a partial file: [[position in the shard, number of its records], ...] in the order of the records."""


def compute_rows(
    program: RowProgram[Any],
    rows: list[Row],
    folder: Path,
    index: int,
    key: str,
    output: Path,
    report: Report,
    seconds: float = COMMIT_SECONDS,
) -> None:
    """Compute the rows of a shard that are in no partial file, and write the table of all its rows.

    The bytes of the table depend only on rows and program, not on interruptions.

    Args:
        program: computes the rows.
        rows: of the shard.
        folder: the stage's folder of partial files.
        index: of the shard.
        key: of the shard.
        output: path of the table.
        report: called with the number of finished rows of the shard.
        seconds: between two partial commits.

    Raises:
        RuntimeError: the program returned before all rows were finished.
    """
    folder.mkdir(exist_ok=True)
    recorder = ShardRecorder(folder, index, key, len(rows), program.schema, report, seconds)
    if recorder.unfinished:
        try:
            with _commit_before_leaving(recorder):
                program.compute([rows[position] for position in recorder.unfinished], recorder)
        except BaseException:
            recorder.commit()
            raise
    write_table(recorder.join(), output, program.schema)


def remove_partial_files(folder: Path, index: int) -> None:
    """Remove the partial files of a shard that is done."""
    for path in folder.glob(f"{index:05d}-*"):
        path.unlink(missing_ok=True)


class ShardRecorder:
    """The `Recorder` of a shard.

    The program counts positions among the unfinished rows, files count them in the shard. Two jobs may compute the same
    shard: each joins the rows it has in memory, so that neither needs files that the other may remove.

    Attributes:
        unfinished: positions in the shard of the rows to compute.
        drafts, finished_before: see `Recorder`.
    """

    def __init__(
        self, folder: Path, index: int, key: str, rows: int, schema: pa.Schema, report: Report, seconds: float
    ) -> None:
        """Read the partial files of a shard; damaged files are ignored."""
        self._stem = folder / f"{index:05d}-{key[:16]}"
        self._rows, self._schema, self._report, self._seconds = rows, schema, report, seconds
        self._tables: dict[int, pa.Table] = {}
        for path in sorted(folder.glob(f"{self._stem.name}-*.parquet")):
            self._tables |= _read_partial(path, schema)
        self._pending: dict[int, list[Row]] = {}
        self.unfinished = [position for position in range(rows) if position not in self._tables]
        self.finished_before = rows - len(self.unfinished)
        record = read_record(self._draft_file, DraftRows)
        kept = json.loads(record.drafts) if record and record.sha256 == hash_json(record.drafts) else {}
        self._drafts = {position: kept[str(position)] for position in self.unfinished if str(position) in kept}
        self.drafts: Mapping[int, Any] = {
            number: self._drafts[position]
            for number, position in enumerate(self.unfinished)
            if position in self._drafts
        }
        self._committed = self._drafted = time.monotonic()
        self._reached = 0.0

    @property
    def _draft_file(self) -> Path:
        return self._stem.with_name(f"{self._stem.name}-drafts.json")

    def finish(self, position: int, records: list[Row]) -> None:
        """See `Recorder`."""
        self._pending[self.unfinished[position]] = records

    def keep(self, drafts: Callable[[], Mapping[int, Any]]) -> None:
        """See `Recorder`."""
        if time.monotonic() - self._drafted < self._seconds:
            return
        self.commit()
        offered = {self.unfinished[number]: draft for number, draft in drafts().items()}
        drafts_by_position = self._drafts | offered  # rows that the program has not reached keep their drafts
        self._drafts = {p: draft for p, draft in drafts_by_position.items() if p not in self._tables}
        text = json.dumps(self._drafts)
        write_json({"drafts": text, "sha256": hash_json(text)}, self._draft_file, durable=False)
        self._drafted = time.monotonic()

    def progress(self, done: float) -> None:
        """See `Recorder`."""
        self._reached = min(max(self._reached, done), float(len(self.unfinished)))
        self._report(self.finished_before + self._reached)
        if time.monotonic() - self._committed >= self._seconds:
            self.commit()

    def commit(self) -> None:
        """Write the rows that were finished since the last commit; a signal handler may interrupt it with another commit."""
        pending = dict(self._pending)
        table, positions = self._hold(pending)
        if positions:
            metadata = {**(self._schema.metadata or {}), _POSITIONS: json.dumps(positions)}
            path = self._stem.with_name(f"{self._stem.name}-{hash_json(positions)[:16]}.parquet")
            write_table(table.replace_schema_metadata(metadata), path, self._schema)
        for position in pending:
            self._pending.pop(position, None)
        self._committed = time.monotonic()

    def join(self) -> pa.Table:
        """Return the records of all rows, in their order.

        Raises:
            RuntimeError: rows are unfinished.
        """
        self._hold(self._pending)
        missing = [position for position in self.unfinished if position not in self._tables]
        if missing:
            raise RuntimeError(f"the program returned with {len(missing)} of {self._rows} rows unfinished")
        tables = [self._tables[position] for position in range(self._rows)]
        return pa.concat_tables([self._schema.empty_table(), *tables])

    def _hold(self, pending: Mapping[int, list[Row]]) -> tuple[pa.Table, list[list[int]]]:
        """Turn pending rows into a table and keep it; return it and the positions of its records."""
        table = table_from_rows([record for records in pending.values() for record in records], self._schema)
        positions = [[position, len(records)] for position, records in pending.items()]
        self._tables |= _split(table, positions)
        return table, positions


def _split(table: pa.Table, positions: list[list[int]]) -> dict[int, pa.Table]:
    """Return the records of each row."""
    tables, start = {}, 0
    for position, count in positions:
        tables[position] = table.slice(start, count)
        start += count
    return tables


def _read_partial(path: Path, schema: pa.Schema) -> dict[int, pa.Table]:
    """Return the records of each row in a partial file; nothing if it is damaged."""
    try:
        table = read_table(path, schema)
        positions = json.loads((table.schema.metadata or {})[_POSITIONS])
    except (DataError, LookupError, ValueError):
        return {}
    # Checksums cover the records, the file's name covers the metadata.
    return _split(table, positions) if path.stem.endswith(hash_json(positions)[:16]) else {}


@contextmanager
def _commit_before_leaving(recorder: ShardRecorder) -> Iterator[None]:
    """Commit when the scheduler's signal ends the job, then let submitit requeue it."""
    leave = signal.getsignal(signal.SIGUSR2)
    if not callable(leave):
        yield
        return

    def commit_and_leave(number: int, frame: FrameType | None) -> None:
        try:
            recorder.commit()
        finally:
            leave(number, frame)

    signal.signal(signal.SIGUSR2, commit_and_leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR2, leave)
