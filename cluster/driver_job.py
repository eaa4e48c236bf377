"""The Slurm job that runs the driver: its script, its state in the queue, and its end before its time limit.

Slurm requeues the job when its node fails or it is preempted. Before its time limit it requeues itself. Its next start
resumes the run: it waits for the run's jobs, which continue without a driver.
"""

import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.backends.base import SchedulerUnavailable
from cluster.backends.command import run_command
from cluster.backends.sbatch import DRIVER_JOB, call_sbatch
from montessori_core import layout
from montessori_core.config import Cluster, Slurm
from montessori_core.errors import UserError

log = logging.getLogger(__name__)

_WARNING_SECONDS = 90  # between Slurm's signal and the time limit; Slurm may send the signal up to a minute early
_SCONTROL_TIMEOUT = 20.0  # seconds
_REQUEUE_PAUSE = 2.0  # seconds
_STOP = signal.SIGUSR2  # raises DriverStopped in the main thread
# Signals are blocked before libraries start threads, which would otherwise receive them.
_ENTRY = (
    "import signal as s; s.pthread_sigmask(s.SIG_BLOCK, [s.SIGUSR1, s.SIGTERM]); import montessori_entry as m; m.main()"
)


class DriverStopped(BaseException):
    """Slurm ends the driver's job: the driver exits, and the jobs of its run continue."""


@dataclass(frozen=True)
class QueuedJob:
    """A job in Slurm's queue: its id, state, and its node or the reason why it waits."""

    id: str
    state: str
    where: str

    def __str__(self) -> str:
        return f"{self.state} {self.where}"


def queued_job(name: str) -> QueuedJob | None:
    """Return the job of a unique name; None if it has ended.

    Raises:
        SchedulerUnavailable: squeue does not answer, or is missing.
    """
    answer = run_command("squeue", "--noheader", f"--name={name}", "--format=%i|%T|%R")
    if answer is None:
        raise SchedulerUnavailable("squeue does not answer here: cannot tell whether the job has ended")
    lines = answer.splitlines()
    return QueuedJob(*lines[0].split("|", 2)) if lines else None


def check_profile(cluster: Cluster, switch: str) -> None:
    """Check that the jobs of a run whose driver is to be a Slurm job are Slurm jobs, too.

    Raises:
        UserError: they are not; names the `switch` that asks for the driver's job.
    """
    if cluster.profile != "slurm":
        raise UserError(
            f"{switch}: cluster.profile is {cluster.profile}, so the jobs would run inside the driver's job; set "
            f"profile: slurm, or leave {switch} out"
        )


def log_of_driver(folder: Path) -> Path:
    """Return the log of a run's driver jobs; it exists once one has started."""
    return folder / layout.DRIVER_LOG


def submit_job(folder: Path, name: str, command: Sequence[str], variables: Mapping[str, str], slurm: Slurm) -> str:
    """Submit the job of a driver; return its id.

    Args:
        folder: run folder, for the job's script and log.
        name: unique name of the job.
        command: words after `montessori`.
        variables: environment variables of the job, beside those of this process.
        slurm: settings.

    Raises:
        UserError: sbatch refuses the job.
        SchedulerUnavailable: sbatch does not answer; it may have accepted the job.
    """
    script = folder / layout.DRIVER_SCRIPT
    script.write_text(script_of(folder, name, command, variables, slurm), encoding="utf-8")
    outcome = call_sbatch(script)
    if outcome.returncode != 0:
        raise UserError(
            f"sbatch rejected the driver's job: {outcome.stderr.strip()}\nSee cluster.slurm.driver in the configuration."
        )
    return outcome.stdout.strip().split(";")[0]


def script_of(folder: Path, name: str, command: Sequence[str], variables: Mapping[str, str], slurm: Slurm) -> str:
    """Return the batch script of a driver; arguments as for `submit_job`."""
    job = slurm.driver
    options: dict[str, str | int | bool | None] = {
        "parsable": True,
        "job-name": name,
        "output": str(log_of_driver(folder)).replace("%", "%%"),
        "open-mode": "append",
        "nodes": 1,
        "ntasks": 1,
        "cpus-per-task": job.cpus,
        "mem": None if job.memory_gb is None else f"{job.memory_gb}GB",
        "time": job.time_limit_minutes,
        "signal": f"B:USR1@{min(_WARNING_SECONDS, 15 * job.time_limit_minutes)}",
        "partition": job.partition or slurm.partition,
        "account": job.account or slurm.account,
        "qos": job.qos or slurm.qos,
        "requeue": True,
        **job.extra,
    }
    lines = ["#!/bin/bash"]
    for option, value in options.items():
        if value is not None and value is not False:
            lines.append(f"#SBATCH --{option}" + ("" if value is True else f"={shlex.quote(str(value))}"))
    program = [sys.executable, "-P", "-u", "-c", _ENTRY, *command]
    return "\n".join(
        [
            *lines,
            "trap '' USR1  # until the driver waits for the signal",
            *job.setup,
            *(f"export {key}={shlex.quote(value)}" for key, value in {**variables, DRIVER_JOB: name}.items()),
            f"exec {shlex.join(program)}",
            "",
        ]
    )


@contextmanager
def stopped_with_its_job() -> Iterator[None]:
    """In a driver's job, raise DriverStopped in the block when Slurm ends the job; before its time limit, requeue the job.

    A thread waits for Slurm's signals, which all other threads block: the main thread may be busy in a library, and Prefect
    handles SIGTERM as a cancellation. Outside a driver's job, do nothing.
    """
    if DRIVER_JOB not in os.environ:
        yield
        return
    signal.signal(_STOP, _stop)
    main = threading.get_ident()

    def wait_for_end() -> None:
        if signal.sigwait([signal.SIGUSR1, signal.SIGTERM]) == signal.SIGUSR1:
            _requeue(os.environ["SLURM_JOB_ID"])
        signal.pthread_kill(main, _STOP)

    threading.Thread(target=wait_for_end, daemon=True, name="end of the job").start()
    yield


def _stop(number: int, frame: object) -> None:
    raise DriverStopped


def _requeue(job_id: str) -> None:
    """Requeue the driver's job; while the controller is down, try again until Slurm ends the job."""
    failed = False
    while run_command("scontrol", "requeue", job_id, timeout=_SCONTROL_TIMEOUT) is None:
        if not failed:
            log.warning("scontrol requeue %s failed; trying again until the time limit", job_id)
        failed = True
        if signal.sigtimedwait([signal.SIGTERM], _REQUEUE_PAUSE) is not None:
            log.warning("Slurm will not start job %s again; resume the run", job_id)
            return
    log.info("time limit or preemption: Slurm job %s is requeued", job_id)
