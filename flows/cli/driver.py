"""The driver of a run or a study as a Slurm job: the option --submit-driver of several commands."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cluster.backends.sbatch import DRIVER_JOB
from cluster.driver_job import check_profile, log_of_driver
from cluster.lock import submit_driver
from flows.cli.console import console
from flows.prefect_api import own_database, refuse_local_api
from montessori_core.config import Experiment, Slurm
from tasks.resume import resume_command

SubmitDriver = Annotated[
    bool,
    typer.Option("--submit-driver", help="Run the driver as a Slurm job (cluster.slurm.driver), not in this terminal."),
]


def check_driver_job(experiment: Experiment) -> None:
    """Check that a driver can run as a Slurm job.

    Raises:
        UserError: the run's jobs are not Slurm jobs, or the driver could not reach its Prefect server.
    """
    from prefect.settings import PREFECT_API_URL

    check_profile(experiment.cluster, "--submit-driver")
    refuse_local_api(PREFECT_API_URL.value())


def command_to_resume(folder: Path) -> str:
    """Return the command that resumes a run or a study as it runs now: in a Slurm job or in a terminal."""
    return resume_command(folder, " --submit-driver" if DRIVER_JOB in os.environ else "")


def submit_command(folder: Path, command: Sequence[str], slurm: Slurm) -> None:
    """Submit a command that drives a run or a study as a Slurm job; print how to follow and end it.

    Args:
        folder: of the run or the study.
        command: words after `montessori`.
        slurm: settings.

    Raises:
        UserError: there is a driver already, or sbatch refuses the job.
    """
    driver = submit_driver(folder, command, own_database(folder), slurm)
    for line in (
        f"the driver is Slurm job {driver.job}",
        f"  log:    {log_of_driver(folder)}",
        f"  follow: montessori status {folder}",
        f"          montessori logs {folder} --driver",
        f"  end:    montessori cancel {folder}",
    ):
        console.print(line, soft_wrap=True)
