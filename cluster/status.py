"""Looking at a stage, and reaching into it, from outside its driver: state, logs, cancelling, single shards again."""

from dataclasses import dataclass
from pathlib import Path

from cluster.backends import backend_at
from cluster.backends.base import log_file
from cluster.ledger import Ledger, close_submission
from cluster.progress import rows_per_second
from cluster.records import Failure, ShardProgress, read_record
from cluster.stage import Stage, describe
from montessori_core.config import Cluster
from montessori_core.errors import UserError


@dataclass(frozen=True)
class FailedShard:
    """A shard that failed for good: why, the last lines it wrote, and where to read more."""

    shard: int
    kind: str
    error: str
    last_lines: list[str]
    log: Path


@dataclass(frozen=True)
class StageStatus:
    """How far a stage is.

    Attributes:
        folder: the stage's.
        shards, done, running, queued, failed: counts of shards.
        rows, rows_done: of all shards, those at work included, with fractions for rows at work.
        job_seconds: spent on the shards that are done.
        rows_per_second: of all jobs at work together; None before it is known.
        failures: one for each failed shard.
    """

    folder: Path
    shards: int
    done: int
    running: int
    queued: int
    failed: int
    rows: int
    rows_done: float
    job_seconds: float
    rows_per_second: float | None
    failures: list[FailedShard]

    @property
    def word(self) -> str:
        """The state in a word."""
        if self.done == self.shards:
            return "done"
        if self.running or self.queued:
            return "at work"
        return "failed" if self.failed else "incomplete"

    @property
    def seconds_left(self) -> float | None:
        """At the pace of the jobs at work; None before it is known."""
        return (self.rows - self.rows_done) / self.rows_per_second if self.rows_per_second else None


def stages_of(run: Path) -> list[Path]:
    """Folders of a run's stages, in the order in which they began, by a time that copies can keep (cp -a, rsync -a)."""
    found = sorted(run.rglob("stage.json"), key=lambda path: path.stat().st_mtime_ns)
    return [path.parent for path in found]


def read_stage_status(folder: Path, cluster: Cluster) -> StageStatus:
    """Read a stage's state from its folder and the scheduler.

    Raises:
        UserError: the stage's description or its ledger is damaged.
    """
    stage, description = Stage.read(folder), describe(folder)
    shards, rows = description.shards, description.rows
    done: list[int] = []
    missing: dict[int, ShardProgress | None] = {}
    begun = 0.0
    for index in range(shards):
        if stage.is_done(index):
            done.append(index)
        else:
            missing[index] = note = read_record(stage.progress_file(index), ShardProgress)
            begun += min(note.done, description.rows_per_shard) if note else 0
    running, queued = _at_work(folder, cluster, set(missing))
    idle = set(missing) - running - queued
    noted = {index: read_record(stage.failure_file(index), Failure) for index in sorted(idle)}
    failures = [_failure(stage, index, failure) for index, failure in noted.items() if failure]
    manifests = stage.manifests(done)
    rows_done = sum(manifest.rows for manifest in manifests) + begun
    return StageStatus(
        folder,
        shards,
        len(done),
        len(running),
        len(queued),
        len(failures),
        rows,
        rows_done,
        sum(manifest.seconds for manifest in manifests),
        rows_per_second([missing[index] for index in running], manifests),
        failures,
    )


def logs_of(folder: Path, shards: range) -> dict[Path, list[int]]:
    """Logs of the jobs that some shards were given to last, with those shards; a job that waits has written none."""
    last: dict[int, Path] = {}
    for submission in Ledger(folder / "jobs").submissions:
        for job_id, task in zip(submission.ids or [], submission.tasks, strict=False):
            own = [index for index in task if index in shards]
            log = log_file(folder / "jobs" / submission.name, job_id)
            if own and log.exists():
                last.update(dict.fromkeys(own, log))
    logs: dict[Path, list[int]] = {}
    for index in sorted(last):
        logs.setdefault(last[index], []).append(index)
    return logs


def log_of(folder: Path, shard: int) -> Path:
    """The log of the last job that was given a shard.

    Raises:
        UserError: there is no such shard, or no job has had it.
    """
    _check_shard(folder, shard)
    for log in logs_of(folder, range(shard, shard + 1)):
        return log
    raise UserError(f"{folder.name}, shard {shard}: no job has written a log yet; it may still wait in the queue")


def forget(folder: Path, shard: int) -> None:
    """Make a shard count as not done, so that the next driver computes it again; its result stays until then.

    Raises:
        UserError: there is no such shard.
    """
    _check_shard(folder, shard)
    Stage.read(folder).manifest(shard).unlink(missing_ok=True)


def cancel_jobs(folder: Path, cluster: Cluster) -> int:
    """End the jobs of a stage that nobody drives any more; return how many submissions were ended."""
    ledger = Ledger(folder / "jobs")
    left = ledger.open_submissions()
    for submission in left:
        close_submission(submission, cluster, ledger)
    return len(left)


def _check_shard(folder: Path, shard: int) -> None:
    shards = describe(folder).shards
    if not 0 <= shard < shards:
        raise UserError(f"{folder.name} has shards 0 to {shards - 1}, no shard {shard}")


def _at_work(folder: Path, cluster: Cluster, missing: set[int]) -> tuple[set[int], set[int]]:
    """Of the shards not done, those that a job computes now, and those that wait for their turn in or for a job."""
    running: set[int] = set()
    queued: set[int] = set()
    for submission in Ledger(folder / "jobs").open_submissions():
        backend, ids = backend_at(submission.host, cluster), submission.ids
        if backend is None:
            continue
        if ids is None:  # being submitted
            queued.update(index for task in submission.tasks for index in task if index in missing)
            continue
        alive, started = backend.alive(submission.name, ids), backend.running(submission.name, ids)
        for job_id, task in zip(ids, submission.tasks, strict=True):
            if alive is not None and job_id not in alive:
                continue
            left = [index for index in task if index in missing]
            running.update(left[:1] if job_id in started else [])
            queued.update(left[1:] if job_id in started else left)
    return running, queued - running


def _failure(stage: Stage, index: int, failure: Failure) -> FailedShard:
    try:
        log = log_of(stage.folder, index)
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-5:]
    except UserError:
        log, lines = stage.failure_file(index), failure.traceback.splitlines()[-5:]
    return FailedShard(index, failure.kind, failure.error, lines, log)
