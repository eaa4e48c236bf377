"""Progress of a stage, and its throughput as jobs measure it; loading models and rows from earlier jobs do not count."""

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from cluster.records import Manifest, ShardProgress, read_record
from cluster.shards import Shards
from cluster.stage import Stage

_PACED = 20  # finished shards whose pace stands in for shards that have none yet


@dataclass(frozen=True)
class ShardFailure:
    """A shard that is not retried, with the reason and the path of its log."""

    shard: int
    kind: str
    error: str
    log: str


@dataclass(frozen=True)
class Progress:
    """Progress of a stage.

    Attributes:
        rows_done, rows: of all shards; rows that are being computed count in fractions.
        seconds_left: at the pace of the running jobs; None before it is known.
        shards: number of shards.
        begun: shards that a job has begun, done or not.
        done: finished shards; the driver's own set, which grows.
        failed: shards that are not retried.
        jobs: jobs that have computed rows of the shards that are not done, by the ids that jobs know.
    """

    rows_done: float
    rows: int
    seconds_left: float | None
    shards: int
    begun: Set[int]
    done: Set[int]
    failed: Mapping[int, ShardFailure]
    jobs: Set[str] = frozenset()


def measure(
    stage: Stage, shards: Shards, done: Set[int], failed: Mapping[int, ShardFailure], tasks: Collection[Sequence[int]]
) -> Progress:
    """Measure the progress of a stage.

    Args:
        stage, shards, done, failed: see `Progress`.
        tasks: shards of each job in the queue.
    """
    rows: float = sum(map(shards.rows_of, done))
    begun = stage.begun()
    records = {
        index: read_record(stage.progress_file(index), ShardProgress)
        for index in begun & set(range(len(shards))) - done
    }
    rows += sum(min(shards.rows_of(index), record.done) for index, record in records.items() if record)
    # A job computes its shards in order; a job that has begun none is waiting or loading its program.
    undone = [[index for index in task if index not in done] for task in tasks if begun & set(task)]
    computing = {indices[0] for indices in undone if indices}
    pace = rows_per_second([records.get(index) for index in sorted(computing)], stage.manifests(sorted(done)[-_PACED:]))
    total = len(shards.rows)
    left = (total - rows) / pace if pace else None
    jobs = {record.job_id for record in records.values() if record and record.row_seconds}
    return Progress(rows, total, left, len(shards), begun, done, failed, jobs)


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
