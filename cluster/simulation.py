"""How long stages take on a cluster that fails, preempts and lets jobs wait: a discrete-event simulation of the fan-out.

Stages come one after the other, as in a run. So many jobs of a stage are at work at a time as the nodes hold and
`parallel_jobs` allows; a job opens its program, then computes its shards. One that is lost, preempted or at its time limit
goes back into the queue, where Slurm puts it, and goes on from the last commit or checkpoint that it saved. Not simulated:
straggler copies, nodes excluded after they lost several shards, errors of code. Jobs of several nodes take fixed groups.
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, cast

import simpy

from montessori_core.errors import UserError

Happening = Generator[simpy.Event, Any, Any]
_HOPELESS = 8.0
"""Logarithm of how often a job may start on average before something of it is saved."""


@dataclass(frozen=True)
class ClusterSpec:
    """The nodes that jobs run on.

    Attributes:
        nodes: how many.
        gpus: of each.
        cpus: cores of each.
    """

    nodes: int
    gpus: int
    cpus: int


@dataclass(frozen=True)
class FailureModel:
    """What happens to nodes and jobs. Times between events and waits in the queue are exponentially distributed.

    Attributes:
        node_failure_hours: mean time that a node works until it fails; infinite if it never does.
        notice_seconds: from a node's failure until the scheduler puts its jobs back (Slurm: SlurmdTimeout).
        repair_minutes: until the node is back.
        preemption_hours: mean time that a job runs until it is preempted; infinite if it never is.
        requeue_seconds: before a job that was put back may start again (Slurm: until its credential, `cred_expire`, is
            void).
        queue_minutes: mean wait of a submission, and of a job that was put back, before it may have a node, because of
            other people's jobs.
    """

    node_failure_hours: float = math.inf
    notice_seconds: float = 300.0
    repair_minutes: float = 60.0
    preemption_hours: float = math.inf
    requeue_seconds: float = 120.0
    queue_minutes: float = 0.0


@dataclass(frozen=True)
class Work:
    """A stage to be done.

    Attributes:
        name: for people.
        jobs: [jobs][shards], seconds that each shard takes on average.
        spread: standard deviation of the logarithm of a shard's seconds.
        opening: seconds from a job's start until its program can compute.
        saved_every: seconds of work between two savings within a shard; infinite if only whole shards are saved.
        nodes, gpus, cpus: that a job takes: nodes, and on each of them GPUs and cores.
        at_once: most jobs at a time.
        limit: seconds after which a job is put back into the queue.
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
    """What a stage took.

    Attributes:
        seconds: from beginning to end.
        job_seconds: of all its jobs together, those that were lost included.
        lost_seconds: of these, all but the work that was kept and each job's first opening.
        restarts: jobs that went back into the queue.
    """

    seconds: float = 0.0
    job_seconds: float = 0.0
    lost_seconds: float = 0.0
    restarts: int = 0


