"""What a finished stage cost, row by row: what a simulation of a larger one starts from."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from cluster.stage import Stage


@dataclass(frozen=True)
class StageCost:
    """Measured cost of a stage.

    Attributes:
        kind: which section of cluster.resources its jobs got.
        rows: of the whole stage.
        shard_rows: of its first shard.
        seconds_per_row: of one job.
        spread: standard deviation of the logarithm of a row's seconds, from how much shards differ; 0 if there was one.
        opening: seconds of a job that do not grow with its rows: until its program can compute, and of a training to load
            and save.
        begun: when its first job began, seconds since 1970.
        ended: when its last shard was committed, likewise.
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
    """Read the cost of the stage in a folder; None if it is not done, or was done by a version that noted less."""
    stage, shards = Stage.read_with_size(folder)
    manifests = stage.manifests(range(shards))
    starts = [path.stat().st_mtime for path in (folder / "jobs").glob("node-of-*.json")]
    if not stage.kind or not starts or len(manifests) < shards:
        return None
    rows = sum(manifest.rows for manifest in manifests)
    seconds_per_row = sum(manifest.seconds for manifest in manifests) / rows
    # Shards of many rows differ less than rows do; a last shard of few rows says little.
    size = manifests[0].rows
    logs = [math.log(manifest.seconds) for manifest in manifests if manifest.rows == size and manifest.seconds]
    openings = [manifest.opening for manifest in manifests if manifest.opening]
    opening = statistics.mean(openings) if openings else 0.0
    paces = [manifest.row_seconds for manifest in manifests if manifest.row_seconds is not None]
    if paces and not stage.suffix:  # a training, which loads and saves models beside its rows
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
