"""Read what a stage used, from its folder: shards, jobs, job seconds, FLOPs, GPUs and losses."""

from dataclasses import dataclass
from pathlib import Path

from cluster.ledger import Ledger
from cluster.records import JobStart, read_record
from cluster.stage import Stage


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
        preemptions: retries after a preemption, plus requeues by Slurm (of preempted jobs, after node failures and at the
            time limit), which keep the job id.
        gpus: GPUs of one job.
    """

    shards: int
    rows: int
    seconds: float
    flops: int
    jobs: int
    retries: int
    preemptions: int
    gpus: int


def use_of(folder: Path) -> StageUse:
    """Read the usage of the stage in a folder so far, over all its drivers.

    Raises:
        UserError: the stage's description or its ledger is corrupt.
    """
    stage, shards = Stage.read_with_size(folder)
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
        preemptions=losses.count("preempted") + sum(start.restarts for start in starts if start),
        gpus=max((submission.gpus for submission in submissions), default=0),
    )
