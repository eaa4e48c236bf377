"""The driver of a run or a study as a Slurm job, for flow runs: submit it, wait for its end, end it.

The flow run waits on a login node, where many sites end long processes. If it is ended, the job continues; a retry of the
flow run finds the job and waits for it.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from prefect import get_run_logger
from prefect.settings import PREFECT_API_URL

from cluster.backends.base import SchedulerUnavailable
from cluster.driver_job import check_profile, log_of_driver
from cluster.file_systems import patiently
from cluster.lock import driver_of, end_driver, submit_driver
from cluster.status import stages_of
from flows.prefect_api import is_local, own_database
from montessori_core.config import Cluster, Slurm
from montessori_core.errors import UserError
from tasks.studies import is_finished, reopen

_POLL_SECONDS = 5.0
_LOOK_SECONDS = 60.0  # between two looks for new stages: a large run has tens of thousands of files


def check_driver_job(cluster: Cluster, approve: bool = False) -> None:
    """Check that the driver of a flow run can run as a Slurm job.

    Raises:
        UserError: the run's jobs are not Slurm jobs, its nodes cannot reach this Prefect server, or somebody is to approve
            preference pairs.
    """
    check_profile(cluster, "submit_driver")
    if approve:
        raise UserError(
            "submit_driver: a driver's job cannot wait for approval; leave either submit_driver or approve out"
        )
    api = PREFECT_API_URL.value()
    if is_local(api):
        raise UserError(
            f"submit_driver: the nodes of the cluster cannot reach this Prefect server, {api}; start a server at an address "
            "that they reach, with a login, and set PREFECT_API_URL to it before montessori up or the worker starts. Or "
            "leave submit_driver out"
        )


def drive_by_job(folder: Path, start: Callable[[], object], command: Sequence[str], slurm: Slurm) -> None:
    """Submit the driver of a run or a study as a Slurm job; return when it has finished.

    If an earlier flow run has submitted a driver, wait for its end first; then submit another one only if the settings of
    this flow run leave something to do.

    Args:
        folder: of the run or the study.
        start: creates or opens the folder, with the settings of this flow run.
        command: words after `montessori`.
        slurm: settings.

    Raises:
        UserError: a process drives the run, sbatch refuses the job, or the job has ended before the run was finished.
    """
    log = get_run_logger()
    while (driver := driver_of(folder)) is not None and driver.job_name is not None:
        log.info("an earlier flow run or command has submitted the driver: %s", driver)
        _await_finish(folder)
    start()
    if is_finished(reopen(folder)):
        log.info("%s is finished", folder.name)
        return
    driver = submit_driver(folder, command, own_database(folder), slurm)
    log.info("the driver is Slurm job %s; its flow run has the same name as this one", driver.job)
    _await_finish(folder)


def _await_finish(folder: Path) -> None:
    """Wait for the end of a driver's job; raise a UserError if the run is not finished then."""
    get_run_logger().info("log of the driver: %s", log_of_driver(folder))
    _await_end(folder)
    if not patiently(lambda: is_finished(reopen(folder)), _POLL_SECONDS):
        raise UserError(
            f"the driver's job has ended before {folder.name} was finished; the reason is at the end of "
            f"{log_of_driver(folder)}. Finished work is kept: retry this flow run when the cause is removed"
        )


def _await_end(folder: Path) -> None:
    """Wait until the driver has ended; log what becomes of its job, and each stage that begins."""
    log = get_run_logger()
    state, seen, running = "", len(stages_of(folder)), True
    next_look = time.monotonic() + _LOOK_SECONDS
    while running:
        try:
            driver = patiently(lambda: driver_of(folder), _POLL_SECONDS)
            running = driver is not None
            current = f"the driver: {driver}" if running else "the driver has ended"
        except SchedulerUnavailable as error:
            current = str(error)
        if current != state:
            log.info(current)
            state = current
        if not running or time.monotonic() >= next_look:
            begun = patiently(lambda: stages_of(folder), _POLL_SECONDS)
            for stage in begun[seen:]:
                log.info("%s has begun", stage.relative_to(folder))
            seen, next_look = len(begun), time.monotonic() + _LOOK_SECONDS
        if running:
            time.sleep(_POLL_SECONDS)


def end_driver_job(folder: Path) -> None:
    """End the driver of a cancelled flow run if it is a Slurm job; it cancels the jobs of its run first."""
    driver = driver_of(folder)
    if driver is not None and driver.job_name is not None:
        end_driver(folder)
