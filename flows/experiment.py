"""An experiment: a chain of iterations; each starts from the teacher and the student of the last.

`montessori` is the flow to start from Prefect, with the whole configuration as its form; `experiment` is the flow of the
command line, for an opened run.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger, runtime
from pydantic import Field

from cluster.file_systems import patiently
from cluster.lock import driver_of, only_driver
from cluster.status import cancel_jobs
from flows.disk import warn_of_run
from flows.driver_job import check_driver_job, drive_by_job, end_driver_job
from flows.iteration import Iteration, iteration
from flows.state_watch import watched_state
from montessori_core import layout
from montessori_core.config import Cluster, Experiment
from montessori_core.errors import UserError
from montessori_core.files import read_json, write_json
from tasks.approval import WhenUnapproved, needs_approval, require_approval
from tasks.benchmarks import list_items, warn_of_references
from tasks.report import write_report
from tasks.resume import RUN_ROOT, refuse_command_folder
from tasks.run import Run, open_run, reopen_run
from tasks.tracking import start_tracking, track_iteration


def end_jobs(flow: Any, flow_run: Any, state: Any) -> None:
    """End the remaining jobs of a cancelled run (Prefect hook)."""
    end_jobs_of(Experiment.model_validate(flow_run.parameters["experiment"]).name, flow_run)


def end_jobs_of(name: str, flow_run: Any) -> None:
    """End the jobs of a run whose flow run is cancelled."""
    folder = run_root() / name
    end_jobs_in(folder, reopen_run(folder).experiment.cluster, flow_run)


def end_jobs_in(folder: Path, cluster: Cluster, flow_run: Any) -> None:
    """End the jobs of the stages in a folder, held jobs, and its driver if the cancelled flow run waits for a Slurm job."""
    if flow_run.parameters.get("submit_driver"):
        end_driver_job(folder)
    if patiently(lambda: driver_of(folder), pause=5.0) is not None:
        return  # another process is the driver: this flow run never took the lock
    cancel_jobs(folder, cluster)


def run_root() -> Path:
    """Return the folder of runs started from Prefect.

    Raises:
        UserError: a worker does not name it; its flow runs have a temporary working directory, which is removed.
    """
    root = Path(os.environ.get(RUN_ROOT, "runs"))
    if "PREFECT__FLOW_RUN_ID" in os.environ and not root.is_absolute():
        raise UserError(f"set {RUN_ROOT} to an absolute folder, where the worker starts: runs are written there")
    return root


@flow(name="montessori", flow_run_name="{experiment.name}", on_cancellation=[end_jobs])
def montessori(
    experiment: Experiment,
    add_iterations: Annotated[int, Field(ge=0)] = 0,
    approve: bool = False,
    submit_driver: bool = False,
) -> None:
    """Tailor a teacher to a student in iterations of synthesis, influence, preference pairs, DPO and training.

    A run of the same name is resumed: finished work is read from its folder, not repeated. So after a failure, a crash or a
    cancellation, press Retry, or start the run again with the same parameters.

    Args:
        experiment: models, data, sizes and machines; its name is the name of the run's folder.
        add_iterations: for schedules: iterations to add to the finished ones, regardless of experiment.iterations; with 0,
            experiment.iterations is the total.
        approve: pause before every teacher update until a person approves the preference pairs. The run keeps this, also if
            it is resumed without it.
        submit_driver: run the driver as a Slurm job (experiment.cluster.slurm.driver) that this flow run waits for.
    """
    if submit_driver:
        check_driver_job(experiment.cluster, approve)  # before a folder is made

    def start() -> Run:  # iterations are counted when an earlier driver has ended
        total = (
            _total_iterations(run_root() / experiment.name, add_iterations) if add_iterations else experiment.iterations
        )
        return start_run(experiment.model_copy(update={"iterations": total}))

    drive_run(experiment, start, approve, submit_driver)


def start_run(experiment: Experiment) -> Run:
    """Create or open the run of an experiment in the folder of runs, and log its warnings."""
    folder = run_root() / experiment.name
    refuse_command_folder(folder)
    run, warnings = open_run(experiment, folder)
    log_warnings([*warnings, *warn_of_run(run)])
    return run


def drive_run(experiment: Experiment, start: Callable[[], Run], approve: bool, submit_driver: bool) -> None:
    """Run or resume the iterations of an experiment, in this flow run or in a Slurm job; `start` creates or opens its run."""
    if submit_driver:
        folder = (run_root() / experiment.name).resolve()
        drive_by_job(folder, start, ["resume", str(folder)], experiment.cluster.slurm)
    else:
        run_iterations(start(), "pause", approve)


def log_warnings(warnings: list[str]) -> None:
    """Log the warnings of an opened run to the flow run."""
    for warning in warnings:
        get_run_logger().warning(warning)


@flow(flow_run_name="{run.experiment.name}", validate_parameters=False)
def experiment(run: Run) -> None:
    """Run or resume all iterations; finished work is not repeated."""
    run_iterations(run, "refuse")


def run_iterations(run: Run, when_unapproved: WhenUnapproved, approve: bool = False) -> None:
    """Run or resume the iterations of a run, and write its report after each.

    Args:
        run: the run.
        when_unapproved: what to do with preference pairs that are not approved, if the run needs approval.
        approve: let the run need it from now on.
    """
    scheduled = (run.folder / layout.SCHEDULE).exists()
    with watched_state(), only_driver(run.folder):
        if approve:
            require_approval(run)
        check = when_unapproved if needs_approval(run) else None
        list_items(run)
        warn_of_references(run)
        start_tracking(run.folder, run.experiment)
        previous: Iteration | None = None
        for number in range(1, run.experiment.iterations + 1):
            continued = scheduled or number < run.experiment.iterations  # a schedule's next flow run adds one
            previous = iteration(run, number, previous, check, continued)
            track_iteration(run.folder, run.experiment, number)
            write_report(run)


def _total_iterations(folder: Path, added: int) -> int:
    """Return the number of iterations after this flow run; recorded, so that a retry has the same."""
    record: dict[str, Any] = read_json(folder / layout.SCHEDULE) or {}
    before = record.pop("finished", 0)
    totals: dict[str, int] = record.get("totals", record)  # earlier runs have them beside 'finished'
    if runtime.flow_run.id not in totals:
        finished = sum((path / layout.METRICS).exists() for path in layout.iterations(folder).values())
        finished = max(finished, before)  # changed settings make finished iterations unfinished
        totals[runtime.flow_run.id] = finished + added
        folder.mkdir(parents=True, exist_ok=True)
        write_json({"finished": finished, "totals": totals}, folder / layout.SCHEDULE)
    return totals[runtime.flow_run.id]
