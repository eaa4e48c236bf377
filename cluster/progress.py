"""Throughput of a stage, as its jobs measure it; loading models and rows from earlier jobs do not count."""

import statistics
from collections.abc import Iterable, Sequence

from cluster.records import Manifest, ShardProgress


def rows_per_second(running: Sequence[ShardProgress | None], done: Iterable[Manifest]) -> float | None:
    """Return the rows per second of all running jobs together; None while there is no measurement.

    Args:
        running: progress of each shard that a job computes now; None if its job has reported none.
        done: manifests of finished shards; their median stands in for running shards without a measurement.
    """
    seconds = [progress.row_seconds if progress else None for progress in running]
    measured = [value for value in seconds if value] or [
        value for manifest in done if (value := _row_seconds(manifest))
    ]
    if not measured:
        return None
    median = statistics.median(measured)
    return sum(1 / (value or median) for value in seconds) or None


def _row_seconds(manifest: Manifest) -> float | None:
    if manifest.row_seconds is not None:
        return manifest.row_seconds
    return manifest.seconds / manifest.rows if manifest.rows else None
