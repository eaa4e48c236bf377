"""Backend that runs jobs as Slurm job arrays."""

import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from cluster.backends.base import JobsRemain, SchedulerUnavailable, Task, split_for_array
from cluster.backends.command import run_command
from cluster.backends.sbatch import CONTROLLER_DOWN, SBATCH_PATIENCE, SbatchExecutor, check_script
from cluster.import_path import check_import_path
from cluster.supervisor import kill_tree
from cluster.worker import run_task
from montessori_core.config import Resources, Slurm
from montessori_core.errors import UserError

log = logging.getLogger(__name__)

# Reasons of jobs that Slurm holds, in several versions of it. `job requeued in held state` is not one: its owner holds it.
_NEVER_LAUNCHED = re.compile("JobHoldMaxRequeue|.*[ _]requeued[ _]held")
_TOO_MANY_JOBS = ("violates accounting/QOS policy", "MaxSubmitJob", "Resource temporarily unavailable")
_DEFAULT_ARRAY_LIMIT = 1001  # Slurm's default of MaxArraySize
_CANCEL_TIMEOUT = 120.0  # seconds; Slurm's KillWait is 30 by default
_SCANCEL_PAUSE = 10.0  # seconds until scancel is called again: a controller that crashes forgets recent calls
_CONTROLLER_TIMEOUT = 300.0  # seconds for a controller to come back


@contextmanager
def _limit_sbatch(folder: Path) -> Iterator[None]:
    """Kill sbatch when it takes too long: some controllers accept the connection and never answer.

    Args:
        folder: folder of the submission, which identifies the sbatch process by its command line.
    """

    def kill_sbatch() -> None:
        for child in psutil.Process().children():
            with suppress(psutil.Error):
                if any(str(folder) in argument for argument in child.cmdline()):
                    kill_tree(child)

    timer = threading.Timer(SBATCH_PATIENCE, kill_sbatch)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _Restartable(submitit.helpers.Checkpointable):
    """A task that submitit requeues at its time limit or when it is preempted.

    In a plain function submitit would raise an exception, which counts as an error of its code. A restarted task skips
    finished shards, so there is no state to save.
    """

    def __call__(self, stage_folder: str, task: Task, threads: int, gpus: int = 0) -> None:
        run_task(stage_folder, task, threads, gpus)


