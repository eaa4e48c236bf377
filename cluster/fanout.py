"""The fan-out: compute every shard of a stage, whatever happens to jobs, nodes and drivers.

The state is on disk: manifests tell which shards are done, the ledger tells which jobs may still be running. A new driver
reads both, waits for running jobs, and submits only the missing shards.
"""

import logging
import os
import time
import uuid
from collections.abc import Callable, Set
from pathlib import Path

from cluster.backends import open_backend
from cluster.backends.base import JobsRemain, SchedulerUnavailable, Task, own_id
from cluster.driver_job import DriverStopped
from cluster.file_systems import LateResults, patiently
from cluster.ledger import Ledger, Submission, close_submissions
from cluster.lock import driven_folder
from cluster.nodes import BadNodes
from cluster.progress import Progress, ShardFailure, measure
from cluster.records import Failure, ShardProgress, read_record
from cluster.retry import NOT_RETRIED, REMEDIES, Losses, Openings, allowed_retries, classify_loss
from cluster.shards import Shards
from cluster.stage import Stage
from cluster.stragglers import Stopwatch
from montessori_core.config import Cluster, Resources
from montessori_core.errors import UserError
from montessori_core.files import hash_json, write_json

log = logging.getLogger(__name__)

_LONGEST_BACKOFF = 60.0  # seconds


class ShardsFailed(UserError):
    """Shards of a stage failed and are not retried; all others are done and kept."""

    def __init__(self, stage: Stage, failures: list[ShardFailure], shards: int) -> None:
        self.failures = failures
        lines = [f"stage {stage.name}: {len(failures)} of {shards} shards failed, the others are kept:"]
        lines += [f"  shard {f.shard} ({f.kind}): {f.error}\n    log: {f.log}" for f in failures[:5]]
        lines += [f"  and {len(failures) - 5} more"] if len(failures) > 5 else []
        lines.append("Fix the cause, then resume the run: only the missing shards are computed.")
        super().__init__("\n".join(lines))


def fan_out(
    stage: Stage,
    shards: Shards,
    resources: Resources,
    cluster: Cluster,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    python: str | None = None,
) -> list[Path]:
    """Compute every shard of `stage` that is not done; return the results in the order of the shards.

    If the caller is interrupted, the stage's jobs are cancelled. If it is killed, or stopped by DriverStopped, they continue,
    and the next call waits for them.

    Args:
        stage: the program, its settings and inputs.
        shards: its rows. The cut may differ from an earlier call; shards with the same rows keep their results.
        resources: of a job.
        cluster: where jobs run.
        on_progress: called at every poll.
        python: interpreter of these jobs, if they need another environment.

    Raises:
        ShardsFailed: some shards failed, after all others were done; or the program does not open.
        UserError: jobs cannot be started or ended here, or the ledger is corrupt.
    """
    keys = [stage.key(rows) for rows in shards]

    def open_driver() -> _Driver:
        driver = _Driver(stage, shards, keys, resources, cluster, on_progress, python)
        driver.adopt()
        stage.write(shards)
        return driver

    try:
        driver = patiently(open_driver, cluster.poll_seconds)
    except (DriverStopped, Exception):
        raise
    except BaseException:  # an interruption, which ends the stage's jobs at any time
        close_submissions(Ledger(stage.folder / "jobs"), cluster)
        raise
    driver.run()
    return [stage.part(index) for index in range(len(shards))]


