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
    """Rows cut into shards of `size` rows each but the last; without rows, there is one empty shard."""

    rows: Rows
    size: int

    def __len__(self) -> int:
        return max(1, math.ceil(len(self.rows) / self.size))

    def __iter__(self) -> Iterator[pa.Table]:
        """The rows of each shard, of which few are in memory at a time."""
        return self.rows.tables(self.size)

    def rows_of(self, index: int) -> int:
        """How many rows shard `index` has."""
        return max(0, min(self.size, len(self.rows) - index * self.size))


def shard_size(rows: int, jobs: int, largest: int) -> int:
    """Rows of a shard, so that every one of so many jobs has as many shards as the others; at most `largest`."""
    shards_of_job = max(1, math.ceil(rows / (jobs * largest)))
    return max(1, math.ceil(rows / (jobs * shards_of_job)))


def cut_for_jobs(folder: Path, rows: Rows, jobs: int, largest: int) -> Shards:
    """Shards of `shard_size`; or as so many rows of the stage in `folder` were cut before.

    The rows of a shard are part of its key: a run that is resumed with more or fewer jobs keeps what is done.
    """
    before = read_record(folder / "stage.json", Description)
    if before and before.rows == len(rows):
        return Shards(rows, before.rows_per_shard)
    return Shards(rows, shard_size(len(rows), jobs, largest))