class SlurmBackend:
    """Jobs as Slurm arrays, submitted through submitit. squeue reports their states; accounting is not required."""

    polls_until_lost = 3
    host: str | None = None
    steps = False

    def __init__(self, slurm: Slurm, resources: Resources, python: str | None) -> None:
        check_import_path(slurm.commands)
        self._slurm, self._resources = slurm, resources
        self._python, self._container_options = python_command(slurm, python)
        self._largest_array = slurm.max_array_size
        self._next_array = math.inf  # tasks, after sbatch refused a larger array
        self._silent = False

    def check(self) -> None:
        """Check that jobs can be submitted here; to watch and end jobs takes less.

        Raises:
            UserError: a command of Slurm is missing.
        """
        for command in ("sbatch", "srun"):  # submitit looks for srun, which only nodes call
            if shutil.which(command) is None:
                raise UserError(
                    f"cluster.profile is slurm, but there is no {command} here; start on a login node, or set profile: local"
                )

    def prepare(self) -> None:
        pass  # jobs import on their nodes

    def plan_jobs(
        self, shards: Sequence[int], free: int, avoid: frozenset[str], slow_node: str | None = None
    ) -> list[Task]:
        """Cut shards into the tasks of one array; the scheduler limits how many run at a time."""
        # Submit nothing while the controller is down (restart, failover): sbatch would fail, and end the run.
        if free <= 0 or self._squeue("--me") is None:
            return []
        return split_for_array(shards, free, self._resources.shards_per_job)[: self.array_limit()]

    def array_limit(self) -> int:
        """Return how many tasks the next job array may have."""
        if self._largest_array is None:
            self._largest_array = (largest_array() or _DEFAULT_ARRAY_LIMIT) - 1
        return int(min(self._largest_array, self._next_array))

    def submit(
        self, name: str, folder: Path, tasks: Sequence[Task], stage_folder: Path, at_once: int, avoid: frozenset[str]
    ) -> list[str]:
        executor = self._executor(name, folder, at_once, avoid)
        cpus, gpus, count = self._resources.cpus_per_process, self._resources.gpus_per_node, len(tasks)
        arguments = [str(stage_folder)] * count, list(tasks), [cpus] * count, [gpus] * count
        try:
            with _limit_sbatch(folder):
                jobs = executor.map_array(_Restartable(), *arguments)
        except (FailedJobError, FailedSubmissionError) as error:
            if self.adapt_to_refusal(str(error), count):
                raise SchedulerUnavailable(str(error)) from error
            if getattr(error.__cause__, "returncode", None) == -signal.SIGKILL:
                raise SchedulerUnavailable(f"sbatch did not answer within {SBATCH_PATIENCE:.0f} s") from error
            if avoid:
                log.warning("no node is left when %s are excluded; using them again", ", ".join(sorted(avoid)))
                return self.submit(name, folder, tasks, stage_folder, at_once, frozenset())
            raise UserError(
                f"sbatch rejected the jobs: {error}\nSee cluster.slurm and cluster.resources in the configuration."
            ) from error
        self.double_arrays()
        return [job.job_id for job in jobs]

    def adapt_to_refusal(self, refusal: str, jobs: int) -> bool:
        """Let the next array be smaller if this one exceeded a limit; return whether sbatch would accept jobs later.

        It would if the controller is down, or this user would have too many jobs.

        An array may exceed a limit that waiting does not raise: arrays start again with one task, and double while they are
        accepted. One job is not refused for ever if this user has other jobs, which will end.
        """
        if any(sign in refusal for sign in CONTROLLER_DOWN):
            return True
        if not any(sign in refusal for sign in _TOO_MANY_JOBS):
            return False
        if jobs > 1:
            self._next_array = 1
            return True
        queued = self._squeue("--me", "--format=%A") or set()
        return bool(queued - {os.environ.get("SLURM_JOB_ID")})  # the driver itself may be a job

    def double_arrays(self) -> None:
        """Let arrays grow again after sbatch accepted one."""
        self._next_array *= 2

    def _executor(self, name: str, folder: Path, at_once: int, avoid: frozenset[str]) -> SbatchExecutor:
        """Return the executor that submits jobs with the configured options."""
        resources, slurm = self._resources, self._slurm
        gpus = gpu_options(slurm, resources)
        if "gres" in gpus and slurm.extra.get("gres"):
            gpus["gres"] += f",{slurm.extra['gres']}"
        # Some clusters do not requeue jobs of crashed nodes by default.
        options = {"requeue": True, "exclusive": bool(slurm.exclusive), **slurm.extra, **gpus}
        parameters: dict[str, Any] = {
            "job_name": name,
            "time": resources.time_limit_minutes,
            # Time to be requeued before the limit; for a short limit a small share of it.
            "signal_delay_s": min(90, 15 * resources.time_limit_minutes),
            "nodes": resources.nodes,
            "ntasks_per_node": resources.processes_per_node,
            "cpus_per_task": resources.cpus_per_process,
            "mem": f"{resources.memory_gb}GB" if resources.memory_gb else None,
            "array_parallelism": at_once,
            "partition": slurm.partition,
            "account": slurm.account,
            "qos": slurm.qos,
            "constraint": slurm.constraint,
            "exclude": self._excluded(avoid) or None,
            "setup": slurm.commands or None,
            "additional_parameters": {option: value for option, value in options.items() if value is not False},
            # Some releases of srun do not inherit sbatch's CPUs. Without --kill-on-bad-exit, the other processes wait
            # for a failed one until the time limit.
            "srun_args": [
                f"--cpus-per-task={resources.cpus_per_process}",
                "--kill-on-bad-exit=1",
                *self._container_options,
                *slurm.srun,
            ],
        }
        executor = SbatchExecutor(
            folder=folder, python=f"{self._python} -P", max_num_timeout=resources.infrastructure_retries
        )
        # Without wckey=None, submitit sends a workload characterization key of its own.
        executor.update_parameters(wckey=None, **{key: value for key, value in parameters.items() if value is not None})
        return executor

    def script(self, name: str, folder: Path, avoid: frozenset[str] = frozenset()) -> str:
        """Return the batch script of a job that computes nothing, with the options of all jobs of this stage."""
        text: str = self._executor(name, folder, 1, avoid)._make_submission_file_text("true", name)
        return text

    def _excluded(self, avoid: frozenset[str]) -> str:
        """Return the nodes that no job may use: those of the configuration, and `avoid`."""
        return ",".join([*([self._slurm.exclude] if self._slurm.exclude else []), *sorted(avoid)])

    def can_run_outside(self, nodes: frozenset[str]) -> bool:
        # What is refused without nodes to exclude, too, has another cause.
        return not nodes or self._accepts(nodes) is not False or self._accepts(frozenset()) is not True

    def _accepts(self, avoid: frozenset[str]) -> bool | None:
        """Return whether Slurm would accept a job now that may not use `avoid`, on nodes that are up; None: no answer."""
        try:
            return check_script(self.script("check", Path(), avoid)) is None
        except SchedulerUnavailable:
            return None

    def keep_away(self, ids: Sequence[str], nodes: frozenset[str]) -> None:
        # Slurm would hold the jobs if no node were left, with BadConstraints.
        if nodes and not self._accepts(nodes):
            return
        for array in _arrays(ids):  # fails for tasks that have started
            run_command("scontrol", "update", f"jobid={array}", f"excnodelist={self._excluded(nodes)}")

    def set_parallelism(self, ids: Sequence[str], at_once: int) -> None:
        for array in _arrays(ids):
            run_command("scontrol", "update", f"jobid={array}", f"arraytaskthrottle={at_once}")

    def find(self, name: str, folder: Path) -> list[str]:
        deadline = time.monotonic() + _CONTROLLER_TIMEOUT
        while (queued := self._queued(name)) is None:
            if time.monotonic() > deadline:
                raise SchedulerUnavailable(
                    f"squeue does not answer, and jobs named {name} may be running; try again when it answers"
                )
            time.sleep(1)
        return sorted(_arrays(queued))

    def alive(self, name: str, ids: Sequence[str]) -> set[str] | None:
        queued = self._queued(name)
        return None if queued is None else queued & set(ids)

    def cancel_lost(self, job_id: str, kind: str) -> None:
        run_command("scancel", "--quiet", job_id)

    def running(self, name: str, ids: Sequence[str]) -> set[str] | None:
        queued = self._queued(name, "--states=RUNNING,COMPLETING")
        return None if queued is None else queued & set(ids)

    def cancel(self, ids: Sequence[str]) -> None:
        """End jobs, running or queued, and wait until they have ended: none commits afterwards.

        Raises:
            JobsRemain: squeue does not answer, or some run although scancel was called again and again.
        """
        arrays = _arrays(ids)
        deadline, next_call = time.monotonic() + _CANCEL_TIMEOUT, 0.0
        while arrays:
            if time.monotonic() >= next_call:
                next_call = time.monotonic() + (_SCANCEL_PAUSE if _call_scancel(arrays) else 1.0)
            lines = self._squeue("--me", "--format=%F %T")
            states = None if lines is None else {state for array, state in map(str.split, lines) if array in arrays}
            if states == set():
                return
            if time.monotonic() > deadline and states == {"COMPLETING"}:  # on a node that does not respond to Slurm
                log.warning("jobs %s have not ended; continuing without waiting", " ".join(sorted(arrays)))
                return
            if time.monotonic() > deadline:
                problem = "squeue does not answer; jobs may still run" if states is None else "Slurm has not ended jobs"
                raise JobsRemain(f"{problem}: scancel {' '.join(sorted(arrays))}")
            time.sleep(0.2)

    def exit_reason(self, job_id: str) -> str:
        # The controller forgets jobs after minutes; accounting keeps them, but is optional.
        job = f"--jobs={job_id}"
        answer = run_command("squeue", "--noheader", "--states=all", job, "--format=%T (%r) on %N") or run_command(
            "sacct", "--noheader", "--allocations", "--parsable2", job, "--format=State,ExitCode,NodeList"
        )
        return f"Slurm says {answer.strip()}" if answer else "the job left the queue without a result"

    def _queued(self, name: str, *options: str) -> set[str] | None:
        # --array prints a line per task: otherwise Slurm truncates long lists of pending tasks. A job that failed to
        # launch stays in the queue, held until an administrator releases it: it does not count.
        lines = self._squeue("--array", f"--name={name}", "--format=%i|%r", *options)
        if lines is None:
            return None
        return {
            job_id
            for job_id, _, reason in (line.partition("|") for line in lines)
            if not _NEVER_LAUNCHED.fullmatch(reason)
        }

    def _squeue(self, *options: str) -> set[str] | None:
        answer = run_command("squeue", "--noheader", *options)
        if self._silent != (answer is None):
            self._silent = answer is None
            log.warning("squeue %s", "fails; waiting until it answers" if self._silent else "answers again")
        return None if answer is None else set(answer.splitlines())


