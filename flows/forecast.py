"""Predict the time of an experiment on a cluster from the costs of a small run, the pilot.

Each stage of the pilot is scaled to the rows of the experiment, at the pilot's cost per row, and cut into jobs of the
experiment's cluster section; `cluster.simulation` simulates them with failures and queueing.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
from tqdm import tqdm

from cluster.backends.base import split_evenly, split_for_array
from cluster.partial_commits import COMMIT_SECONDS
from cluster.shards import shard_size
from cluster.simulation import ClusterSpec, FailureModel, StageTiming, Work, capacity, simulate
from cluster.status import stages_of
from cluster.usage import StageCost, cost_of
from montessori_core import layout
from montessori_core.config import Experiment, Resources, StageResources, differences
from montessori_core.errors import UserError
from montessori_core.influence.pilot import PILOT
from montessori_core.training.schedule import CHECKPOINT_SECONDS
from tasks.run import Run
from tasks.studies import unused_stages

_SIZES = {
    "warmup": {"examples"},
    "training": {"examples"},
    "influence": {"probing_examples", "later_probing_examples", "examples_per_shard"},
    "synthesis": {"prompts_per_shard", "instructions_per_shard"},
    "preferences": {"max_pairs"},
    "comparison": {"influence_examples"},
}
"""Settings that change only the rows or the cut of a stage; all others may change the cost of a row or the stages."""


@dataclass(frozen=True)
class Forecast:
    """Simulated times of an experiment on a cluster.

    Attributes:
        machines: nodes of the cluster.
        stages: stages in order.
        timings: [simulations][stages].
    """

    machines: ClusterSpec
    stages: Sequence[Work]
    timings: Sequence[Sequence[StageTiming]]

    def hours(self, kind: str, share: float) -> float:
        """Return a quantile, over the simulations, of the total 'wall', 'job' or 'gpu' hours."""
        return float(np.quantile([self._total(kind, timings) for timings in self.timings], share))

    def mean(self, stage: int) -> StageTiming:
        """Return the mean timing of a stage, by its index, over the simulations."""
        timings = [simulation[stage] for simulation in self.timings]
        return StageTiming(
            **{
                name: statistics.mean(getattr(timing, name) for timing in timings)
                for name in StageTiming.__annotations__
            }
        )

    def gpu_hours(self, stage: int) -> float:
        """Return the mean GPU-hours of a stage."""
        return _gpu_hours(self.stages[stage], self.mean(stage))

    def longest(self) -> int:
        """Return the index of the longest stage."""
        return max(range(len(self.stages)), key=lambda stage: self.mean(stage).seconds)

    def jobs_at_once(self, stage: int) -> tuple[int, str]:
        """Return how many jobs of a stage run at a time, and what limits the number."""
        work = self.stages[stage]
        limits = {
            "make shards smaller for more jobs": len(work.jobs),
            "raise parallel_jobs in cluster.resources for more": work.at_once,
            "more nodes would help": capacity(work, self.machines),
        }
        reason = min(limits, key=lambda name: limits[name])
        return limits[reason], reason

    def _total(self, kind: str, timings: Sequence[StageTiming]) -> float:
        if kind == "gpu":
            return sum(map(_gpu_hours, self.stages, timings))
        return sum(timing.seconds if kind == "wall" else timing.job_seconds for timing in timings) / 3600


def forecast(
    pilot: Run, experiment: Experiment, machines: Sequence[ClusterSpec], failures: FailureModel, simulations: int
) -> list[Forecast]:
    """Simulate an experiment on each of several clusters.

    Raises:
        UserError: the pilot is not finished, or a job does not fit the nodes.
    """
    if not pilot.finished:
        raise UserError(f"{pilot.folder}: this pilot is not finished; resume it: montessori resume {pilot.folder}")
    stages = planned_stages(pilot, experiment)
    return [
        Forecast(
            cluster,
            stages,
            [
                simulate(stages, cluster, failures, seed)
                for seed in tqdm(range(simulations), desc=f"{cluster.nodes} nodes", leave=False, disable=None)
            ],
        )
        for cluster in machines
    ]


def planned_stages(pilot: Run, experiment: Experiment) -> list[Work]:
    """Return the stages of an experiment, with rows and costs scaled from the pilot.

    Raises:
        UserError: a stage of the pilot is not done.
    """
    costs: dict[PurePath, StageCost] = {}
    unused = unused_stages(pilot)
    for folder in stages_of(pilot.folder):
        if folder in unused:
            continue
        cost = cost_of(folder)
        if cost is None:
            raise UserError(
                f"{folder}: this stage of the pilot is not finished, or an older version computed it; resume the pilot "
                f"(montessori resume {pilot.folder}) or run a new one"
            )
        costs[folder.relative_to(pilot.folder)] = cost
    last = max((_iteration_of(stage) for stage in costs), default=0)
    if not last:
        raise UserError(f"{pilot.folder}: this run has no stages; a pilot is a finished run")
    around = _driver_seconds(list(costs.values()))
    works = []
    for number in range(1, experiment.iterations + 1):
        source = min(number, last)
        for stage, cost in costs.items():
            if _iteration_of(stage) != source or (number > source and not stage.parts[0].startswith("iteration-")):
                continue
            if stage.parts[0] == layout.UNMODIFIED and not experiment.comparison.unmodified_teacher:
                continue
            renamed = PurePath(layout.iteration(number), *stage.parts[1:]) if number > source else stage
            rows = math.ceil(cost.rows * _size(renamed, experiment) / max(1, _size(stage, pilot.experiment)))
            if renamed.name == "teacher":
                rows = min(rows, experiment.preferences.max_pairs or rows)
            if rows:
                works.append(_work(renamed, rows, cost, experiment, around))
    return works


def _driver_seconds(costs: Sequence[StageCost]) -> float:
    """Return the median time from a stage's last commit to the next stage's first job; the run may have been interrupted."""
    gaps = [after.begun - before.ended for before, after in itertools.pairwise(costs)]
    return max(0.0, statistics.median(gaps)) if gaps else 0.0


def _iteration_of(stage: PurePath) -> int:
    """Return the iteration of a stage; untrained student and unmodified teacher belong to the first."""
    name, _, number = stage.parts[0].partition("-")
    return int(number) if name == "iteration" and number.isdecimal() else 1


def _size(stage: PurePath, experiment: Experiment) -> int:
    """Return the setting that a stage's rows are proportional to, found by its folder names; 1 if there is none."""
    *folders, name = stage.parts
    first = _iteration_of(stage) == 1
    influence, comparison = experiment.influence, experiment.comparison
    probing = influence.probing_examples if first else influence.later_probing_examples
    warming = experiment.warmup.examples if first else 0
    if name.startswith("training-influence"):
        measured = min(comparison.influence_examples, experiment.training.examples)
    else:
        measured = probing
    if name == "warmup":
        return warming
    if name == "student" or "training" in folders:
        return experiment.training.examples
    if name.startswith(("instructions-", "responses-")):
        return warming + probing
    if name == "influence-pilot":
        return 1  # fixed size
    if name == "influence" and measured >= 4 * PILOT:
        return measured - PILOT
    audited = min(measured, influence.screening.audit_examples)
    if name.endswith("influence-audit"):
        return audited
    if name.endswith("influence-confirm"):
        return measured - audited
    if name == "teacher" or name.endswith("influence"):
        return measured
    return 1


