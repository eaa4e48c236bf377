"""The driver's lock on a run folder: take it, find its holder, end its holder, submit a holder as a job.

The lock's file says who drives the run: a process of a host, or a Slurm job (`cluster.driver_job`). A job drives the run from
its submission to its end; while it waits in the queue, no process holds the lock.
"""

import fcntl
import logging
import os
import signal
import socket
import stat
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil

from cluster.backends.base import JobsRemain, SchedulerUnavailable
from cluster.backends.command import run_command
from cluster.backends.held import end_held_jobs, end_orphaned_steps
from cluster.backends.sbatch import DRIVER_JOB
from cluster.driver_job import DriverStopped, queued_job, submit_job
from cluster.records import Record, read_record
from montessori_core import layout
from montessori_core.config import Slurm
from montessori_core.errors import UserError
from montessori_core.files import is_copy, owner_of
from montessori_core.locks import take_lock

log = logging.getLogger(__name__)

_END_TIMEOUT = 240.0  # seconds; Slurm jobs may take two minutes to end
_HANDOVER_TIMEOUT = 300.0  # seconds; a file server keeps the lock of a crashed node for a while
_SIMULTANEOUS = 2.0  # seconds
_CLOCK_SKEW = 60.0  # seconds; between this host and the file server
_driven: list[Path] = []  # folders whose lock this process holds, the outermost first


class Driver(Record):
    """The driver of a run: a process of a host, a Slurm job, or a process in a Slurm job.

    Attributes:
        process, host: of the process; None for a job that is not running.
        job: id of the Slurm job; None until sbatch has returned it.
        job_name: unique name of the Slurm job.
        state: state of the job in the queue, if no process holds the lock; not recorded.
        folder: resolved folder of the run that it drives; a copy of the run has no driver.
    """

    process: int | None = None
    host: str | None = None
    job: str | None = None
    job_name: str | None = None
    state: str | None = None
    folder: str | None = None

    def __str__(self) -> str:
        process = None if self.process is None else f"process {self.process} on {self.host}"
        job = None if self.job_name is None else f"Slurm job {self.job or self.job_name}"
        return ", ".join(filter(None, (job, self.state or process))) or "an unknown process"

    @property
    def is_this_job(self) -> bool:
        """Whether this process runs in the driver's job."""
        return self.job_name is not None and self.job_name == os.environ.get(DRIVER_JOB)


@contextmanager
def only_driver(folder: Path) -> Iterator[None]:
    """Hold the lock of a run: two drivers would submit every job twice.

    Raises:
        UserError: another driver holds it.
    """
    with _lock(folder, _this_process()) as (lock, _):
        try:
            with _driving(folder):
                yield
        except DriverStopped:
            raise  # its job may start again
        except BaseException:
            lock.truncate(0)
            raise
        lock.truncate(0)


@contextmanager
def no_driver(folder: Path) -> Iterator[None]:
    """Hold the lock of a run that has no driver while a command changes its files.

    Raises:
        UserError: a driver or another command holds it.
    """
    with _lock(folder, _this_process()) as (lock, before):
        try:
            yield
        finally:
            if before is None or not before.is_this_job:  # a driver's job goes on to drive the run
                lock.truncate(0)


@contextmanager
def _driving(folder: Path) -> Iterator[None]:
    """End steps that an earlier driver left in held jobs, and held jobs when this driver ends; not when it is stopped."""
    end_orphaned_steps(folder)
    _driven.append(folder)
    stopped, interrupted = False, False
    try:
        yield
    except DriverStopped:
        stopped = True
        raise
    except BaseException as error:
        interrupted = not isinstance(error, Exception)
        raise
    finally:
        _driven.remove(folder)
        try:
            if not stopped:
                end_held_jobs(folder)
        except JobsRemain as error:
            if interrupted:
                raise  # instead of saying that all jobs were cancelled
            log.warning("%s", error)


def driven_folder() -> Path | None:
    """Return the folder that this process drives: of a study, not of one of its runs; None if it holds no lock."""
    return _driven[0] if _driven else None


def submit_driver(folder: Path, command: Sequence[str], variables: Mapping[str, str], slurm: Slurm) -> Driver:
    """Submit the driver of a run as a Slurm job.

    Args:
        folder: run folder.
        command, variables, slurm: see `cluster.driver_job.submit_job`.

    Raises:
        UserError: the run has a driver, or sbatch refuses the job.
        SchedulerUnavailable: sbatch does not answer. If it has accepted the job, the job is the run's driver.
    """
    name = f"montessori-driver-{uuid.uuid4().hex[:12]}"
    with _lock(folder, Driver(job_name=name)) as (lock, _):  # before sbatch: who comes later finds the job by its name
        driver = Driver(job=submit_job(folder, name, command, variables, slurm), job_name=name)
        _write(lock, driver)
        return driver


def _this_process() -> Driver:
    name = os.environ.get(DRIVER_JOB)
    job = os.environ.get("SLURM_JOB_ID") if name is not None else None
    return Driver(process=os.getpid(), host=socket.gethostname(), job=job, job_name=name)


def _write(lock: IO[str], driver: Driver) -> str:
    """Write the driver into a lock's file; return the content."""
    lock.truncate(0)
    driven = driver.model_copy(update={"folder": str(Path(lock.name).resolve().parent)})
    content = driven.model_dump_json(exclude_none=True)
    lock.write(content)
    lock.flush()
    return content