def _call_scancel(arrays: set[str]) -> bool:
    """Ask Slurm to end arrays of jobs; return whether it accepted."""
    # submitit's workers ignore the SIGTERM of a plain scancel and would run until Slurm's KillWait is over; SIGHUP ends
    # them. Cancel pending tasks first: otherwise they would start in place of ended ones.
    calls = [["--state=PENDING"], ["--signal=HUP"], []]
    return None not in [run_command("scancel", "--quiet", *options, *sorted(arrays)) for options in calls]


def gpu_options(slurm: Slurm, resources: Resources) -> dict[str, str]:
    """Return the option of sbatch and srun that asks for GPUs, and its value; empty for a job without GPUs."""
    if not resources.gpus_per_node:
        return {}
    wanted = f"{resources.gpu_type}:{resources.gpus_per_node}" if resources.gpu_type else str(resources.gpus_per_node)
    return {"gres": f"gpu:{wanted}"} if slurm.gpu_option == "gres" else {"gpus-per-node": wanted}


def python_command(slurm: Slurm, python: str | None) -> tuple[str, list[str]]:
    """Return the command that starts Python on a node, and the options that srun needs for it."""
    container = slurm.container
    if container is None:
        return shlex.quote(python or sys.executable), []
    interpreter = python or "python3"
    if container.runtime == "apptainer":
        mounts = [f"--bind={mount}" for mount in container.mounts]
        return shlex.join(["apptainer", "exec", "--nv", *mounts, container.image, interpreter]), []
    mounts = [mount if ":" in mount else f"{mount}:{mount}" for mount in container.mounts]
    options = [f"--container-image={container.image}"]
    return shlex.quote(interpreter), [*options, f"--container-mounts={','.join(mounts)}"] if mounts else options


def largest_array() -> int | None:
    """Return Slurm's MaxArraySize; None if unknown."""
    match = re.search(r"MaxArraySize\s*=\s*(\d+)", run_command("scontrol", "show", "config") or "")
    return int(match[1]) if match else None


def seconds_of(duration: str) -> float:
    """Return the seconds of a duration in Slurm's output, `[days-][hours:]minutes:seconds`; infinite if it is a word."""
    days, _, clock = duration.rpartition("-")
    if not re.fullmatch(r"\d+(:\d+){0,2}", clock):
        return float("inf")  # infinite, UNLIMITED, n/a
    seconds = 0
    for part in clock.split(":"):
        seconds = 60 * seconds + int(part)
    return 86400 * int(days or 0) + seconds


def _arrays(ids: Iterable[str]) -> set[str]:
    """Return the ids of the arrays of jobs; submitit makes an array of one task a plain job."""
    return {job_id.split("_")[0] for job_id in ids}
