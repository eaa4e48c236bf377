"""Read from its folder what a stage used, and its cost per row, the input of a simulation of a larger stage."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from cluster.ledger import Ledger
from cluster.records import JobStart, read_record
from cluster.stage import Stage, describe


@dataclass(frozen=True)
class StageUse:
    """Cluster usage of a stage.

    Attributes:
        shards: shards of the stage.
        rows: rows of finished shards.
        seconds: job seconds of finished shards, without those of lost jobs.
        flops: floating-point operations of finished shards, see `montessori_core.models.flops`.
        jobs: submitted jobs; each array task counts as one.
        retries: lost jobs whose shards were submitted again.
        interruptions: retries after a preemption, plus requeues by Slurm (of preempted jobs, after node failures and at the
            time limit), which keep the job id.
        gpus: GPUs of one job.
    """

    shards: int
    rows: int
    seconds: float
    flops: int
    jobs: int
    retries: int
    interruptions: int
    gpus: int


def use_of(folder: Path) -> StageUse:
    """Read the usage of the stage in a folder so far, over all its drivers.

    Raises:
        UserError: the stage's description or its ledger is corrupt.
    """
    description = describe(folder)
    stage, shards = Stage.described(description, folder), description.shards
    manifests = stage.manifests(range(shards))
    submissions = Ledger(folder / "jobs").submissions
    starts = [read_record(path, JobStart) for path in (folder / "jobs").glob("node-of-*.json")]
    losses = [kind for submission in submissions for kind in submission.lost.values()]
    return StageUse(
        shards=shards,
        rows=sum(manifest.rows for manifest in manifests),
        seconds=float(sum(manifest.seconds for manifest in manifests)),
        flops=sum(manifest.flops for manifest in manifests),
        jobs=len({job for submission in submissions for job in submission.ids or []}),
        retries=len(losses),
        interruptions=losses.count("preempted") + sum(start.restarts for start in starts if start),
        gpus=max((submission.gpus for submission in submissions), default=0),
    )


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
    """Read the cost of the stage in a folder; None if it is unfinished or an older version recorded too little.

    Raises:
        UserError: the stage's description is corrupt.
    """
    description = describe(folder)
    stage, shards = Stage.described(description, folder), description.shards
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
