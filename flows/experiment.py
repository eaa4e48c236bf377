"""An experiment: iterations one after the other, each with the teacher and the student of the last.

`montessori` is the flow that people start from Prefect, with the whole configuration as its form; `experiment` is the same
for a run that is open already, as the command line has it.
"""

import os
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger, runtime
from pydantic import Field

from cluster.lock import driver_of, only_driver
from cluster.status import cancel_jobs, stages_of
from flows.iteration import Iteration, iteration
from montessori_core import layout
from montessori_core.config import Experiment
from montessori_core.files import read_json, write_json
from tasks.benchmarks import list_items
from tasks.report import write_report
from tasks.run import Run, open_run, reopen_run

RUN_ROOT = "MONTESSORI_RUN_ROOT"
"""Environment variable: the folder of runs that are started from Prefect; by default `runs` where the worker is."""


def end_jobs(flow: Any, flow_run: Any, state: Any) -> None:
    """Hook, after a run was cancelled: end what jobs its driver could not end itself."""
    end_jobs_of(run_root() / flow_run.parameters["experiment"]["name"])


def end_jobs_of(folder: Path) -> None:
    """End the jobs of a run that nobody drives."""
    opened = reopen_run(folder)
    if driver_of(opened.folder) is not None:
        return  # somebody else's: this flow run was refused, or cancelled before it drove anything
    for folder in stages_of(opened.folder):
        cancel_jobs(folder, opened.experiment.cluster)


def run_root() -> Path:
    """The folder of runs that are started from Prefect."""
    return Path(os.environ.get(RUN_ROOT, "runs"))


@flow(name="montessori", flow_run_name="{experiment.name}", on_cancellation=[end_jobs])
def montessori(
    experiment: Experiment,
    add_iterations: Annotated[int, Field(ge=0)] = 0,
    approve: bool = False,
) -> None:
    """Tailor a teacher to a student: synthesis, influence, preference pairs, DPO, training, and again.

    A run of the same name is continued: what is done is read from its folder, not repeated. So press Retry, or start it again
    with the same parameters, after a failure, a crash or a cancellation.

    Args:
        experiment: models, data, sizes and machines; the name is that of the run's folder.
        add_iterations: for schedules: run so many iterations beyond those that are finished, whatever experiment.iterations
            says; 0 runs up to that number.
        approve: pause before every teacher update until someone has looked at the preference pairs.
    """
    folder = run_root() / experiment.name
    if add_iterations:
        iterations = _iterations_wanted(folder, add_iterations)
        experiment = experiment.model_copy(update={"iterations": iterations})
    run, warnings = open_run(experiment, folder)
    for warning in warnings:
        get_run_logger().warning(warning)
    _iterate(run, approve, scheduled=bool(add_iterations))


@flow(flow_run_name="{run.experiment.name}", validate_parameters=False)
def experiment(run: Run) -> None:
    """Run, or resume, all iterations. Whatever is done already is read, not repeated."""
    _iterate(run, approve=False)


def _iterate(run: Run, approve: bool, scheduled: bool = False) -> None:
    with only_driver(run.folder):
        list_items(run)
        done: Iteration | None = None
        for number in range(1, run.experiment.iterations + 1):
            continued = scheduled or number < run.experiment.iterations  # a schedule's next flow run adds one
            done = iteration(run, number, done, approve, continued)
            write_report(run)


def _iterations_wanted(folder: Path, more: int) -> int:
    """Iterations at the end of this flow run; the same after a retry."""
    noted = read_json(folder / "schedule.json") or {}
    if runtime.flow_run.id not in noted:
        finished = sum((path / layout.METRICS).exists() for path in layout.iterations(folder).values())
        folder.mkdir(parents=True, exist_ok=True)
        write_json({**noted, runtime.flow_run.id: finished + more}, folder / "schedule.json")
        return finished + more
    return int(noted[runtime.flow_run.id])
