"""How fast a stage is, from what its jobs measure themselves: neither loading models nor what was done before counts."""

import statistics
from collections.abc import Iterable, Sequence

from cluster.records import Manifest, ShardProgress


def rows_per_second(at_work: Sequence[ShardProgress | None], done: Iterable[Manifest]) -> float | None:
    """Rows that the jobs at work compute in a second together; None before any of them, or one before them, has a pace.

    Args:
        at_work: what is noted of each shard that a job computes now; None of one whose job has said nothing yet.
        done: of shards that are done, for jobs that have no pace yet.
    """
    paces = [begun.row_seconds if begun else None for begun in at_work]
    known = [pace for pace in paces if pace] or [pace for manifest in done if (pace := _row_seconds(manifest))]
    if not known:
        return None
    typical = statistics.median(known)
    return sum(1 / (pace or typical) for pace in paces) or None


def _row_seconds(manifest: Manifest) -> float | None:
    if manifest.row_seconds is not None:
        return manifest.row_seconds
    return manifest.seconds / manifest.rows if manifest.rows else None
