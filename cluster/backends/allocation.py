"""Backend that runs jobs as srun steps of the Slurm allocation around the driver (salloc, sbatch), without queueing again.

A job is an srun process of the driver's host, as a local job is a process. It survives the driver, not the allocation.
"""

import logging
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from submitit.core.utils import DelayedSubmission, JobPaths

from cluster.backends.base import Task, log_file, split_evenly
from cluster.backends.command import run_command
from cluster.backends.local import LocalBackend, find_processes, process_of
from cluster.backends.sbatch import environment_outside_job
from cluster.backends.slurm import gpu_options, python_command
from cluster.import_path import check_import_path
from cluster.processes import start_time
from cluster.retry import classify_loss
from cluster.step import run_step
from cluster.supervisor import kill_tree
from montessori_core.config import Resources, Slurm
from montessori_core.errors import UserError

log = logging.getLogger(__name__)

_STEP_END_TIMEOUT = 40.0  # seconds; longer than Slurm's usual KillWait
_TAIL = 16384  # bytes of a log in which Slurm's messages about the end of a step are
_PORTIONS = 2
"""A job takes at most one of this many portions of its even share of the shards: GPUs finish at about the same time."""


class AllocationBackend(LocalBackend):
    """Jobs as steps of an allocation. A job id has the id and start time of the srun process."""

    steps = True

    def __init__(self, slurm: Slurm, resources: Resources, python: str | None) -> None:
        check_import_path(slurm.commands)
        self._slurm, self._resources = slurm, resources
        self._python_command, self._container_options = python_command(slurm, python)
        self._allocation = os.environ.get("SLURM_JOB_ID")
        self._job_ids = set()
        self._fit: int | None = None
        self._nodes: frozenset[str] = frozenset()
        self._folders: dict[str, Path] = {}
        self._steps: dict[str, subprocess.Popen[bytes]] = {}

    def check(self, stage: str) -> None:
        """Check that a job of a stage fits into the allocation.

        Raises:
            UserError: there is no allocation around this process, or it is too small.
        """
        if self._allocation is None:
            raise UserError(
                "cluster.profile is allocation, but SLURM_JOB_ID is not set: this is not inside an allocation; start inside "
                "salloc or sbatch, or set profile: slurm, which submits jobs of its own"
            )
        job = run_command("scontrol", "--oneliner", "show", "job", self._allocation) or ""
        self._fit, self._nodes = self._jobs_that_fit(job), _nodes(job)
        if self._fit == 0:
            needed, setting = self._resources, ".".join(filter(None, ("cluster.resources", stage)))
            raise UserError(
                f"a job{f' of {stage}' if stage else ''} needs {needed.nodes} node(s) with {needed.gpus_per_node} GPUs and "
                f"{needed.processes_per_node * needed.cpus_per_process} cores each, but the allocation (Slurm job "
                f"{self._allocation}) has less; lower {setting}, or ask for a larger allocation"
            )

    def prepare(self) -> None:
        pass  # jobs import on their nodes

    def plan_jobs(
        self, shards: Sequence[int], free: int, avoid: frozenset[str], slow_node: str | None = None
    ) -> list[Task]:
        """Cut shards into a job for each place that is free; the other shards wait, for the places that become free."""
        places = self._resources.parallel_jobs
        if self._fit is not None:
            free, places = free - max(0, places - self._fit), min(places, self._fit)
        return self.hand_out(shards, free, places)

    def hand_out(self, shards: Sequence[int], free: int, places: int) -> list[Task]:
        """Cut shards into at most `free` tasks, when `places` jobs may run in all; the other shards wait."""
        if free <= 0:
            return []
        share = -(-len(shards) // (_PORTIONS * places))
        return split_evenly(shards[: free * min(share, self._resources.shards_per_job)], free)

    def submit(
        self, name: str, folder: Path, tasks: Sequence[Task], stage_folder: Path, at_once: int, avoid: frozenset[str]
    ) -> list[str]:
        folder.mkdir(exist_ok=True)
        # Of other nodes srun knows nothing: an earlier driver had them, in another allocation.
        avoid = avoid & self._nodes if self.can_run_outside(avoid) else frozenset()
        return [self.start_step(self._allocation or "", name, folder, task, stage_folder, avoid) for task in tasks]

    def can_run_outside(self, nodes: frozenset[str]) -> bool:
        return not self._nodes or len(self._nodes - nodes) >= self._resources.nodes

    def keep_away(self, ids: Sequence[str], nodes: frozenset[str]) -> None:
        pass  # steps that wait for others to end are few

    def start_step(
        self,
        allocation: str,
        name: str,
        folder: Path,
        task: Task,
        stage_folder: Path,
        avoid: frozenset[str] = frozenset(),
    ) -> str:
        """Start a job as a step of a Slurm job that is running, outside the nodes `avoid`; return the job's id."""
        resources = self._resources
        options = [
            f"--jobid={allocation}",
            f"--job-name={name}",
            f"--nodes={resources.nodes}",
            f"--ntasks={resources.nodes * resources.processes_per_node}",
            f"--ntasks-per-node={resources.processes_per_node}",
            f"--cpus-per-task={resources.cpus_per_process}",
            *[
                f"--{option}={gpus}"
                for option, gpus in gpu_options(self._slurm, resources).items() or [("gres", "none")]
            ],
            f"--mem={resources.memory_gb}GB" if resources.memory_gb else "--mem=0",  # 0: shared by the steps
            f"--time={resources.time_limit_minutes}",
            *([f"--exclude={','.join(sorted(avoid))}"] if avoid else []),
            *("--exact", "--kill-on-bad-exit=1", "--mpi=none", "--input=none", "--quiet"),
            *self._container_options,
            *self._slurm.srun,
        ]
        step = f"{self._python_command} -P -u -m cluster.step {shlex.quote(str(folder))} {60 * resources.time_limit_minutes}"
        # The shell's process id becomes srun's, which is the job's id.
        job = f'{shlex.quote(str(folder))}/"$$"'
        logs = f"--output={job}_%t_log.out --error={job}_%t_log.err"
        srun = f'exec srun {shlex.join(options)} {logs} {step} "$$" 2>{job}_srun.err'
        script = "\n".join([*self._slurm.commands, srun])
        process = subprocess.Popen(
            ["bash", "-c", script],
            env=environment_outside_job(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        job_id = f"{process.pid}:{start_time(process.pid)}"
        submission = DelayedSubmission(
            run_step, str(stage_folder), task, resources.cpus_per_process, resources.gpus_per_node
        )
        submission.set_timeout(resources.time_limit_minutes, 0)
        submission.dump(JobPaths(folder, str(process.pid)).submitted_pickle)
        self._job_ids.add(job_id)
        self._folders[job_id] = folder
        self._steps[job_id] = process
        return job_id

    def alive(self, name: str, ids: Sequence[str]) -> set[str] | None:
        for job_id in set(ids) - self._folders.keys():
            with suppress(psutil.Error):  # it has just ended
                if (process := process_of(job_id)) is not None:
                    self.note_command(job_id, process.cmdline())
        return super().alive(name, ids)

    def note_command(self, job_id: str, command: list[str]) -> None:
        """Note what the srun command of a step tells, which an earlier driver has started."""
        if "cluster.step" in command:
            self._folders[job_id] = Path(command[command.index("cluster.step") + 1])

    def running(self, name: str, ids: Sequence[str]) -> set[str]:
        running = super().running(name, ids)
        for job_id in self._steps.keys() & set(ids) - running:
            self._steps[job_id].poll()  # keeps the exit status
        return running

    def find(self, name: str, folder: Path) -> list[str]:
        return find_processes({"cluster.step"}, folder)

    def cancel(self, ids: Sequence[str]) -> None:
        # srun ends its step after SIGTERM; a step whose srun is killed continues.
        processes = [process for job_id in ids if (process := process_of(job_id)) is not None]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(processes, _STEP_END_TIMEOUT)
        for process in alive:
            log.warning("srun process %d does not end; killing it", process.pid)
            kill_tree(process)

    def exit_reason(self, job_id: str) -> str:
        messages = self._messages_of(job_id)
        # The last message may be about a process that Slurm killed for the cause in an earlier one.
        for message in messages:
            if classify_loss(message) != "lost":
                return message  # srun may exit with code 0 after the failure of a node
        step = self._steps.get(job_id)
        if step is not None and step.returncode == 0:
            return "COMPLETED"  # its results may be visible later, as those of a Slurm job
        if step is None and not messages and job_id in self._folders:  # an earlier driver's, that this one saw alive
            return "the step ended without a result, and without a message of Slurm (COMPLETED, or killed)"
        return messages[-1] if messages else super().exit_reason(job_id)

    def _messages_of(self, job_id: str) -> list[str]:
        """Return Slurm's messages about a step: slurmstepd's, in the log of the first process, then srun's."""
        folder = self._folders.get(job_id)
        if folder is None:
            return []
        files = (log_file(folder, job_id), folder / f"{job_id.partition(':')[0]}_srun.err")
        return [line for file in files for line in _last_lines(file) if line.startswith(("slurmstepd", "srun:"))]

    def _jobs_that_fit(self, answer: str) -> int | None:
        """Return how many jobs fit into the allocation by its cores and GPUs; None if its size is unknown.

        Args:
            answer: of scontrol show job.
        """
        sizes = {name: int(count) for name, count in re.findall(r"\b(Num(?:Nodes|CPUs|Tasks))=(\d+)", answer)}
        if not {"NumNodes", "NumCPUs"} <= sizes.keys():
            return None
        needed, nodes = self._resources, sizes["NumNodes"]
        fit = places_in(sizes["NumCPUs"], nodes, needed.nodes, needed.processes_per_node * needed.cpus_per_process)
        if needed.gpus_per_node:
            fit = min(fit, places_in(_gpus(answer, sizes), nodes, needed.nodes, needed.gpus_per_node))
        return fit


def _last_lines(file: Path) -> list[str]:
    """Return the lines in the last bytes of a log; none if it does not exist."""
    with suppress(FileNotFoundError), file.open("rb") as log:
        log.seek(max(0, file.stat().st_size - _TAIL))
        return log.read().decode(errors="replace").splitlines()
    return []


def places_in(total: int, nodes: int, nodes_per_job: int, per_node: int) -> int:
    """Return how many jobs that need `per_node` on each of their nodes share `total` cores or GPUs of an allocation."""
    if nodes < nodes_per_job or -(-total // nodes) < per_node:
        return 0
    if total % nodes == 0:  # the nodes are alike, and a job on one cannot use what others have left
        total = nodes * per_node * (total // nodes // per_node)
    return total // (nodes_per_job * per_node)


def _nodes(answer: str) -> frozenset[str]:
    """Return the nodes of an allocation from the answer of scontrol show job; none if they are unknown."""
    match = re.search(r" NodeList=(\S+)", answer)
    return frozenset((run_command("scontrol", "show", "hostnames", match[1]) or "").split() if match else ())


def _gpus(answer: str, sizes: Mapping[str, int]) -> int:
    """Return the number of GPUs of an allocation.

    Args:
        answer: of scontrol show job. TRES has GPUs only if accounting counts them.
        sizes: number of nodes and tasks.
    """
    copies = {"Job": 1, "Node": sizes["NumNodes"], "Task": sizes.get("NumTasks", 1)}
    for per, number in copies.items():
        if match := re.search(rf"\bTresPer{per}=\S*?gpu(?::[^:=,\s]+)?[:=](\d+)(?![\w.:-])", answer):
            return number * int(match[1])
    match = re.search(r"\b(?:Alloc|Req)?TRES=\S*?gres/gpu=(\d+)", answer)
    return int(match[1]) if match else 0