@contextmanager
def _lock(folder: Path, holder: Driver) -> Iterator[tuple[IO[str], Driver | None]]:
    """Hold the lock of a run that has no other driver; yield its file, which names the holder now, and whom before."""
    path = folder / layout.DRIVER_LOCK
    deadline = time.monotonic() + _HANDOVER_TIMEOUT
    refuse_other_owner(folder)
    with path.open("a+") as lock:
        while True:
            try:
                locks = take_lock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                _refuse_second_driver(folder)
            # A command reads the lock, this job is still being submitted, or an earlier start of it ran on a crashed node.
            if time.monotonic() > deadline:
                raise UserError(f"{folder}: another process holds {path.name}; resume the run when it has ended")
            time.sleep(0.2)
        if not locks:
            log.warning(
                "%s: this file system has no locks, so that a driver is known by this file alone. Remove the file if a "
                "driver on another host died",
                path,
            )
        driver = _queued_driver(path) if locks else driver_of(folder)
        if driver is not None and not driver.is_this_job:
            raise UserError(_refusal(folder, driver))
        before = read_record(path, Driver)
        written = _write(lock, holder)
        if not locks:
            _refuse_simultaneous_driver(path, written)
            _write(lock, holder)  # alone: two that write at the same time append to each other
        yield lock, before


def _refuse_simultaneous_driver(path: Path, written: str) -> None:
    """Raise a UserError if another process has started at the same time, without a lock: the last one to write continues."""
    time.sleep(_SIMULTANEOUS)
    if not path.read_text().endswith(written):
        raise UserError(_refusal(path.parent, read_record(path, Driver) or Driver()))


def _refuse_second_driver(folder: Path) -> None:
    """Raise a UserError if the run has a driver; the Slurm job of this process is not a second one."""
    driver = driver_of(folder)
    if driver is not None and not driver.is_this_job:
        raise UserError(_refusal(folder, driver))


def refuse_other_owner(folder: Path) -> None:
    """Raise a UserError if another user made the run.

    Jobs load pickles from its folder. In a folder that a group may write, a driver would run what another user wrote there.
    """
    config = folder / layout.CONFIG
    try:
        # Only the owner may change the mode, however a file server maps user names.
        config.chmod(stat.S_IMODE(config.stat().st_mode))
    except FileNotFoundError:
        return
    except PermissionError as error:
        raise UserError(
            f"{folder}: this run belongs to {owner_of(config)}, who alone may continue or cancel it. Copy the folder (cp -r) "
            "and resume the copy, which keeps finished work; or choose another --name or --run-root"
        ) from error


def _refusal(folder: Path, driver: Driver) -> str:
    return f"{folder}: this run already has a driver ({driver}); wait for it, or end it with montessori cancel"


def driver_of(folder: Path) -> Driver | None:
    """Return a run's driver, a process that holds the lock or a job in the queue; None if there is none.

    Raises:
        SchedulerUnavailable: the last driver was a job, and Slurm does not say whether it has ended.
        OSError: a file server or mount failed, such as with a stale handle: there may be a driver.
    """
    path = folder / layout.DRIVER_LOCK
    try:
        lock = path.open()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    with lock:
        try:
            locks = take_lock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return read_record(path, Driver) or Driver()
    return _queued_driver(path) or (None if locks else _recorded_process(path))


def _recorded_process(path: Path) -> Driver | None:
    """Return the process that a lock's file names, unless it has ended; nobody knows that of one on another host."""
    driver = read_record(path, Driver)
    if driver is None or driver.process is None or driver.job_name is not None or is_copy(path.parent, driver.folder):
        return None
    if driver.host != socket.gethostname():
        return driver
    with suppress(psutil.Error):
        if psutil.Process(driver.process).create_time() < path.stat().st_mtime + _CLOCK_SKEW:  # else its id was reused
            return driver
    return None


def _queued_driver(path: Path) -> Driver | None:
    """Return the driver in a lock's file if it is a job in the queue."""
    driver = read_record(path, Driver)
    if driver is None or driver.job_name is None or driver.is_this_job or is_copy(path.parent, driver.folder):
        return None
    try:
        job = queued_job(driver.job_name)
    except SchedulerUnavailable as error:
        raise SchedulerUnavailable(
            f"{path.parent}: its last driver is Slurm job {driver.job or driver.job_name}: {error}. If it has, remove {path}"
        ) from error
    return None if job is None else driver.model_copy(update={"job": job.id, "state": str(job)})


def end_driver(folder: Path) -> bool:
    """Interrupt the driver of a run and wait until it has cancelled its jobs; return whether there was a driver.

    Raises:
        UserError: its process runs on another host outside of a Slurm job, or it does not exit in time.
        SchedulerUnavailable: Slurm does not say whether its job has ended.
    """
    driver = driver_of(folder)
    if driver is None:
        return False
    if driver.job_name is None and driver.host != socket.gethostname():
        raise UserError(f"{folder}: the driver is {driver}; run this command there, or end that process first")
    deadline = time.monotonic() + _END_TIMEOUT
    interrupted = False
    while (current := driver_of(folder)) is not None:
        if not interrupted:
            interrupted = _interrupt(current)
        if time.monotonic() > deadline:
            remedy = f"scancel {current.job}" if current.job else f"kill {current.process}"
            raise UserError(f"{folder}: {current} does not exit; end it ({remedy}), then run this command again")
        time.sleep(0.2 if driver.job_name is None else 1.0)
    return True


def _interrupt(driver: Driver) -> bool:
    """Cancel a driver's job that waits; interrupt a driver that runs, and return whether this was possible."""
    if driver.job_name is None:
        if driver.process is not None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(driver.process, signal.SIGINT)
        return True
    job = queued_job(driver.job_name)
    if job is not None and job.state == "PENDING":
        run_command("scancel", "--quiet", "--state=PENDING", job.id)
    elif job is not None and job.state == "RUNNING":  # to the driver alone, which then cancels its jobs
        return run_command("scancel", "--quiet", "--batch", "--signal=INT", job.id) is not None
    return False