def room(work: Work, machines: ClusterSpec) -> int:
    """How many jobs of a stage the nodes hold at a time.

    Raises:
        UserError: not one.
    """
    on_a_node = min(machines.cpus // work.cpus, machines.gpus // work.gpus if work.gpus else machines.cpus)
    held = on_a_node * (machines.nodes // work.nodes)
    if not held:
        raise UserError(
            f"{work.name}: a job takes {work.nodes} nodes with {work.gpus} GPUs and {work.cpus} cores each, and there are "
            f"{machines.nodes} with {machines.gpus} and {machines.cpus}; see cluster.resources"
        )
    return held


def simulate(stages: Sequence[Work], machines: ClusterSpec, disturbances: FailureModel, seed: int) -> list[StageTiming]:
    """Do stages one after the other; what each took.

    Raises:
        UserError: a job fits on no node, or its time limit leaves it no time to get on.
    """
    for work in stages:
        room(work, machines)
    environment, draw = simpy.Environment(), Random(seed)
    nodes = [_Node(environment) for _ in range(machines.nodes)]
    if math.isfinite(disturbances.node_failure_hours):
        for node in nodes:
            environment.process(node.live(disturbances, draw))
    spent = [StageTiming() for _ in stages]

    def one_after_the_other() -> Happening:
        for work, own in zip(stages, spent, strict=True):
            begun = environment.now
            yield from _Stage(environment, work, machines, nodes, disturbances, draw, own).run()
            own.seconds = environment.now - begun

    environment.run(environment.process(one_after_the_other()))
    return spent


def _check_that_a_job_gets_on(shards: Sequence[float], work: Work, disturbances: FailureModel) -> None:
    first_saved = min(work.saved_every, max(shards))
    least = work.opening + first_saved
    if least >= work.limit:
        raise UserError(
            f"{work.name}: a job takes {work.opening:.0f} s to begin, then saves after {first_saved:.0f} s: "
            f"within its time limit of {work.limit:.0f} s it would never get on; raise time_limit_minutes in "
            "cluster.resources, or make shards smaller"
        )
    # Of a memoryless life, a job gets on once in e^(least / life) starts.
    rate = (work.nodes / disturbances.node_failure_hours + 1 / disturbances.preemption_hours) / 3600
    if least * rate > _HOPELESS:
        raise UserError(
            f"{work.name}: a job takes {work.opening:.0f} s to begin, then saves after {first_saved:.0f} s, and lives for "
            f"{1 / rate:.0f} s on average: it would hardly ever get on; fewer failures or preemptions, or smaller shards"
        )


class _Node:
    """A node, up or down."""

    def __init__(self, environment: simpy.Environment) -> None:
        self._environment = environment
        self.jobs: dict[simpy.Process, None] = {}  # in order, so that a seed has one outcome
        self.up = environment.event().succeed()

    def live(self, disturbances: FailureModel, draw: Random) -> Happening:
        """Work, fail, be repaired, and so on."""
        while True:
            yield self._environment.timeout(draw.expovariate(1 / (3600 * disturbances.node_failure_hours)))
            self.up = self._environment.event()
            for job in list(self.jobs):
                job.interrupt()
            yield self._environment.timeout(60 * disturbances.repair_minutes)
            self.up.succeed()


@dataclass
class _Stage:
    """A stage at work."""

    environment: simpy.Environment
    work: Work
    machines: ClusterSpec
    nodes: list[_Node]
    disturbances: FailureModel
    draw: Random
    spent: StageTiming
    turns: simpy.Resource = field(init=False)
    places: simpy.Store = field(init=False)

    def run(self) -> Happening:
        """Everything from the driver's call to its return."""
        self.turns = simpy.Resource(self.environment, self.work.at_once)
        self.places = simpy.Store(self.environment)
        groups = [
            self.nodes[first : first + self.work.nodes]
            for first in range(0, len(self.nodes) - self.work.nodes + 1, self.work.nodes)
        ]
        # Jobs are spread over the nodes, as a scheduler would.
        for _ in range(room(self.work, self.machines) // len(groups)):
            for group in groups:
                self.places.put(group)
        yield self.environment.timeout(self.work.around)
        yield self._queue()
        yield self.environment.all_of([self.environment.process(self._job(list(shards))) for shards in self.work.jobs])

    def _queue(self) -> simpy.Event:
        minutes = self.disturbances.queue_minutes
        return self.environment.timeout(self.draw.expovariate(1 / (60 * minutes)) if minutes else 0.0)

    def _job(self, shards: list[float]) -> Happening:
        """One job, until all its shards are done."""
        spread = self.work.spread
        # The mean of this factor is 1.
        shards = [seconds * self.draw.lognormvariate(-(spread**2) / 2, spread) for seconds in shards]
        _check_that_a_job_gets_on(shards, self.work, self.disturbances)
        kept, left, first = 0.0, sum(shards), True
        while True:
            with self.turns.request() as turn:
                yield turn
                group = yield from self._place()
                began = self.environment.now
                worked = yield from self._at_work(group, left)
                self.spent.job_seconds += (took := self.environment.now - began)
                gone_on = left if worked >= left else max(0.0, self._saved(shards, kept + worked) - kept)
                self.spent.lost_seconds += took - gone_on - (self.work.opening if first else 0.0)
                self.places.put(group)
            if gone_on >= left:
                return
            kept, left, first = kept + gone_on, left - gone_on, False
            self.spent.restarts += 1
            yield self.environment.timeout(self.disturbances.requeue_seconds)
            yield self._queue()

    def _place(self) -> Generator[simpy.Event, Any, list[_Node]]:
        """Nodes to run on; those that are down come back by themselves."""
        while True:
            group: list[_Node] = yield self.places.get()
            down = [node.up for node in group if not node.up.triggered]
            if not down:
                return group
            self.environment.process(self._return(group, down))

    def _return(self, group: list[_Node], down: list[simpy.Event]) -> Happening:
        yield self.environment.all_of(down)
        yield self.places.put(group)

    def _at_work(self, group: list[_Node], left: float) -> Generator[simpy.Event, Any, float]:
        """Seconds of work that a start of a job did, of those that are left; nodes are held until the loss is noticed."""
        began, whole = self.environment.now, self.work.opening + left
        until = min(whole, self.work.limit)
        if math.isfinite(self.disturbances.preemption_hours):
            until = min(until, self.draw.expovariate(1 / (3600 * self.disturbances.preemption_hours)))
        job = cast(simpy.Process, self.environment.active_process)
        for node in group:
            node.jobs[job] = None
        try:
            yield self.environment.timeout(until)
            return left if until == whole else max(0.0, until - self.work.opening)
        except simpy.Interrupt:
            worked = max(0.0, self.environment.now - began - self.work.opening)
            for node in group:
                node.jobs.pop(job, None)  # another of its nodes may fail before this is noticed
            yield self.environment.timeout(self.disturbances.notice_seconds)
            return worked
        finally:
            for node in group:
                node.jobs.pop(job, None)

    def _saved(self, shards: list[float], worked: float) -> float:
        """Of so many seconds of work at shards, those that are on disk."""
        before = 0.0
        for seconds in shards:
            if before + seconds > worked:
                every = self.work.saved_every
                return before + (math.floor((worked - before) / every) * every if math.isfinite(every) else 0.0)
            before += seconds
        return before
