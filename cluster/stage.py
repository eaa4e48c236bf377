"""A stage of work cut into shards, and the folder that says which of them are done.

A shard's key is a hash of everything that decides its result, and of nothing else. A shard is done when its manifest is valid
and has that key; a file that exists proves nothing. The folder of a stage:

    stage.json                        program, settings, inputs; number of rows, in all and per shard
    rows.parquet                      input rows of all shards
    part-00003.parquet | part-00003/  result of shard 3
    part-00003.manifest.json          key, rows, bytes and hash of the result; written last
    partial/                          finished rows of unfinished shards
    shared/                           results of opening the program; removed when all shards are done
    checkpoints/                      of a training; removed when it is done
    progress/ failures/ jobs/         rows done so far, tracebacks, submissions and logs
"""

import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
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
from montessori_core.layout import CHECKPOINT_FOLDER
from montessori_core.models import flops
from montessori_core.program import Program, SettingsT

_REMEDY = "resume the run, which writes it again"


class RowClock:
    """Records how many rows of a shard are done, in fractions, and how long a row takes.

    The first call says where the job starts: rows that were done before do not count for its pace.
    """

    def __init__(self, file: Path, job_id: str = "", pause: float = 0.5) -> None:
        """Write to `file`, for a job, at most once every `pause` seconds."""
        self._file, self._job_id, self._pause, self._written = file, job_id, pause, 0.0
        self._first: tuple[float, float] | None = None
        self._last = (0.0, 0.0)

    def __call__(self, done: float) -> None:
        """Record that `done` rows are done."""
        now = time.monotonic()
        self._first, self._last = self._first or (now, done), (now, done)
        if now - self._written >= self._pause:
            self._written = now
            record = {"done": done, "row_seconds": self.row_seconds, "job_id": self._job_id}
            write_json(record, self._file, durable=False)

    @property
    def row_seconds(self) -> float | None:
        """Seconds a row from the first call to the last, without set-up and clean-up; None before a row is done."""
        if self._first is None or self._last[1] <= self._first[1]:
            return None
        return (self._last[0] - self._first[0]) / (self._last[1] - self._first[1])


def describe(folder: Path) -> Description:
    """Read the description that `Stage.write` wrote.

    Raises:
        UserError: it is missing or damaged.
    """
    description = read_record(folder / "stage.json", Description)
    if description is None:
        raise UserError(f"{folder / 'stage.json'}: missing or damaged; {_REMEDY}")
    return description


def _size(part: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in [part, *part.rglob("*")] if file.is_file())


class _Overtaken(Exception):
    """Another job committed the shard first, or the stage has other settings or rows now."""


