"""What a stage used: shards, jobs, time, operations, GPUs, and what was lost, from what lies in its folder."""

from dataclasses import dataclass
from pathlib import Path

from cluster.ledger import Ledger
from cluster.records import JobStart, read_record
from cluster.stage import Stage


@dataclass(frozen=True)
class StageUse:
    """Use of the cluster by a stage.

    Attributes:
        shards: that it is cut into.
        rows: of those that are done.
        seconds: that jobs took for these; what lost jobs took is not among them.
        flops: floating-point operations of the same, see `montessori_core.models.flops`.
        jobs: that were started; each task of an array is one.
        retries: jobs that were lost, so that their shards were submitted again.
        preemptions: of these, jobs that were preempted; and how often Slurm put a job back into its queue by itself, which it
            does with preempted jobs, those of failed nodes, and ours at their time limit: they stay the same job.
        gpus: of one job.
    """

    shards: int
    rows: int
    seconds: float
    flops: int
    jobs: int
    retries: int
    preemptions: int
    gpus: int


def use_of(stage: Path) -> StageUse:
    """Read what the stage in a folder used so far, by all drivers together.

    Raises:
        UserError: the stage's description or its ledger is damaged.
    """
    made, shards = Stage.read_with_size(stage)
    manifests = made.manifests(range(shards))
    submissions = Ledger(stage / "jobs").submissions
    starts = [read_record(path, JobStart) for path in (stage / "jobs").glob("node-of-*.json")]
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