def _work(stage: PurePath, rows: int, cost: StageCost, experiment: Experiment, around: float) -> Work:
    resources: Resources = getattr(experiment.cluster.resources, cost.kind)
    at_once = resources.parallel_jobs
    influence, synthesis = experiment.influence, experiment.synthesis
    if cost.kind == "influence":
        size = influence.examples_per_shard
    elif cost.kind == "judging":
        size = rows  # one job asks an API, see `Step.ask`
    elif stage.name.startswith("instructions-"):
        size = synthesis.prompts_per_shard
    elif stage.name.startswith("responses-"):
        size = synthesis.instructions_per_shard
    else:
        size = cost.shard_rows if cost.shard_rows < cost.rows else rows
    if cost.kind in ("influence", "generation"):
        size = shard_size(rows, at_once, size)
    shards = [min(size, rows - start) * cost.seconds_per_row for start in range(0, rows, size)]
    if cost.kind in ("training", "teacher_update"):
        saved_every = CHECKPOINT_SECONDS
    else:
        saved_every = max(COMMIT_SECONDS, cost.seconds_per_row)
    local = experiment.cluster.profile == "local"
    return Work(
        name=str(stage),
        jobs=split_evenly(shards, at_once) if local else split_for_array(shards, at_once, resources.shards_per_job),
        spread=cost.spread / math.sqrt(min(size, rows)),
        opening=cost.opening,
        saved_every=saved_every,
        nodes=resources.nodes,
        gpus=resources.gpus_per_node,
        cpus=resources.processes_per_node * resources.cpus_per_process,
        at_once=at_once,
        limit=60.0 * resources.time_limit_minutes,
        around=around,
    )


def costs_may_differ(pilot: Experiment, experiment: Experiment) -> list[str]:
    """Return the differing settings that may change the cost of a row: all but sizes and numbers of jobs.

    Two sizes count: `influence_examples` of 0, which removes a stage, and `max_pairs`, which may have limited the pilot's
    pairs.
    """
    excluded: dict[str, Any] = dict.fromkeys(("name", "cluster", "iterations", "seed"), True) | _SIZES
    if pilot.preferences.max_pairs is not None:
        del excluded["preferences"]

    def cost_settings(configuration: Experiment) -> dict[str, Any]:
        settings = configuration.model_dump(mode="json", exclude=excluded)
        settings["comparison"]["influence_examples > 0"] = configuration.comparison.influence_examples > 0
        job = {"nodes", "processes_per_node", "gpus_per_node", "cpus_per_process"}
        kinds = dict.fromkeys(StageResources.model_fields, job)
        return settings | {
            "cluster": {"resources": configuration.cluster.resources.model_dump(mode="json", include=kinds)}
        }

    return differences(cost_settings(pilot), cost_settings(experiment))


def _gpu_hours(work: Work, timing: StageTiming) -> float:
    return timing.job_seconds * work.nodes * work.gpus / 3600
