"""A stage of work cut into shards, and the folder that says which of them are done.

A shard's key hashes everything that decides its result and nothing else. It is done when its manifest is valid and
carries that key; that a file exists proves nothing. Layout of a stage's folder:

    stage.json                        program, settings, inputs; rows, and how many of them are a shard
    rows.parquet                      the rows of all shards
    part-00003.parquet | part-00003/  its result
    part-00003.manifest.json          key, rows, bytes and hash of the result: written last
    partial/                          finished rows of shards at work
    progress/ failures/ jobs/         rows done so far, tracebacks, submissions and logs
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.records import Description, JobStart, Manifest, read_record
from cluster.shards import Shards
from montessori_core.data.rows import Rows
from montessori_core.data.tables import open_parquet, take_rows, write_table
from montessori_core.errors import DataError, UserError
from montessori_core.files import commit, hash_json, hash_path, read_json, write_json
from montessori_core.models import flops
from montessori_core.program import Program, SettingsT


class RowClock:
    """What a job calls as rows of a shard get done, in fractions: notes how many, and how long a row takes.

    The first call says where the job starts: what was done before has no part in its pace.
    """

    def __init__(self, file: Path, pause: float = 0.5) -> None:
        """Write to `file` at most once every `pause` seconds."""
        self._file, self._pause, self._written = file, pause, 0.0
        self._first: tuple[float, float] | None = None
        self._last = (0.0, 0.0)

    def __call__(self, done: float) -> None:
        """So many rows are done."""
        now = time.monotonic()
        self._first, self._last = self._first or (now, done), (now, done)
        if now - self._written >= self._pause:
            self._written = now
            write_json({"done": done, "row_seconds": self.row_seconds}, self._file, durable=False)

    @property
    def row_seconds(self) -> float | None:
        """From the first call to the last, so that what comes before and after rows is not in it; None until one more."""
        if self._first is None or self._last[1] <= self._first[1]:
            return None
        return (self._last[0] - self._first[0]) / (self._last[1] - self._first[1])


def describe(folder: Path) -> Description:
    """What `Stage.write` left in a stage's folder.

    Raises:
        UserError: it is not there, or damaged.
    """
    description = read_record(folder / "stage.json", Description)
    if description is None:
        raise UserError(f"{folder / 'stage.json'}: not there, or damaged; resume the run: it is written anew")
    return description


def _size(part: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in [part, *part.rglob("*")] if file.is_file())


class _Overtaken(Exception):
    """Another job has committed the shard."""


@dataclass(frozen=True)
class Stage:
    """What to run and where its results go.

    Attributes:
        program, version, entry: see `montessori_core.program.Program`.
        settings: plain data, without resources.
        inputs: files and folders the program reads, by name.
        input_hashes: content hash of each input that decides results (for a hub id: of the id and its revision).
        folder: the stage's folder.
        suffix: '.parquet' for a table, '' for a folder.
        kind: which section of cluster.resources its jobs get, for people and plans.
        settings_type: `module:class` that validates the settings on a node; None hands them over as they are.
    """

    program: str
    version: int
    entry: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, Path]
    input_hashes: Mapping[str, str]
    folder: Path
    suffix: str = ".parquet"
    kind: str = ""
    settings_type: str | None = None

    @staticmethod
    def of(
        program: Program[SettingsT],
        settings: SettingsT,
        folder: Path,
        inputs: Mapping[str, Path],
        input_hashes: Mapping[str, str],
    ) -> "Stage":
        """The stage of a declared program."""
        return Stage(
            program.name,
            program.version,
            program.entry,
            settings.model_dump(mode="json"),
            inputs,
            input_hashes,
            folder,
            program.suffix,
            program.kind,
            f"{program.settings.__module__}:{program.settings.__qualname__}",
        )

    @property
    def name(self) -> str:
        """Of its folder, for people."""
        return self.folder.name

    def key(self, rows: pa.Table) -> str:
        """What a shard's result is decided by, hashed: where code and folders lie has no part in it."""
        return hash_json([self.program, self.version, self.settings, self.input_hashes, rows.to_pydict()])

    def part(self, index: int) -> Path:
        """Where shard `index` puts its result."""
        return self.folder / f"part-{index:05d}{self.suffix}"

    def manifest(self, index: int) -> Path:
        """Where shard `index` says that it is done."""
        return self.folder / f"part-{index:05d}.manifest.json"

    @property
    def rows_file(self) -> Path:
        """Where the rows of all shards lie, in their order."""
        return self.folder / "rows.parquet"

    @property
    def partial_folder(self) -> Path:
        """Where partial commits lie."""
        return self.folder / "partial"

    def progress_file(self, index: int) -> Path:
        """Where shard `index` says how far it is."""
        return self.folder / "progress" / f"{index:05d}.json"

    def failure_file(self, index: int) -> Path:
        """Where shard `index` leaves its traceback."""
        return self.folder / "failures" / f"{index:05d}.json"

    def record_start(self, job_id: str, node: str, restarts: int) -> None:
        """Said by a job when it starts: where it runs, for the case that it can say nothing later, and which start it is."""
        write_json({"node": node, "restarts": restarts}, self.folder / "jobs" / f"node-of-{job_id}.json")

    def node_of(self, job_id: str) -> str | None:
        """Where a job last started; None if it never did."""
        noted = read_record(self.folder / "jobs" / f"node-of-{job_id}.json", JobStart)
        return noted.node if noted else None

    def write(self, shards: Shards) -> None:
        """Put the stage and its rows on disk for the workers; earlier failures are removed.

        What the folder holds already is not written again: jobs may read it.
        """
        for name in ("progress", "failures"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        if not self._holds(shards.rows):
            schema = shards.rows.schema
            batches = (batch for table in shards.rows.tables() for batch in table.to_batches())
            write_table(pa.RecordBatchReader.from_batches(schema, batches), self.rows_file, schema)
        description = {
            **{name: value for name, value in vars(self).items() if name != "folder"},
            "settings": dict(self.settings),
            "inputs": {name: str(path) for name, path in self.inputs.items()},
            "input_hashes": dict(self.input_hashes),
            "rows": len(shards.rows),
            "rows_per_shard": shards.size,
            "shards": len(shards),
        }
        if read_json(self.folder / "stage.json") != description:
            write_json(description, self.folder / "stage.json")
        for failure in (self.folder / "failures").iterdir():
            failure.unlink(missing_ok=True)

    def _holds(self, rows: Rows) -> bool:
        """Whether the rows on disk are these, undamaged."""
        try:
            written = Rows.of_file(self.rows_file, rows.schema)
            same = all(one.equals(other) for one, other in zip(rows.tables(), written.tables(), strict=False))
            return len(written) == len(rows) and same
        except DataError:
            return False

    def read_rows(self, index: int) -> pa.Table:
        """The rows of shard `index`, as `write` left them.

        Raises:
            UserError: they are not there, or damaged.
        """
        description, remedy = describe(self.folder), "resume the run: it is written anew"
        if not self.rows_file.exists():
            raise UserError(f"{self.rows_file}: not there; {remedy}")
        start, size = index * description.rows_per_shard, description.rows_per_shard
        with open_parquet(self.rows_file, f"; {remedy}") as file:
            if file.metadata.num_rows != description.rows:
                raise ValueError(f"{file.metadata.num_rows} rows, not {description.rows}")
            positions = np.arange(start, min(start + size, description.rows))
            tables = take_rows(file, None, positions)
            return pa.concat_tables([file.schema_arrow.empty_table(), *tables]).combine_chunks()

    @staticmethod
    def read(folder: Path) -> "Stage":
        """The stage whose folder this is, as `write` left it.

        Raises:
            UserError: it is not there, or damaged.
        """
        return Stage.read_with_size(folder)[0]

    @staticmethod
    def read_with_size(folder: Path) -> "tuple[Stage, int]":
        """The same, and how many shards it is cut into."""
        content = describe(folder).model_dump()
        for name in ("rows", "rows_per_shard"):
            del content[name]
        shards = content.pop("shards")
        inputs = {name: Path(path) for name, path in content.pop("inputs").items()}
        return Stage(**content, inputs=inputs, folder=folder), shards

    def manifests(self, shards: Iterable[int]) -> list[Manifest]:
        """Of those of `shards` that say that they are done, in order."""
        noted = (read_record(self.manifest(index), Manifest) for index in shards)
        return [manifest for manifest in noted if manifest is not None]

    def is_done(self, index: int, key: str | None = None, thorough: bool = False) -> bool:
        """Whether shard `index` has a valid result; `thorough` reads the result and checks its hash.

        Without a `key`, the result of any rows and settings counts: a driver leaves only those of its own in the folder.
        """
        manifest, part = read_record(self.manifest(index), Manifest), self.part(index)
        if manifest is None or key not in (None, manifest.key):
            return False
        if not part.exists() or _size(part) != manifest.bytes:
            return False
        return not thorough or hash_path(part) == manifest.sha256

    @contextmanager
    def commit_part(
        self,
        index: int,
        key: str,
        rows: int,
        job_id: str,
        clock: RowClock | None = None,
        processes: int = 1,
        opening: float = 0.0,
    ) -> Iterator[Path]:
        """Yield a temporary path for a result; on success move it in place, its manifest last.

        If another job has committed the shard in the meantime, its result stays and this one is dropped.

        Args:
            index: of the shard.
            key: of the shard.
            rows: how many it has.
            job_id: of the job, for people.
            clock: called as rows got done.
            processes: that work on it alike; only this one's operations are counted.
            opening: seconds that the job took before it could compute its first shard; 0 for its others.
        """
        started = time.monotonic()
        part = self.part(index)
        with suppress(_Overtaken), commit(part) as temporary:
            yield temporary
            if self.is_done(index, key):
                raise _Overtaken
            self.manifest(index).unlink(missing_ok=True)
        if self.is_done(index, key):
            return
        manifest = {
            "key": key,
            "rows": rows,
            "bytes": _size(part),
            "sha256": hash_path(part),
            "job_id": job_id,
            "opening": round(opening, 3),
            "seconds": round(time.monotonic() - started, 3),
            "row_seconds": clock.row_seconds if clock else None,
            "flops": flops.read_and_reset() * processes,
        }
        write_json(manifest, self.manifest(index))