@dataclass(frozen=True)
class Stage:
    """A program with its settings and inputs, and the folder of its results.

    Attributes:
        program, version, entry: see `montessori_core.program.Program`.
        settings: plain data, without resources.
        inputs: files and folders the program reads, by name.
        input_hashes: content hash of each input that decides results (of a model on the hub: of its id and revision).
        folder: the stage's folder.
        suffix: '.parquet' for a table, '' for a folder.
        kind: the section of cluster.resources that its jobs use; for display and forecasts.
        settings_type: `module:class` that validates the settings on a node; None passes them unchanged.
        key_values: see `montessori_core.program.Program`.
        check_gpus: fail where torch does not see the GPUs of the job.
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
    key_values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    check_gpus: bool = True

    @staticmethod
    def of(
        program: Program[SettingsT],
        settings: SettingsT,
        folder: Path,
        inputs: Mapping[str, Path],
        input_hashes: Mapping[str, str],
    ) -> "Stage":
        """Return the stage of a declared program.

        Options that are off (None) are left out of its settings, so that a new option changes no key of a finished stage.
        """
        return Stage(
            program.name,
            program.version,
            program.entry,
            settings.model_dump(mode="json", exclude_none=True),
            inputs,
            input_hashes,
            folder,
            program.suffix,
            program.kind,
            f"{program.settings.__module__}:{program.settings.__qualname__}",
            program.key_values,
        )

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.folder.name

    def key(self, rows: pa.Table) -> str:
        """Return the hash of everything that decides a shard's result; locations of code and files do not.

        Equal rows have equal keys, whatever the order of their columns and the batches of the table.
        """
        replaced = {section: {**self.settings[section], **values} for section, values in self.key_values.items()}
        settings = {**self.settings, **replaced}
        return hash_json([self.program, self.version, settings, self.input_hashes, rows.to_pydict()])

    def part(self, index: int) -> Path:
        """Path of the result of shard `index`."""
        return self.folder / f"part-{index:05d}{self.suffix}"

    def manifest(self, index: int) -> Path:
        """Path of the manifest of shard `index`."""
        return self.folder / f"part-{index:05d}.manifest.json"

    @property
    def rows_file(self) -> Path:
        """Path of the input rows of all shards, in their order."""
        return self.folder / "rows.parquet"

    @property
    def partial_folder(self) -> Path:
        """Folder of partial commits."""
        return self.folder / "partial"

    @property
    def shared_root(self) -> Path:
        """Folder of all shared folders."""
        return self.folder / "shared"

    @property
    def shared_folder(self) -> Path:
        """Folder in which a job keeps for others what depends on settings and inputs, but not on rows."""
        return self.shared_root / hash_json([self.program, self.version, self.settings, self.input_hashes])[:16]

    def remove_intermediate_files(self) -> None:
        """Remove what a finished stage no longer needs, and what killed jobs and duplicates left.

        This is not left to jobs: the driver ends them as soon as they have committed.
        """
        unfinished = self.folder.glob(".*.tmp")
        for path in (self.partial_folder, self.shared_root, self.folder / CHECKPOINT_FOLDER, *unfinished):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def progress_file(self, index: int) -> Path:
        """Path of the progress of shard `index`."""
        return self.folder / "progress" / f"{index:05d}.json"

    def begun(self) -> set[int]:
        """Return the shards that a job has begun, done or not."""
        return {int(file.stem) for file in (self.folder / "progress").glob("[0-9]*.json")}

    def failure_file(self, index: int) -> Path:
        """Path of the traceback of shard `index`."""
        return self.folder / "failures" / f"{index:05d}.json"

    def record_start(self, job_id: str, node: str, restarts: int) -> None:
        """Record a job's node and restart count when it starts, so that a job that dies silently has a node."""
        write_json({"node": node, "restarts": restarts}, self.folder / "jobs" / f"node-of-{job_id}.json")

    def node_of(self, job_id: str) -> str | None:
        """Return the node where a job last started; None if it never did."""
        start = read_record(self.folder / "jobs" / f"node-of-{job_id.split(':')[0]}.json", JobStart)
        return start.node if start else None

    def write(self, shards: Shards) -> None:
        """Write the stage and its rows for the workers; remove earlier failures.

        Files that already have this content are left alone: jobs may be reading them.
        """
        for name in ("progress", "failures"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        if not self.holds(shards.rows):
            schema = shards.rows.schema
            batches = (batch for table in shards.rows.tables() for batch in table.to_batches())
            write_table(pa.RecordBatchReader.from_batches(schema, batches), self.rows_file, schema)
        description = {
            **{name: value for name, value in vars(self).items() if name != "folder"},
            "settings": dict(self.settings),
            "inputs": {name: str(path) for name, path in self.inputs.items()},
            "input_hashes": dict(self.input_hashes),
            "key_values": {section: dict(values) for section, values in self.key_values.items()},
            "rows": len(shards.rows),
            "rows_per_shard": shards.size,
            "shards": len(shards),
        }
        if read_json(self.folder / "stage.json") != description:
            write_json(description, self.folder / "stage.json")
        for failure in (self.folder / "failures").iterdir():
            failure.unlink(missing_ok=True)

    def holds(self, rows: Rows) -> bool:
        """Return whether the rows file holds these rows, undamaged."""
        try:
            written = Rows.of_file(self.rows_file, rows.schema)
            pairs = zip(rows.tables(), written.tables(), strict=False)
            return len(written) == len(rows) and all(table.equals(copy) for table, copy in pairs)
        except DataError:
            return False

    def read_rows(self, index: int) -> pa.Table:
        """Read the rows of shard `index` that `write` wrote.

        Raises:
            UserError: the file is missing or damaged.
        """
        description = describe(self.folder)
        if not self.rows_file.exists():
            raise UserError(f"{self.rows_file}: missing; {_REMEDY}")
        start = index * description.rows_per_shard
        with open_parquet(self.rows_file, f"; {_REMEDY}") as file:
            if file.metadata.num_rows != description.rows:
                raise ValueError(f"{file.metadata.num_rows} rows, not {description.rows}")
            positions = np.arange(start, min(start + description.rows_per_shard, description.rows))
            tables = take_rows(file, None, positions)
            return pa.concat_tables([file.schema_arrow.empty_table(), *tables]).combine_chunks()

    @staticmethod
    def read(folder: Path) -> "Stage":
        """Read the stage that `write` wrote to a folder.

        Raises:
            UserError: its description is missing or damaged.
        """
        return Stage.described(describe(folder), folder)

    @staticmethod
    def described(description: Description, folder: Path) -> "Stage":
        """Return the stage in a folder from its description."""
        content = description.model_dump(exclude={"rows", "rows_per_shard", "shards"})
        inputs = {name: Path(path) for name, path in content.pop("inputs").items()}
        if description.key_values is None:  # of an earlier version, whose jobs may still be queued
            content["key_values"] = {"zero": {"offload": "none"}} if "zero" in description.settings else {}
        return Stage(**content, inputs=inputs, folder=folder)

    def _now_computes_other(self, index: int, key: str) -> bool:
        """Return whether the stage's folder has been given other settings or rows, so that the shard has another key."""
        with suppress(UserError):  # no description, as before the first `write`
            rows = self.read_rows(index)
            return Stage.read(self.folder).key(rows) != key
        return False

    def manifests(self, shards: Iterable[int]) -> list[Manifest]:
        """Return the manifests of `shards`, in order, without those that are missing or damaged."""
        manifests = (read_record(self.manifest(index), Manifest) for index in shards)
        return [manifest for manifest in manifests if manifest is not None]

    def is_done(self, index: int, key: str | None = None, thorough: bool = False) -> bool:
        """Return whether shard `index` has a valid result; `thorough` reads the result and checks its hash.

        Without a `key`, any valid result counts: a driver removes the manifests of other rows and settings when it starts.
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
        """Yield a temporary path for a result; on success move it into place and write its manifest last.

        If another job committed the shard first, its result stays and this one is dropped. So is a result that the stage
        no longer asks for: a job of an earlier driver may end after the settings were changed.

        Args:
            index: of the shard.
            key: of the shard.
            rows: number of its rows.
            job_id: of the job; for display.
            clock: has the time that a row took.
            processes: number of processes that compute the shard together; FLOPs are counted in this one only.
            opening: seconds from the job's start to its first shard; 0 for its other shards.
        """
        started = time.monotonic()
        part = self.part(index)
        part_is_new = False
        with suppress(_Overtaken), commit(part) as temporary:
            yield temporary
            if self.is_done(index, key) or self._now_computes_other(index, key):
                raise _Overtaken
            self.manifest(index).unlink(missing_ok=True)
            part_is_new = True
        operations = flops.read_and_reset() * processes  # of a dropped result too: the next shard must not count them
        if not part_is_new or self.is_done(index, key):
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
            "flops": operations,
        }
        write_json(manifest, self.manifest(index))
