"""Two ways to run jobs behind one interface: processes of this machine, and Slurm. Both submit through submitit."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import psutil

from cluster.worker import run_task
from montessori_core.config import Cluster, Resources

# Slurm cuts the list of a pending array's tasks unless told otherwise, and submitit cannot parse the rest.
os.environ.setdefault("SLURM_BITSTR_LEN", "0")

import submitit

Task = list[int]  # shards that one job works through


class Backend(Protocol):
    """Where jobs run. Job ids are texts that any later process can use."""

    polls_until_lost: int
    """Looks in a row at which a job must be missing before it counts as lost."""

    def group(self, shards: Sequence[int], running: int) -> list[Task]:
        """Cut shards into the tasks to submit now, given how many tasks are running; the rest waits."""
        ...

    def submit(self, name: str, folder: Path, tasks: Sequence[Task], stage_folder: Path) -> list[str]:
        """Start one job a task under a name that no other submission has; return their ids."""
        ...

    def find(self, name: str, folder: Path) -> list[str]:
        """Ids of jobs submitted under `name`, even if the submitter died before it could note them."""
        ...

    def alive(self, name: str, ids: Sequence[str]) -> set[str] | None:
        """Which jobs of a submission are running or will run again; None if nobody knows at present."""
        ...

    def cancel(self, ids: Sequence[str]) -> None:
        """End jobs, running or not."""
        ...

    def reason(self, job_id: str) -> str:
        """What is known of why a job ended without a result."""
        ...


def open_backend(cluster: Cluster, resources: Resources, python: str | None) -> Backend:
    """The backend of the configured profile."""
    if cluster.profile == "slurm":
        return SlurmBackend(cluster, resources, python or cluster.slurm.python)
    return LocalBackend(resources, python)


def log_files(folder: Path, job_id: str) -> list[Path]:
    """Standard error of a job's processes, rank 0 first."""
    return sorted(folder.glob(f"{job_id.split(':')[0]}_*_log.err"))


class LocalBackend:
    """Jobs as processes of this machine. An id is a process id and its start time, so that it is never mistaken."""

    polls_until_lost = 1

    def __init__(self, resources: Resources, python: str | None) -> None:
        self._resources, self._python = resources, python

    def group(self, shards: Sequence[int], running: int) -> list[Task]:
        """Deal shards evenly to the jobs that may still start; resident workers go from shard to shard."""
        free = min(self._resources.parallel_jobs - running, len(shards))
        return [list(shards[start::free]) for start in range(free)] if free > 0 else []

    def submit(self, name: str, folder: Path, tasks: Sequence[Task], stage_folder: Path) -> list[str]:
        resources = self._resources
        python = shlex.quote(self._python) if self._python else None
        executor = submitit.LocalExecutor(folder=folder, python=python)
        ids = []
        for slot, task in enumerate(tasks):
            executor.update_parameters(
                timeout_min=resources.time_limit_minutes,
                tasks_per_node=resources.processes_per_node,
                gpus_per_node=resources.gpus_per_node,
                visible_gpus=tuple(range(slot * resources.gpus_per_node, (slot + 1) * resources.gpus_per_node)),
            )
            job = executor.submit(run_task, str(stage_folder), task, resources.cpus_per_process)
            try:
                started = psutil.Process(int(job.job_id)).create_time()
            except psutil.NoSuchProcess:
                started = 0.0
            ids.append(f"{job.job_id}:{started}")
        return ids

    def find(self, name: str, folder: Path) -> list[str]:
        found = []
        for process in psutil.process_iter(["cmdline", "create_time"]):
            command = process.info["cmdline"] or []
            if "submitit.local._local" in command and str(folder) in command:
                found.append(f"{process.pid}:{process.info['create_time']}")
        return found

    def alive(self, name: str, ids: Sequence[str]) -> set[str] | None:
        return {job_id for job_id in ids if _process(job_id) is not None}

    def cancel(self, ids: Sequence[str]) -> None:
        # submitit's workers ignore SIGTERM, and commits are atomic: the processes are simply killed.
        for job_id in ids:
            process = _process(job_id)
            if process is None:
                continue
            family = [*process.children(recursive=True), process]
            for member in family:
                try:
                    member.kill()
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(family, timeout=10)

    def reason(self, job_id: str) -> str:
        return "the process ended without a result (killed, or out of memory)"


def _process(job_id: str) -> psutil.Process | None:
    pid, _, started = job_id.partition(":")
    try:
        process = psutil.Process(int(pid))
        same = abs(process.create_time() - float(started)) < 0.05
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


class SlurmBackend:
    """Jobs as arrays of Slurm, submitted through submitit."""

    polls_until_lost = 3

    def __init__(self, cluster: Cluster, resources: Resources, python: str | None) -> None:
        self._slurm, self._resources, self._python = cluster.slurm, resources, python

    def group(self, shards: Sequence[int], running: int) -> list[Task]:
        """Cut shards into tasks for one array; the scheduler throttles, and one array waits at a time."""
        if running:
            return []
        size = self._resources.shards_per_job
        tasks = [list(shards[start : start + size]) for start in range(0, len(shards), size)]
        return tasks[: self._slurm.max_array_size]

    def submit(self, name: str, folder: Path, tasks: Sequence[Task], stage_folder: Path) -> list[str]:
        resources, slurm = self._resources, self._slurm
        executor = submitit.SlurmExecutor(folder=folder, python=self._python or shlex.quote(sys.executable))
        options: dict[str, Any] = {
            "job_name": name,
            "time": resources.time_limit_minutes,
            "nodes": resources.nodes,
            "ntasks_per_node": resources.processes_per_node,
            "cpus_per_task": resources.cpus_per_process,
            "array_parallelism": resources.parallel_jobs,
            "setup": list(slurm.setup) or None,
            "additional_parameters": dict(slurm.extra),
        }
        optional = {
            "gpus_per_node": resources.gpus_per_node or None,
            "mem": f"{resources.memory_gb}GB" if resources.memory_gb else None,
            "partition": slurm.partition,
            "account": slurm.account,
            "qos": slurm.qos,
            "constraint": slurm.constraint,
            "exclude": slurm.exclude,
        }
        executor.update_parameters(**options, **{key: value for key, value in optional.items() if value is not None})
        arguments = [str(stage_folder)] * len(tasks), list(tasks), [resources.cpus_per_process] * len(tasks)
        return [job.job_id for job in executor.map_array(run_task, *arguments)]

    def find(self, name: str, folder: Path) -> list[str]:
        return sorted({job_id.split("_")[0] for job_id in self._queued(name) or []})

    def alive(self, name: str, ids: Sequence[str]) -> set[str] | None:
        queued = self._queued(name)
        return None if queued is None else queued & set(ids)

    def cancel(self, ids: Sequence[str]) -> None:
        arrays = sorted({job_id.split("_")[0] for job_id in ids})
        if arrays:
            subprocess.run(["scancel", *arrays], check=False, timeout=60)

    def reason(self, job_id: str) -> str:
        try:
            answer = subprocess.run(
                ["sacct", "-n", "-X", "-P", "-j", job_id, "-o", "State,ExitCode,NodeList"],
                capture_output=True,
                text=True,
                timeout=30,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return "the job is gone from the queue without a result (no accounting to ask)"
        state, _, rest = answer.stdout.strip().partition("|")
        return f"Slurm says {state or 'nothing'} {rest}".strip()

    def _queued(self, name: str) -> set[str] | None:
        try:
            answer = subprocess.run(
                ["squeue", "-h", "-r", "-n", name, "-o", "%i"], capture_output=True, text=True, timeout=60, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return set(answer.stdout.split())
