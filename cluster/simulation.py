"""Discrete-event simulation of the fan-out on a cluster with node failures, preemption and queueing.

Stages run one after the other, as in a run. A stage runs as many jobs at a time as the nodes hold and `parallel_jobs` allows;
a job opens its program, then computes its shards. A job that is lost, preempted or at its time limit is requeued, as by
Slurm, and resumes from its last commit or checkpoint. Not simulated: copies of stragglers, exclusion of nodes that lost
several shards, errors of code. Jobs of several nodes run on fixed groups of nodes.
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, cast

import simpy

from montessori_core.errors import UserError

Events = Generator[simpy.Event, Any, Any]
_MAX_LOG_STARTS = 8.0
"""Give up if a job needs more than e^8 expected starts to reach its first checkpoint."""


@dataclass(frozen=True)
class ClusterSpec:
    """The nodes that jobs run on.

    Attributes:
        nodes: number of nodes.
        gpus: GPUs of each node.
        cpus: cores of each node.
    """

    nodes: int
    gpus: int
    cpus: int


@dataclass(frozen=True)
class FailureModel:
    """Failures, preemption and queueing. Times between events and waits in the queue are exponentially distributed.

    Attributes:
        node_failure_hours: mean uptime of a node until it fails; infinite: never.
        notice_seconds: time from a node's failure until the scheduler requeues its jobs (Slurm: SlurmdTimeout).
        repair_minutes: time from a node's failure until it is up again.
        preemption_hours: mean running time of a job until it is preempted; infinite: never.
        requeue_seconds: time until a requeued job may start again (Slurm: until its credential expires, `cred_expire`).
        queue_minutes: mean wait of a submission or a requeued job for a node, because of other users' jobs.
    """

    node_failure_hours: float = math.inf
    notice_seconds: float = 300.0
    repair_minutes: float = 60.0
    preemption_hours: float = math.inf
    requeue_seconds: float = 120.0
    queue_minutes: float = 0.0


@dataclass(frozen=True)
class Work:
    """A stage to simulate.

    Attributes:
        name: name in tables.
        jobs: [jobs][shards], mean seconds of each shard.
        spread: standard deviation of the logarithm of a shard's seconds.
        opening: seconds from a job's start until its program can compute.
        saved_every: seconds between two commits within a shard; infinite if only whole shards are committed.
        nodes, gpus, cpus: resources of a job: nodes, and GPUs and cores of each.
        at_once: maximum number of jobs at a time.
        limit: time limit in seconds, after which a job is requeued.
        around: seconds of the driver, to plan and submit the stage and to join its results.
    """

    name: str
    jobs: Sequence[Sequence[float]]
    spread: float
    opening: float
    saved_every: float
    nodes: int
    gpus: int
    cpus: int
    at_once: int
    limit: float
    around: float


@dataclass
class StageTiming:
    """Simulated time of a stage.

    Attributes:
        seconds: wall time.
        job_seconds: total time of all jobs, lost jobs included.
        lost_seconds: job_seconds without committed work and the first opening of each job.
        restarts: how often jobs were requeued.
    """

    seconds: float = 0.0
    job_seconds: float = 0.0
    lost_seconds: float = 0.0
    restarts: int = 0


def capacity(work: Work, machines: ClusterSpec) -> int:
    """Return how many jobs of a stage the nodes hold at a time.

    Raises:
        UserError: they hold none.
    """
    per_node = min(machines.cpus // work.cpus, machines.gpus // work.gpus if work.gpus else machines.cpus)
    jobs = per_node * (machines.nodes // work.nodes)
    if not jobs:
        raise UserError(
            f"{work.name}: a job needs {work.nodes} nodes with {work.gpus} GPUs and {work.cpus} cores each, but there are "
            f"{machines.nodes} with {machines.gpus} and {machines.cpus}; see cluster.resources"
        )
    return jobs


def simulate(stages: Sequence[Work], machines: ClusterSpec, failures: FailureModel, seed: int) -> list[StageTiming]:
    """Simulate stages one after the other; return the time of each.

    Raises:
        UserError: a job fits on no node, or cannot reach a commit within its time limit.
    """
    for work in stages:
        capacity(work, machines)
    environment, draw = simpy.Environment(), Random(seed)
    nodes = [_Node(environment) for _ in range(machines.nodes)]
    if math.isfinite(failures.node_failure_hours):
        for node in nodes:
            environment.process(node.live(failures, draw))
    timings = [StageTiming() for _ in stages]

    def run_stages() -> Events:
        for work, timing in zip(stages, timings, strict=True):
            start = environment.now
            yield from _Stage(environment, work, machines, nodes, failures, draw, timing).run()
            timing.seconds = environment.now - start

    environment.run(environment.process(run_stages()))
    return timings


def _check_job_progress(shards: Sequence[float], work: Work, failures: FailureModel) -> None:
    interval = min(work.saved_every, max(shards))
    first_commit = work.opening + interval
    if first_commit >= work.limit:
        raise UserError(
            f"{work.name}: a job opens its program in {work.opening:.0f} s and commits after another {interval:.0f} s: "
            f"it would never progress within its time limit of {work.limit:.0f} s; raise time_limit_minutes in "
            "cluster.resources, or make shards smaller"
        )
    # With exponential lifetimes, one start in e^(first_commit * rate) reaches the first commit.
    rate = (work.nodes / failures.node_failure_hours + 1 / failures.preemption_hours) / 3600
    if first_commit * rate > _MAX_LOG_STARTS:
        raise UserError(
            f"{work.name}: a job opens its program in {work.opening:.0f} s and commits after another {interval:.0f} s, but "
            f"is lost after {1 / rate:.0f} s on average: it would hardly ever progress; assume fewer failures or "
            "preemptions, or make shards smaller"
        )


class _Node:
    """A node, up or down."""

    def __init__(self, environment: simpy.Environment) -> None:
        self._environment = environment
        self.jobs: dict[simpy.Process, None] = {}  # a dict keeps the order, so a seed has one outcome
        self.up = environment.event().succeed()

    def live(self, failures: FailureModel, draw: Random) -> Events:
        """Alternate between uptime and repair."""
        while True:
            yield self._environment.timeout(draw.expovariate(1 / (3600 * failures.node_failure_hours)))
            self.up = self._environment.event()
            for job in list(self.jobs):
                job.interrupt()
            yield self._environment.timeout(60 * failures.repair_minutes)
            self.up.succeed()


@dataclass
class _Stage:
    """A running stage."""

    environment: simpy.Environment
    work: Work
    machines: ClusterSpec
    nodes: list[_Node]
    failures: FailureModel
    draw: Random
    timing: StageTiming
    turns: simpy.Resource = field(init=False)
    free_groups: simpy.Store = field(init=False)

    def run(self) -> Events:
        """Run the stage from the driver's call to its return."""
        self.turns = simpy.Resource(self.environment, self.work.at_once)
        self.free_groups = simpy.Store(self.environment)
        groups = [
            self.nodes[first : first + self.work.nodes]
            for first in range(0, len(self.nodes) - self.work.nodes + 1, self.work.nodes)
        ]
        # Spread jobs over the nodes, as a scheduler does.
        for _ in range(capacity(self.work, self.machines) // len(groups)):
            for group in groups:
                self.free_groups.put(group)
        yield self.environment.timeout(self.work.around)
        yield self._queue()
        yield self.environment.all_of([self.environment.process(self._job(list(shards))) for shards in self.work.jobs])

    def _queue(self) -> simpy.Event:
        minutes = self.failures.queue_minutes
        return self.environment.timeout(self.draw.expovariate(1 / (60 * minutes)) if minutes else 0.0)

    def _job(self, shards: list[float]) -> Events:
        """Run one job until all its shards are done."""
        spread = self.work.spread
        # The mean of this factor is 1.
        shards = [seconds * self.draw.lognormvariate(-(spread**2) / 2, spread) for seconds in shards]
        _check_job_progress(shards, self.work, self.failures)
        committed, remaining, first = 0.0, sum(shards), True
        while True:
            with self.turns.request() as turn:
                yield turn
                group = yield from self._take_nodes()
                start = self.environment.now
                worked = yield from self._run_job(group, remaining)
                self.timing.job_seconds += (duration := self.environment.now - start)
                if worked >= remaining:
                    progress = remaining
                else:
                    progress = max(0.0, self._committed(shards, committed + worked) - committed)
                self.timing.lost_seconds += duration - progress - (self.work.opening if first else 0.0)
                self.free_groups.put(group)
            if progress >= remaining:
                return
            committed, remaining, first = committed + progress, remaining - progress, False
            self.timing.restarts += 1
            yield self.environment.timeout(self.failures.requeue_seconds)
            yield self._queue()

    def _take_nodes(self) -> Generator[simpy.Event, Any, list[_Node]]:
        """Take a group of nodes that are up; groups with nodes that are down are put back after the repair."""
        while True:
            group: list[_Node] = yield self.free_groups.get()
            down = [node.up for node in group if not node.up.triggered]
            if not down:
                return group
            self.environment.process(self._return_nodes(group, down))

    def _return_nodes(self, group: list[_Node], down: list[simpy.Event]) -> Events:
        yield self.environment.all_of(down)
        yield self.free_groups.put(group)

    def _run_job(self, group: list[_Node], remaining: float) -> Generator[simpy.Event, Any, float]:
        """Run a job once; return its seconds of work. A failed node stays occupied until the failure is noticed."""
        start, total = self.environment.now, self.work.opening + remaining
        until = min(total, self.work.limit)
        if math.isfinite(self.failures.preemption_hours):
            until = min(until, self.draw.expovariate(1 / (3600 * self.failures.preemption_hours)))
        job = cast(simpy.Process, self.environment.active_process)
        for node in group:
            node.jobs[job] = None
        try:
            yield self.environment.timeout(until)
            return remaining if until == total else max(0.0, until - self.work.opening)
        except simpy.Interrupt:
            worked = max(0.0, self.environment.now - start - self.work.opening)
            for node in group:
                node.jobs.pop(job, None)  # a second of its nodes may fail in the meantime
            yield self.environment.timeout(self.failures.notice_seconds)
            return worked
        finally:
            for node in group:
                node.jobs.pop(job, None)

    def _committed(self, shards: list[float], worked: float) -> float:
        """Return how many of `worked` seconds of work are committed."""
        before = 0.0
        for seconds in shards:
            if before + seconds > worked:
                every = self.work.saved_every
                return before + (math.floor((worked - before) / every) * every if math.isfinite(every) else 0.0)
            before += seconds
        return before