class _Driver:
    def __init__(
        self,
        stage: Stage,
        shards: Shards,
        keys: list[str],
        resources: Resources,
        cluster: Cluster,
        on_progress: Callable[[Progress], None],
        python: str | None,
    ) -> None:
        self._ledger = Ledger(stage.folder / "jobs")
        self._stage, self._shards, self._keys = stage, shards, keys
        self._work = hash_json(keys)
        self._done = {index for index, key in enumerate(keys) if stage.is_done(index, key, thorough=True)}
        self._resources, self._cluster, self._on_progress = resources, cluster, on_progress
        self._backend = open_backend(cluster, resources, python, stage.kind, driven_folder())
        self._failed: dict[int, ShardFailure] = {}
        self._losses = Losses()
        self._openings = Openings(resources.infrastructure_retries, resources.parallel_jobs)
        limit = resources.exclude_node_after if cluster.profile != "local" else 0
        self._nodes = BadNodes(stage.name, self._backend, self._openings, limit)
        self._lost: list[tuple[Submission, str, Task]] = []  # jobs whose loss is not handled yet
        self._next_submission = 0.0
        self._running = 0
        self._alive: dict[str, Task] = {}
        self._refusals = 0
        self._stopwatch = Stopwatch()
        self._late = LateResults(self._backend.exit_reason)
        self._duplicated: set[int] = set()
        self._unwatched: set[str] = set()  # jobs that ended while no driver was running

    def adopt(self) -> None:
        """Take over from an earlier driver: keep jobs that compute these shards, end all others."""
        other = []  # ids never recorded (the driver died while submitting), other shards, or another host
        for submission in self._ledger.open_submissions():
            if submission.ids is None or submission.work != self._work or submission.host != self._backend.host:
                other.append(submission)
                continue
            log.info("%s: waiting for jobs that an earlier driver started", self._stage.name)
            if submission.host is not None:
                self._unwatched |= set(submission.ids) - (self._backend.alive(submission.name, submission.ids) or set())
        close_submissions(self._ledger, self._cluster, other)
        for index in self._undone():
            if self._stage.is_done(index, self._keys[index], thorough=True):  # by a job that was running
                self._done.add(index)
                continue
            self._stage.manifest(index).unlink(missing_ok=True)  # workers do not check the bytes again
            self._stage.progress_file(index).unlink(missing_ok=True)

    def run(self) -> None:
        """Submit, watch and submit again until every shard is done or has failed."""
        try:
            while not patiently(self._take_turn, self._cluster.poll_seconds):
                time.sleep(self._cluster.poll_seconds)
        except DriverStopped:
            raise  # its jobs continue; the next driver waits for them
        except BaseException:
            close_submissions(self._ledger, self._cluster)
            raise
        try:
            close_submissions(self._ledger, self._cluster)
        except (JobsRemain, SchedulerUnavailable) as error:  # the stage no longer needs them
            log.warning("%s: %s", self._stage.name, error)
        if self._failed:
            raise ShardsFailed(self._stage, [self._failed[i] for i in sorted(self._failed)], len(self._shards))
        self._stage.remove_intermediate_files()

    def _take_turn(self) -> bool:
        """Look at all jobs, and submit what is missing; return whether every shard is done or has failed."""
        busy = self._update()
        self._on_progress(self._measure())
        self._nodes.keep_away(self._alive)
        if len(self._done) + len(self._failed) == len(self._shards):
            return True
        self._submit_missing(busy)
        self._duplicate_stragglers(busy)
        return False

    def _measure(self) -> Progress:
        progress = measure(self._stage, self._shards, self._done, self._failed, self._alive.values())
        self._openings.note_opened(progress.jobs)
        return progress

    def _update(self) -> set[int]:
        """Update the finished and failed shards; return the shards of running jobs."""
        self._collect_done()
        busy: set[int] = set()
        self._running = 0
        self._alive = {}
        limit = self._resources.parallel_jobs
        for submission, ids in self._submitted():
            alive = self._backend.alive(submission.name, ids)
            left = 0
            for job_id, task in zip(ids, submission.tasks, strict=True):
                missed = submission.missed.get(job_id, 0)
                submission.missed[job_id] = self._count_missed(job_id, task, alive, missed)
                if submission.missed[job_id] < self._backend.polls_until_lost:
                    left += 1
                    busy.update(task)
                    self._alive[job_id] = task
                elif missed < self._backend.polls_until_lost:
                    self._lost.append((submission, job_id, task))
            if not left:
                submission.closed = True
                self._ledger.save()
            # Later submissions may use the slots that earlier ones no longer need.
            elif submission.at_once < (room := min(left, limit - self._running)):
                self._backend.set_parallelism(ids, room)
                submission.at_once = room
                self._ledger.save()
            self._running += left
        # A job may have committed its last shard after the first look.
        self._collect_done()
        if self._lost:
            self._handle_lost_jobs(busy)
        return busy - self._done

    def _count_missed(self, job_id: str, task: Task, alive: Set[str] | None, missed: int) -> int:
        """Return for how many polls in a row a job has not been in the queue; at most `polls_until_lost`."""
        limit = self._backend.polls_until_lost
        if alive is None or job_id in alive:
            return missed if alive is None else 0
        if self._done.issuperset(task):
            return limit  # it ended: its shards are done
        if missed + 1 == limit and self._late.may_come(job_id, self._stage.folder):
            return missed
        return min(missed + 1, limit)

    def _submitted(self) -> list[tuple[Submission, list[str]]]:
        """Return open submissions with the ids of their jobs, without those whose ids the scheduler never returned."""
        opened = self._ledger.open_submissions()
        return [(submission, submission.ids) for submission in opened if submission.ids is not None]

    def _collect_done(self) -> None:
        present = set(os.listdir(self._stage.folder))  # one listing instead of a call a shard
        for index, key in enumerate(self._keys):
            if index in self._done or self._stage.manifest(index).name not in present:
                continue
            if self._stage.is_done(index, key):
                self._done.add(index)
                self._failed.pop(index, None)
                self._openings.note_opened({manifest.job_id for manifest in self._stage.manifests([index])})

    def _handle_lost_jobs(self, busy: set[int]) -> None:
        """Handle the losses that were noticed; a loss stays noted until it is handled: a file error may come between."""
        self._measure()  # a job that has opened the program counts before one that has not
        # Jobs that are lost at once count once, even if they waited in the queue.
        lost = {own_id(job_id) for _, job_id, _ in self._lost}
        started = lost | {own_id(job_id) for job_id in self._alive if self._stage.node_of(job_id)}
        while self._lost:
            submission, job_id, task = self._lost[0]
            settled = self._done | self._failed.keys() | busy
            if undone := [index for index in task if index not in settled]:
                self._handle_lost_job(submission, job_id, undone, started)
            self._lost.pop(0)
        self._ledger.save()

    def _handle_lost_job(self, submission: Submission, job_id: str, undone: Task, started: Set[str]) -> None:
        """Retry or fail the unfinished shards of a lost job; `started` are the jobs that have started by now."""
        first, reported = undone[0], Failure.none(own_id(job_id))
        for index in undone:
            failure = read_record(self._stage.failure_file(index), Failure)
            if failure is not None and failure.job_id == reported.job_id:
                first, reported = index, failure
        node, openings = reported.node or self._stage.node_of(job_id), self._openings
        of_shard = reported.loading and bool(openings.jobs)  # the program opened for the rows of others
        if reported.opening and not of_shard:
            self._handle_failed_opening(submission, job_id, node, reported, started)
            return
        reason, kind = reported.error, openings.loss_of(reported.kind) if of_shard else reported.kind
        if kind and not of_shard:
            openings.note_opened({reported.job_id})
        if kind in NOT_RETRIED:  # the task ended at this shard and did not try the rest
            self._fail({first}, kind, reason, submission, job_id)
            return
        if not kind and job_id in self._unwatched:
            return  # their host may have crashed, which is neither the fault of a shard nor of a node
        if not kind:
            reason = self._backend.exit_reason(job_id)
            kind = classify_loss(reason)
        self._backend.cancel_lost(job_id, kind)
        progress = read_record(self._stage.progress_file(first), ShardProgress)
        losses = self._losses.count(first, kind, progress.done if progress else 0.0)
        allowed = allowed_retries(kind, self._resources.infrastructure_retries)
        if not of_shard:
            self._nodes.count(node, kind, first)
        elif reported.job_id not in openings.jobs:  # it may be the node
            self._nodes.count_opening(node, own_id(job_id), started)
        ends = (of_shard or openings.may_explain(kind)) and self._gives_up(job_id, node, kind, started, first)
        if ends or losses > allowed:
            often = f"{losses} times" if losses > allowed else "so did jobs of other shards"
            reason = f"{reason}; {often}{REMEDIES.get(kind, '')}"
            hit = self._end_unopened_jobs() if ends else {first}
            self._fail(hit, reported.kind or kind, reason, submission, job_id)
            noted = reported.model_copy(update={"kind": reported.kind or kind, "error": reason})
            write_json(noted.model_dump(by_alias=True), self._stage.failure_file(first))
            return
        submission.lost[job_id] = kind
        name, backoff = self._stage.name, self._pause(losses - 1)
        log.warning("%s: job %s: %s; submitting shard %d again in %.0f s", name, job_id, reason, first, backoff)

    def _handle_failed_opening(
        self, submission: Submission, job_id: str, node: str | None, failure: Failure, started: Set[str]
    ) -> None:
        """Try again to open the program, or fail all shards but those of jobs that have opened it."""
        loss = self._openings.loss_of(failure.kind)
        self._nodes.count_opening(node, own_id(job_id), started)
        if self._gives_up(job_id, node, failure.kind, started):
            reason = f"{failure.error}{REMEDIES.get(failure.kind, '')}"
            self._fail(self._end_unopened_jobs(), failure.kind, reason, submission, job_id)
            return
        self._backend.cancel_lost(job_id, loss)
        submission.lost[job_id] = loss
        backoff = self._pause(self._openings.failures - 1)
        name = self._stage.name
        log.warning("%s: job %s on %s: %s; trying again in %.0f s", name, job_id, node, failure.error, backoff)

    def _gives_up(self, job_id: str, node: str | None, kind: str, started: Set[str], shard: int | None = None) -> bool:
        """Count a failure to open the program, which `shard` may have caused; return whether it ends the stage."""
        self._openings.count_failure(own_id(job_id), node, kind, started, self._nodes.others, shard)
        self._nodes.keep_away(self._alive)
        return self._openings.end_stage(kind, self._nodes.others, shard)

    def _end_unopened_jobs(self) -> set[int]:
        """Let jobs that have opened the program finish, and end the others; return the shards that no job computes."""
        opened = {job: task for job, task in self._alive.items() if own_id(job) in self._openings.jobs}
        for job in self._alive.keys() - opened.keys() if opened else ():
            self._backend.cancel_lost(job, "lost")
        return self._undone() - {index for task in opened.values() for index in task}

    def _undone(self) -> set[int]:
        return set(range(len(self._shards))) - self._done

    def _fail(self, shards: Set[int], kind: str, reason: str, submission: Submission, job_id: str) -> None:
        """Submit these shards no more, because of a lost job."""
        log_path = str(self._ledger.log_of(submission, job_id))
        self._failed.update({shard: ShardFailure(shard, kind, reason, log_path) for shard in shards})

    def _pause(self, failures_before: int) -> float:
        """Submit nothing for a while, longer after each failure; return the seconds."""
        seconds = min(_LONGEST_BACKOFF, 2.0 ** min(failures_before, 10))
        self._next_submission = time.monotonic() + seconds
        return seconds

    def _submit_missing(self, busy: set[int]) -> None:
        missing = sorted(self._undone() - self._failed.keys() - busy)
        if not missing or time.monotonic() < self._next_submission:
            return
        tasks = self._backend.plan_jobs(missing, self._resources.parallel_jobs - self._running, self._nodes.avoided)
        if not tasks:
            return
        # The scheduler may have accepted jobs without our learning of it.
        unknown = [submission for submission in self._ledger.open_submissions() if submission.ids is None]
        close_submissions(self._ledger, self._cluster, unknown)
        self._submit(tasks, self._nodes.avoided)

    def _submit(self, tasks: list[Task], avoid: frozenset[str]) -> None:
        name = f"montessori-{self._stage.name}-{uuid.uuid4().hex[:12]}"
        at_once = self._resources.parallel_jobs - self._running
        gpus = self._resources.nodes * self._resources.gpus_per_node
        submission = Submission(name, self._work, tasks, self._backend.host, at_once, gpus, self._backend.steps)
        submission.folder = str(self._ledger.folder.resolve())
        self._ledger.submissions.append(submission)
        self._ledger.save()
        folder = self._ledger.folder / name
        try:
            submission.ids = self._backend.submit(name, folder, tasks, self._stage.folder, at_once, avoid)
            self._running += len(tasks)
            self._refusals = 0
        except SchedulerUnavailable as error:
            pause = self._pause(self._refusals)
            self._refusals += 1
            log.warning("%s: %s; trying again in %.0f s", self._stage.name, str(error).splitlines()[-1], pause)
        self._ledger.save()

    def _duplicate_stragglers(self, busy: set[int]) -> None:
        """Start slow shards a second time; the first result counts."""
        factor = self._resources.duplicate_stragglers_after
        if factor is None:
            return
        running: dict[int, tuple[str, Task]] = {}
        waiting = False
        for submission, ids in self._submitted():
            started = self._backend.running(submission.name, ids)
            if started is None:
                return
            for job_id, task in zip(ids, submission.tasks, strict=True):
                left = [index for index in task if index in busy]
                if left and job_id in started:
                    running[left[0]] = job_id, left
                elif left and submission.missed.get(job_id, 0) < self._backend.polls_until_lost:
                    waiting = True
        now, avoid = time.monotonic(), self._nodes.avoided
        self._stopwatch.update(set(running), self._done, now)
        if waiting:
            return  # a copy would take the slot of a shard that waits
        for index in sorted(self._stopwatch.slower_than(factor, now) & set(running) - self._duplicated):
            job_id, left = running[index]
            node = self._stage.node_of(job_id)
            if not self._backend.plan_jobs(left, self._resources.parallel_jobs - self._running, avoid, node):
                return  # no slot, GPU or held job is free
            log.warning(
                "%s: shard %d is slow on %s; starting it once more", self._stage.name, index, node or "its node"
            )
            self._duplicated.update(left)
            self._submit([left], avoid | ({node} if node else set()))
