"""Status and control of a stage from outside its driver: counts, logs, cancelling jobs, invalidating shards."""

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cluster.backends import backend_at
from cluster.backends.base import JobsRemain, SchedulerUnavailable, log_file
from cluster.backends.held import end_held_jobs
from cluster.ledger import Ledger, close_submissions
from cluster.lock import driver_of
from cluster.progress import rows_per_second
from cluster.records import Failure, ShardProgress, read_record
from cluster.stage import Stage, describe
from montessori_core.config import Cluster
from montessori_core.errors import UserError


@dataclass(frozen=True)
class FailedShard:
    """A shard that failed after its retries, with the last lines of its log."""

    shard: int
    kind: str
    error: str
    last_lines: list[str]
    log: Path


@dataclass(frozen=True)
class StageStatus:
    """Status of a stage.

    Attributes:
        folder: folder of the stage.
        shards, done, running, queued, failed: counts of shards.
        rows, rows_done: rows of all shards, and rows done; a row that is being computed counts as a fraction.
        job_seconds: job seconds of finished shards.
        rows_per_second: throughput of all running jobs together; None before the first measurement.
        failures: the failed shards.
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
    def state(self) -> str:
        """One of done, running, failed, incomplete."""
        if self.done == self.shards:
            return "done"
        if self.running or self.queued:
            return "running"
        return "failed" if self.failed else "incomplete"

    @property
    def seconds_left(self) -> float | None:
        """Remaining seconds at the current throughput; None before it is known."""
        return (self.rows - self.rows_done) / self.rows_per_second if self.rows_per_second else None


def stages_of(run: Path) -> list[Path]:
    """Return the folders of a run's stages in the order of their start, by a time that cp -a and rsync -a preserve."""
    folders = [file.parent for file in run.rglob("stage.json")]
    return sorted(folders, key=lambda folder: (folder / "stage.json").stat().st_mtime_ns)


def read_stage_status(folder: Path, cluster: Cluster) -> StageStatus:
    """Read a stage's status from its folder and the scheduler.

    Raises:
        UserError: the stage's description or its ledger is corrupt.
    """
    description = describe(folder)
    stage = Stage.described(description, folder)
    shards, rows = description.shards, description.rows
    done: list[int] = []
    missing: dict[int, ShardProgress | None] = {}
    partial_rows = 0.0
    for index in range(shards):
        if stage.is_done(index):
            done.append(index)
        else:
            missing[index] = progress = read_record(stage.progress_file(index), ShardProgress)
            partial_rows += min(progress.done, description.rows_per_shard) if progress else 0
    running, queued = _find_assigned(folder, cluster, set(missing))
    idle = set(missing) - running - queued
    records = {index: read_record(stage.failure_file(index), Failure) for index in sorted(idle)}
    failures = [_read_failure(stage, index, record) for index, record in records.items() if record]
    manifests = stage.manifests(done)
    rows_done = sum(manifest.rows for manifest in manifests) + partial_rows
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
    """Return the log of the last job of each shard, as {log: shards}; a queued job has no log."""
    last: dict[int, Path] = {}
    for submission in Ledger(folder / "jobs").submissions:
        for job_id, task in zip(submission.ids or [], submission.tasks, strict=False):
            indices = [index for index in task if index in shards]
            log = log_file(folder / "jobs" / submission.name, job_id)
            if indices and log.exists():
                last.update(dict.fromkeys(indices, log))
    logs: dict[Path, list[int]] = {}
    for index in sorted(last):
        logs.setdefault(last[index], []).append(index)
    return logs


def log_of(folder: Path, shard: int) -> Path:
    """Return the log of the last job of a shard.

    Raises:
        UserError: there is no such shard, or no log of it.
    """
    _check_shard(folder, shard)
    for log in logs_of(folder, range(shard, shard + 1)):
        return log
    raise UserError(f"{folder.name}, shard {shard}: no job has written a log yet; its job may still be in the queue")


def invalidate_shard(folder: Path, shard: int) -> None:
    """Mark a shard as not done, so that the next driver computes it again; its result stays until then.

    Raises:
        UserError: there is no such shard.
    """
    _check_shard(folder, shard)
    Stage.read(folder).manifest(shard).unlink(missing_ok=True)


def cancel_jobs(folder: Path, cluster: Cluster) -> int:
    """Cancel the jobs of all stages in a folder without a driver, and held jobs; return how many, submissions counted as one.

    Raises:
        JobsRemain: some jobs may still run; all others are cancelled.
    """
    jobs, problems = 0, []
    stages = [partial(_cancel_stage, stage, cluster) for stage in stages_of(folder)]
    for end in (*stages, partial(end_held_jobs, folder)):
        try:
            jobs += end()
        except (UserError, OSError) as error:  # also a ledger that is damaged, or cannot be written
            problems.append(str(error))
    if problems:
        raise JobsRemain("\n".join(["some jobs may still run; cancel again when the cause is removed:", *problems]))
    return jobs


def _cancel_stage(stage: Path, cluster: Cluster) -> int:
    return close_submissions(Ledger(stage / "jobs"), cluster)


def _check_shard(folder: Path, shard: int) -> None:
    shards = describe(folder).shards
    if not 0 <= shard < shards:
        raise UserError(f"{folder.name} has no shard {shard}; its shards are 0 to {shards - 1}")


def _find_assigned(folder: Path, cluster: Cluster, missing: set[int]) -> tuple[set[int], set[int]]:
    """Return the missing shards that a job computes now, and those queued: behind them in a job, or in a waiting job."""
    running: set[int] = set()
    queued: set[int] = set()
    for submission in Ledger(folder / "jobs").open_submissions():
        backend, ids = backend_at(submission.host, submission.steps, cluster), submission.ids
        if backend is None and not _has_driver(folder):
            continue
        if ids is None:  # sbatch has not answered
            queued.update(index for task in submission.tasks for index in task if index in missing)
            continue
        if backend is None:  # processes of the driver's host: it started them at once, and notes those that it misses
            started = {job_id for job_id in ids if not submission.missed.get(job_id)}
            alive: set[str] | None = started
        else:
            alive = backend.alive(submission.name, ids)
            started = backend.running(submission.name, ids) or set()
        for job_id, task in zip(ids, submission.tasks, strict=True):
            if alive is not None and job_id not in alive:
                continue
            indices = [index for index in task if index in missing]
            running.update(indices[:1] if job_id in started else [])
            queued.update(indices[1:] if job_id in started else indices)
    return running, queued - running


def _has_driver(folder: Path) -> bool:
    """Return whether a driver is known to compute a stage: it drives the stage's run, or the study of the run."""
    with suppress(SchedulerUnavailable, OSError):
        return any(driver_of(parent) is not None for parent in folder.parents)
    return False


def _read_failure(stage: Stage, index: int, failure: Failure) -> FailedShard:
    try:
        log = log_of(stage.folder, index)
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-5:]
    except UserError:
        log, lines = stage.failure_file(index), failure.traceback.splitlines()[-5:]
    return FailedShard(index, failure.kind, failure.error, lines, log)
