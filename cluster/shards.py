"""Cutting the rows of a stage into shards."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from cluster.records import Description, read_record
from montessori_core.data.rows import Rows


@dataclass(frozen=True, eq=False)
class Shards:
    """Rows cut into shards of `size` rows; the last may have fewer. Without rows, there is one empty shard."""

    rows: Rows
    size: int

    def __len__(self) -> int:
        return max(1, math.ceil(len(self.rows) / self.size))

    def __iter__(self) -> Iterator[pa.Table]:
        """Yield the rows of each shard, a few row groups in memory at a time."""
        return self.rows.tables(self.size)

    def rows_of(self, index: int) -> int:
        """Return the number of rows of shard `index`."""
        return max(0, min(self.size, len(self.rows) - index * self.size))


def shard_size(rows: int, jobs: int, largest: int) -> int:
    """Return the rows of a shard, at most `largest`, so that all jobs get the same number of shards."""
    shards_of_job = max(1, math.ceil(rows / (jobs * largest)))
    return max(1, math.ceil(rows / (jobs * shards_of_job)))


def cut_for_jobs(folder: Path, rows: Rows, jobs: int, largest: int) -> Shards:
    """Cut rows into shards of `shard_size`, or as the stage in `folder` cut the same number of rows before.

    A shard's rows are part of its key: with the same cut, a run that resumes with more or fewer jobs keeps its results.
    """
    before = read_record(folder / "stage.json", Description)
    if before and before.rows == len(rows):
        return Shards(rows, before.rows_per_shard)
    return Shards(rows, shard_size(len(rows), jobs, largest))
