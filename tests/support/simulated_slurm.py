"""A simulated Slurm of several nodes below the real driver, for faults that need more nodes than the lab has.

Each node runs one job at a time, and starts the first queued job that may use it. A test says what a job does at each poll.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster.backends.base import Task, split_for_array
from cluster.fanout import fan_out
from cluster.progress import Progress
from cluster.stage import Stage
from montessori_core.config import Cluster, Resources
from montessori_core.files import write_json
from support.row_programs import as_shards


@dataclass
class Job:
    """A job of an array: its shard, the nodes that it may not use, and for how many polls it has run."""

    id: str
    shard: int
    avoid: frozenset[str]
    number: int
    node: str | None = None
    polls: int = 0
    ended: bool = False

    @property
    def waits(self) -> bool:
        return self.node is None and not self.ended


@dataclass
class SimulatedSlurm:
    """A backend; `act` is called for each running job at each poll.

    Attributes:
        up: nodes that run jobs.
        silent: Slurm says neither whether jobs can run elsewhere, nor does it move queued jobs.
        reason: what Slurm says of a job that has ended without a result.
    """

    stage: Stage
    act: Callable[["SimulatedSlurm", Job], None]
    up: list[str]
    silent: bool = False
    reason: str = ""
    polls_until_lost: int = 1
    host: str | None = None
    steps: bool = False
    jobs: dict[str, Job] = field(default_factory=dict)
    starts: Counter[str] = field(default_factory=Counter)

    def open_row(self, job: Job) -> None:
        """Report a job's first row."""
        write_json({"done": 0.1, "row_seconds": 9.0, "job_id": job.id}, self.stage.progress_file(job.shard))

    def finish(self, job: Job) -> None:
        rows = self.stage.read_rows(job.shard)
        with self.stage.commit_part(job.shard, self.stage.key(rows), 1, job.id) as temporary:
            temporary.write_text("done")
        job.ended = True

    def fail(self, job: Job, kind: str, node: str | None = None, loading: bool = False) -> None:
        """End a job whose program does not open, on a node that its record names."""
        record = {"job_id": job.id, "attempt": "0", "class": kind, "opening": True, "error": kind, "traceback": ""}
        write_json(record | {"node": node, "loading": loading}, self.stage.failure_file(job.shard))
        job.ended = True

    def take_down(self, node: str) -> None:
        """Crash a node: Slurm requeues its jobs."""
        self.up.remove(node)
        for job in self.jobs.values():
            if job.node == node and not job.ended:
                job.node, job.polls = None, 0

    def _poll(self) -> None:
        for job in [job for job in self.jobs.values() if job.node and not job.ended]:
            job.polls += 1
            self.act(self, job)
        for node in self.up:
            if all(job.ended or job.node != node for job in self.jobs.values()):
                job = next((job for job in self.jobs.values() if job.waits and node not in job.avoid), None)
                if job is not None:
                    job.node = node
                    self.starts[node] += 1
                    self.stage.record_start(job.id, node, 0)

    def prepare(self) -> None:
        pass

    def plan_jobs(
        self, shards: Sequence[int], free: int, avoid: frozenset[str], slow_node: str | None = None
    ) -> list[Task]:
        return split_for_array(shards, free, 1) if free > 0 else []

    def submit(
        self, name: str, folder: Path, tasks: Sequence[Task], stage_folder: Path, at_once: int, avoid: frozenset[str]
    ) -> list[str]:
        first = len(self.jobs)
        made = [Job(f"{first + 1}_{i}", shard, avoid, first + i) for i, [shard] in enumerate(tasks)]
        self.jobs |= {job.id: job for job in made}
        return [job.id for job in made]

    def can_run_outside(self, nodes: frozenset[str]) -> bool:
        return self.silent or not nodes.issuperset(self.up)

    def keep_away(self, ids: Sequence[str], nodes: frozenset[str]) -> None:
        for job in [] if self.silent else [self.jobs[job_id] for job_id in ids]:
            job.avoid = nodes if job.waits else job.avoid

    def set_parallelism(self, ids: Sequence[str], at_once: int) -> None:
        pass

    def find(self, name: str, folder: Path) -> list[str]:
        return []

    def alive(self, name: str, ids: Sequence[str]) -> set[str]:
        self._poll()
        return {job_id for job_id in ids if not self.jobs[job_id].ended}

    def running(self, name: str, ids: Sequence[str]) -> set[str]:
        return {job_id for job_id in ids if self.jobs[job_id].node and not self.jobs[job_id].ended}

    def cancel(self, ids: Sequence[str]) -> None:
        for job_id in ids:
            self.jobs[job_id].ended = True

    def exit_reason(self, job_id: str) -> str:
        return self.reason

    def cancel_lost(self, job_id: str, kind: str) -> None:
        self.jobs[job_id].ended = True


def run(
    slurm: SimulatedSlurm,
    shards: int,
    monkeypatch: pytest.MonkeyPatch,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    **options: int,
) -> None:
    """Compute a stage of shards of one row, a job each."""
    monkeypatch.setattr("cluster.fanout.open_backend", lambda *arguments: slurm)
    monkeypatch.setattr("cluster.ledger.backend_at", lambda *arguments: slurm)
    resources = Resources(parallel_jobs=8, shards_per_job=1, **options)
    rows = as_shards(*([{"n": number}] for number in range(shards)))
    fan_out(slurm.stage, rows, resources, Cluster(profile="slurm", poll_seconds=0.01), on_progress)
