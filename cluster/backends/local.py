"""Backend that runs jobs as processes of this machine."""

import itertools
import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import submitit

from cluster.backends.base import Task, split_evenly
from cluster.backends.command import run_command
from cluster.import_path import check_import_path
from cluster.processes import seconds_since, start_time
from cluster.supervisor import kill_tree
from cluster.warm_start import Job, warm_process
from cluster.worker import run_task
from montessori_core.config import Resources
from montessori_core.environment import set_process_defaults
from montessori_core.errors import UserError

log = logging.getLogger(__name__)
_KILL_TIMEOUT = 10.0  # seconds; a process that waits for a disk ends late


class LocalBackend:
    """Jobs as processes of this machine. A job id has the process id and its start time, so it is never reused.

    Attributes:
        forks_jobs: whether jobs are forked from this driver's warm process (`cluster.warm_start`). Not for jobs in
            another environment, nor on macOS, whose libraries do not support forking.
    """

    polls_until_lost = 1
    host: str | None = platform.node()
    steps = False

    def __init__(self, resources: Resources, python: str | None) -> None:
        check_import_path()
        set_process_defaults()  # before submitit starts its own processes by python -m
        self._resources, self._python = resources, python
        self.forks_jobs = python is None and sys.platform == "linux"
        self._job_ids: set[str] = set()
        self._gpus = gpus_of_this_machine() if resources.gpus_per_node else []
        if len(self._gpus) < resources.gpus_per_node:
            raise UserError(
                f"a job needs {resources.gpus_per_node} GPUs, but this machine has {len(self._gpus)} "
                "(nvidia-smi, CUDA_VISIBLE_DEVICES); lower gpus_per_node in cluster.resources"
            )

    def prepare(self) -> None:
        """Start the warm process, which imports libraries while the driver prepares jobs."""
        if self.forks_jobs:
            warm_process()

    def plan_jobs(
        self, shards: Sequence[int], free: int, avoid: frozenset[str], slow_node: str | None = None
    ) -> list[Task]:
        """Distribute shards evenly over the jobs that may still start; a job computes its shards in turn."""
        if self._resources.gpus_per_node:
            free = min(free, len(self._free_gpus()) // self._resources.gpus_per_node)
        return split_evenly(shards, free)

    def submit(
        self, name: str, folder: Path, tasks: Sequence[Task], stage_folder: Path, at_once: int, avoid: frozenset[str]
    ) -> list[str]:
        free = iter(self._free_gpus())
        ids = []
        for task in tasks:
            gpus = tuple(itertools.islice(free, self._resources.gpus_per_node))
            job_id = self._fork_job(folder, task, stage_folder, gpus) if self.forks_jobs else None
            ids.append(job_id or self._start_job(folder, task, stage_folder, gpus))
        self._job_ids.update(ids)
        return ids

    def _fork_job(self, folder: Path, task: Task, stage_folder: Path, gpus: tuple[int, ...]) -> str | None:
        """Fork a job from the warm process; None if the warm process does not answer."""
        folder.mkdir(exist_ok=True)
        job = Job(
            folder=str(folder),
            stage_folder=str(stage_folder),
            task=task,
            threads=self._resources.cpus_per_process,
            gpus=len(gpus),
            ranks=self._resources.processes_per_node,
            seconds=60.0 * self._resources.time_limit_minutes,
            environment=os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))},
        )
        try:
            return warm_process().start(job)
        except OSError as error:
            log.warning("starting a job without the warm process: %s", error)
            return None

    def _start_job(self, folder: Path, task: Task, stage_folder: Path, gpus: tuple[int, ...]) -> str:
        """Start a job in a new interpreter."""
        resources = self._resources
        executor = submitit.LocalExecutor(folder=folder, python=f"{shlex.quote(self._python or sys.executable)} -P")
        executor.update_parameters(
            timeout_min=resources.time_limit_minutes,
            tasks_per_node=resources.processes_per_node,
            gpus_per_node=resources.gpus_per_node,
            visible_gpus=gpus,
        )
        job = executor.submit(run_task, str(stage_folder), task, resources.cpus_per_process, resources.gpus_per_node)
        try:
            started = start_time(int(job.job_id))
        except psutil.NoSuchProcess:
            started = 0.0
        return f"{job.job_id}:{started}"

    def _free_gpus(self) -> list[int]:
        """Return the GPUs that no running job uses, including jobs of an earlier driver."""
        used: set[str] = set()
        for job_id in self._job_ids:
            process = process_of(job_id)
            if process is not None:
                with suppress(psutil.Error):  # it has just ended
                    used.update(process.environ().get("CUDA_VISIBLE_DEVICES", "").split(","))
        return [gpu for gpu in self._gpus if str(gpu) not in used]

    def can_run_outside(self, nodes: frozenset[str]) -> bool:
        return False

    def keep_away(self, ids: Sequence[str], nodes: frozenset[str]) -> None:
        pass  # no job waits

    def set_parallelism(self, ids: Sequence[str], at_once: int) -> None:
        pass  # all jobs of a submission run at once

    def find(self, name: str, folder: Path) -> list[str]:
        return find_processes({"cluster.supervisor", "submitit.local._local"}, folder)

    def alive(self, name: str, ids: Sequence[str]) -> set[str] | None:
        self._job_ids.update(ids)
        return self.running(name, ids)

    def running(self, name: str, ids: Sequence[str]) -> set[str]:
        return {job_id for job_id in ids if process_of(job_id) is not None}

    def cancel(self, ids: Sequence[str]) -> None:
        # Kill: submitit's workers ignore SIGTERM, and commits are atomic.
        processes = [process for job_id in ids if (process := process_of(job_id)) is not None]
        killed = [member for process in processes for member in kill_tree(process)]
        deadline = time.monotonic() + _KILL_TIMEOUT
        while any(map(_is_running, killed)) and time.monotonic() < deadline:
            time.sleep(0.01)

    def exit_reason(self, job_id: str) -> str:
        minutes = self._resources.time_limit_minutes
        if seconds_since(float(job_id.partition(":")[2])) >= 60 * minutes:
            return f"TIMEOUT: the process was killed after {minutes} minutes"
        return "the process ended without a result (killed, or out of memory)"

    def cancel_lost(self, job_id: str, kind: str) -> None:
        pass


def _is_running(process: psutil.Process) -> bool:
    """Whether a process is running; a zombie, which init may take seconds to reap, is not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def find_processes(modules: set[str], folder: Path) -> list[str]:
    """Return the ids of the jobs of this host whose command has one of these modules and the folder of a submission."""
    ids = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if modules & set(command) and str(folder) in command:
            with suppress(psutil.NoSuchProcess):  # it has just ended
                ids.append(f"{process.pid}:{start_time(process.pid)}")
    return ids


def process_of(job_id: str) -> psutil.Process | None:
    """Return the process of a job; None if it has ended."""
    pid, _, started = job_id.partition(":")
    try:
        process = psutil.Process(int(pid))
        same = abs(start_time(int(pid)) - float(started)) < 0.05
        return process if same and _is_running(process) else None
    except psutil.NoSuchProcess:
        return None


def gpus_of_this_machine() -> list[int]:
    """Return the indices of the GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(range((run_command("nvidia-smi", "--list-gpus") or "").count("GPU ")))
    numbers = [number.strip() for number in visible.split(",") if number.strip()]
    if not all(number.isdecimal() for number in numbers):
        raise UserError(f"CUDA_VISIBLE_DEVICES is {visible!r}; profile: local needs GPU numbers, e.g. 0,1")
    return [int(number) for number in numbers]
