"""Read the cost per row of a finished stage, the input of a simulation of a larger one."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from cluster.stage import Stage


@dataclass(frozen=True)
class StageCost:
    """Measured cost of a stage.

    Attributes:
        kind: section of cluster.resources that its jobs used.
        rows: rows of the stage.
        shard_rows: rows of its first shard.
        seconds_per_row: seconds that one job spends on a row.
        spread: standard deviation of the logarithm of a row's seconds, estimated from the shards; 0 for a single shard.
        opening: fixed seconds of a job: until its program can compute; in a training also to load and save models.
        begun: start time of its first job, seconds since 1970.
        ended: commit time of its last shard, seconds since 1970.
    """

    kind: str
    rows: int
    shard_rows: int
    seconds_per_row: float
    spread: float
    opening: float
    begun: float
    ended: float


def cost_of(folder: Path) -> StageCost | None:
    """Read the cost of the stage in a folder; None if it is unfinished or an older version recorded too little."""
    stage, shards = Stage.read_with_size(folder)
    manifests = stage.manifests(range(shards))
    starts = [path.stat().st_mtime for path in (folder / "jobs").glob("node-of-*.json")]
    if not stage.kind or not starts or len(manifests) < shards:
        return None
    rows = sum(manifest.rows for manifest in manifests)
    seconds_per_row = sum(manifest.seconds for manifest in manifests) / rows
    # A shard's mean over n rows varies 1/sqrt(n) as much as a row; the last shard may have fewer rows.
    size = manifests[0].rows
    logs = [math.log(manifest.seconds) for manifest in manifests if manifest.rows == size and manifest.seconds]
    openings = [manifest.opening for manifest in manifests if manifest.opening]
    opening = statistics.mean(openings) if openings else 0.0
    paces = [manifest.row_seconds for manifest in manifests if manifest.row_seconds is not None]
    if paces and not stage.suffix:  # a training: its fixed seconds include loading and saving models
        fixed = (seconds_per_row - statistics.mean(paces)) * rows / shards
        seconds_per_row, opening = statistics.mean(paces), opening + max(0.0, fixed)
    return StageCost(
        kind=stage.kind,
        rows=rows,
        shard_rows=size,
        seconds_per_row=seconds_per_row,
        spread=statistics.stdev(logs) * math.sqrt(size) if len(logs) > 1 else 0.0,
        opening=opening,
        begun=min(starts),
        ended=max(stage.manifest(index).stat().st_mtime for index in range(shards)),
    )
