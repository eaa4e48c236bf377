"""Two ways to run jobs behind one interface: processes of this machine, and Slurm. Both run jobs through submitit."""

import itertools
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psutil
import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from cluster.supervisor import kill_family
from cluster.warm_start import Job, warm_process
from cluster.worker import run_task
from montessori_core.config import Cluster, Resources, Slurm
from montessori_core.errors import UserError

log = logging.getLogger(__name__)

_NEVER_LAUNCHED = ("launch failed requeued held", "launch_failed_requeued_held")
_CONTROLLER_AWAY = ("Unable to contact slurm controller", "Socket timed out", "Zero Bytes were transmitted")
_TOO_MANY_JOBS = ("violates accounting/QOS policy", "MaxSubmitJob", "Resource temporarily unavailable")
_SBATCH_PATIENCE = 120.0  # seconds
_USUAL_ARRAY_LIMIT = 1001  # Slurm's own default
_KILL_PATIENCE = 10.0  # seconds; a process that reads from a disk may take some to end
_CANCEL_PATIENCE = 120.0  # seconds; Slurm's KillWait is 30 by default
_SILENCE = 300.0  # seconds that a controller may need to come back

Task = list[int]  # shards that one job works through
AnyShard = TypeVar("AnyShard")


class SchedulerAway(UserError):
    """The scheduler did not answer, or takes no job at present; it may have taken some all the same."""


class Backend(Protocol):
    """Where jobs run. Job ids are texts that any later process can use."""

    polls_until_lost: int
    """Looks in a row at which a job must be missing before it counts as lost."""

    def group(self, shards: Sequence[int], free: int) -> list[Task]:
        """Cut shards into the tasks to submit now, if so many more may run; the rest waits."""
        ...

    def submit(
        self, name: str, folder: Path, tasks: Sequence[Task], stage_folder: Path, at_once: int, avoid: frozenset[str]
    ) -> list[str]:
        """Start one job a task under a name that no other submission has, on other nodes than `avoid`; return their ids.

        At most `at_once` of them run at a time.

        Raises:
            SchedulerAway: for now.
        """
        ...

    def widen(self, ids: Sequence[str], at_once: int) -> None:
        """Let more jobs of a submission run at a time."""
        ...

    def find(self, name: str, folder: Path) -> list[str]:
        """Ids of jobs submitted under `name`, even if the submitter died before it could note them.

        Raises:
            SchedulerAway: it is silent.
        """
        ...

    def alive(self, name: str, ids: Sequence[str]) -> set[str] | None:
        """Which jobs of a submission are running or will run again; None if nobody knows at present."""
        ...

    def running(self, name: str, ids: Sequence[str]) -> set[str]:
        """Which jobs of a submission have started; none of them if nobody knows at present."""
        ...

    def cancel(self, ids: Sequence[str]) -> None:
        """End jobs, running or not."""
        ...

    def reason(self, job_id: str) -> str:
        """What is known of why a job ended without a result."""
        ...

    def forget(self, job_id: str) -> None:
        """See that a job that counts as lost does not run again."""
        ...


def deal(shards: Sequence[AnyShard], jobs: int) -> list[list[AnyShard]]:
    """Shards by local job: dealt evenly to at most so many."""
    jobs = min(jobs, len(shards))
    return [list(shards[start::jobs]) for start in range(jobs)]


def bundle(shards: Sequence[AnyShard], size: int) -> list[list[AnyShard]]:
    """Shards by task of an array, so many each but the last."""
    return [list(shards[start : start + size]) for start in range(0, len(shards), size)]


def open_backend(cluster: Cluster, resources: Resources, python: str | None, jobs_follow: bool = True) -> Backend:
    """The backend of the configured profile.

    Args:
        cluster: where jobs run.
        resources: what a job gets.
        python: Python of another environment for these jobs.
        jobs_follow: whether jobs will be started; local ones are then prepared for.
    """
    if cluster.profile == "slurm":
        return SlurmBackend(cluster, resources, python or cluster.slurm.python)
    backend = LocalBackend(resources, python)
    if backend.forks_jobs and jobs_follow:
        warm_process()  # what jobs import is then imported while the driver prepares them
    return backend


def backend_at(host: str | None, cluster: Cluster) -> Backend | None:
    """The backend that reaches jobs which an earlier driver, perhaps of another profile, has submitted.

    Args:
        host: whose processes they are; None for jobs of Slurm.
        cluster: as configured now.

    Returns:
        None if they are processes of another host.
    """
    if host not in (None, platform.node()):
        return None
    if host is not None:
        return LocalBackend(Resources(), None)
    return open_backend(cluster.model_copy(update={"profile": "slurm"}), Resources(), None)


def log_file(folder: Path, job_id: str) -> Path:
    """Standard error of a job's first process; it is there once the job has begun."""
    return folder / f"{job_id.split(':')[0]}_0_log.err"


class LocalBackend:
    """Jobs as processes of this machine. An id is a process id and its start time, so that it is never mistaken.

    Attributes:
        forks_jobs: whether jobs are forked from this driver's warm process (`cluster.warm_start`). Jobs in another
            environment are not, nor are any on macOS, whose libraries do not take a fork well.
    """

    polls_until_lost = 1

    def __init__(self, resources: Resources, python: str | None) -> None:
        self._resources, self._python = resources, python
        self.forks_jobs = python is None and sys.platform == "linux"
        self._known: set[str] = set()
        self._gpus = _gpus_of_this_machine() if resources.gpus_per_node else []
        if len(self._gpus) < resources.gpus_per_node:
            raise UserError(
                f"a job asks for {resources.gpus_per_node} GPUs, and this machine has {len(self._gpus)} "
                "(nvidia-smi, CUDA_VISIBLE_DEVICES); lower gpus_per_node in cluster.resources"
            )

    def group(self, shards: Sequence[int], free: int) -> list[Task]:
        """Deal shards evenly to the jobs that may still start; resident workers go from shard to shard."""
        if self._resources.gpus_per_node:
            free = min(free, len(self._free_gpus()) // self._resources.gpus_per_node)
        return deal(shards, free)

    def submit(
        self, name: str, folder: Path, tasks: Sequence[Task], stage_folder: Path, at_once: int, avoid: frozenset[str]
    ) -> list[str]:
        free = iter(self._free_gpus())
        ids = []
        for task in tasks:
            gpus = tuple(itertools.islice(free, self._resources.gpus_per_node))
            job_id = self._fork_job(folder, task, stage_folder, gpus) if self.forks_jobs else None
            ids.append(job_id or self._start_job(folder, task, stage_folder, gpus))
        self._known.update(ids)
        return ids

    def _fork_job(self, folder: Path, task: Task, stage_folder: Path, gpus: tuple[int, ...]) -> str | None:
        """Start a job from the warm process; None if that does not answer."""
        folder.mkdir(exist_ok=True)
        job = Job(
            folder=str(folder),
            stage_folder=str(stage_folder),
            task=task,
            threads=self._resources.cpus_per_process,
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
        """Start a job in a Python of its own."""
        resources = self._resources
        executor = submitit.LocalExecutor(folder=folder, python=shlex.quote(self._python) if self._python else None)
        executor.update_parameters(
            timeout_min=resources.time_limit_minutes,
            tasks_per_node=resources.processes_per_node,
            gpus_per_node=resources.gpus_per_node,
            visible_gpus=gpus,
        )
        job = executor.submit(run_task, str(stage_folder), task, resources.cpus_per_process)
        try:
            started = psutil.Process(int(job.job_id)).create_time()
        except psutil.NoSuchProcess:
            started = 0.0
        return f"{job.job_id}:{started}"

    def _free_gpus(self) -> list[int]:
        """Those that no job at work has, jobs of an earlier driver included."""
        taken: set[str] = set()
        for job_id in self._known:
            process = _process(job_id)
            if process is not None:
                with suppress(psutil.Error):  # it has just ended
                    taken.update(process.environ().get("CUDA_VISIBLE_DEVICES", "").split(","))
        return [gpu for gpu in self._gpus if str(gpu) not in taken]

    def widen(self, ids: Sequence[str], at_once: int) -> None:
        pass  # a process waits for nothing

    def find(self, name: str, folder: Path) -> list[str]:
        found = []
        for process in psutil.process_iter(["cmdline", "create_time"]):
            command = process.info["cmdline"] or []
            if {"cluster.supervisor", "submitit.local._local"} & set(command) and str(folder) in command:
                found.append(f"{process.pid}:{process.info['create_time']}")
        return found

    def alive(self, name: str, ids: Sequence[str]) -> set[str] | None:
        self._known.update(ids)
        return {job_id for job_id in ids if _process(job_id) is not None}

    def running(self, name: str, ids: Sequence[str]) -> set[str]:
        return {job_id for job_id in ids if _process(job_id) is not None}

    def cancel(self, ids: Sequence[str]) -> None:
        # submitit's workers ignore SIGTERM, and commits are atomic: the processes are simply killed.
        for job_id in ids:
            process = _process(job_id)
            if process is None:
                continue
            family = kill_family(process)
            deadline = time.monotonic() + _KILL_PATIENCE
            while any(map(_lives, family)) and time.monotonic() < deadline:
                time.sleep(0.01)

    def reason(self, job_id: str) -> str:
        minutes = self._resources.time_limit_minutes
        if time.time() - float(job_id.partition(":")[2]) >= 60 * minutes:
            return f"TIMEOUT: the process was ended after {minutes} minutes"
        return "the process ended without a result (killed, or out of memory)"

    def forget(self, job_id: str) -> None:
        pass


def _lives(process: psutil.Process) -> bool:
    """Whether a process runs; one that nobody has asked for its exit code does not: init may take seconds for that."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _process(job_id: str) -> psutil.Process | None:
    pid, _, started = job_id.partition(":")
    try:
        process = psutil.Process(int(pid))
        same = abs(process.create_time() - float(started)) < 0.05
        return process if same and _lives(process) else None
    except psutil.NoSuchProcess:
        return None


def _gpus_of_this_machine() -> list[int]:
    """Numbers of the GPUs that jobs may use: those that this process may."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return list(range((ask("nvidia-smi", "--list-gpus") or "").count("GPU ")))
    numbers = [number.strip() for number in named.split(",") if number.strip()]
    if not all(number.isdecimal() for number in numbers):
        raise UserError(f"CUDA_VISIBLE_DEVICES is {named!r}; for profile: local give GPUs by their numbers, e.g. 0,1")
    return [int(number) for number in numbers]


@contextmanager
def _limited(folder: Path) -> Iterator[None]:
    """Kill sbatch when it takes too long: some controllers take the connection and then say nothing, for ever.

    Args:
        folder: which the command names.
    """

    def end() -> None:
        for child in psutil.Process().children():
            with suppress(psutil.Error):
                if any(str(folder) in argument for argument in child.cmdline()):
                    kill_family(child)

    clock = threading.Timer(_SBATCH_PATIENCE, end)
    clock.start()
    try:
        yield
    finally:
        clock.cancel()


class _Restartable(submitit.helpers.Checkpointable):
    """The task as submitit restarts it: at its time limit or when preempted, a job goes back to the queue.

    A plain function would be sent an exception there, which counts as an error of its code. Shards that are done are
    skipped after the restart, so there is no state to keep.
    """

    def __call__(self, stage_folder: str, task: Task, threads: int) -> None:
        run_task(stage_folder, task, threads)


class SlurmBackend:
    """Jobs as arrays of Slurm, submitted through submitit. squeue says what is running; accounting is not needed."""

    polls_until_lost = 3

    def __init__(self, cluster: Cluster, resources: Resources, python: str | None) -> None:
        if shutil.which("sbatch") is None:
            raise UserError(
                "cluster.profile is slurm, but there is no sbatch here: start on a login node, or use profile: local"
            )
        self._slurm, self._resources = cluster.slurm, resources
        self._python, self._container_options = command_of(cluster.slurm, python)
        self._largest_array = cluster.slurm.max_array_size
        self._silent = False

    def group(self, shards: Sequence[int], free: int) -> list[Task]:
        """Cut shards into tasks for one array, of which the scheduler lets so many run at a time as may."""
        # A controller that is away for minutes (restarts, failovers) must not end a run: sbatch would give up.
        if free <= 0 or self._squeue("--me") is None:
            return []
        tasks = bundle(shards, self._resources.shards_per_job)
        if self._largest_array is None:
            self._largest_array = (largest_array() or _USUAL_ARRAY_LIMIT) - 1
        return tasks[: self._largest_array]

    def submit(
        self, name: str, folder: Path, tasks: Sequence[Task], stage_folder: Path, at_once: int, avoid: frozenset[str]
    ) -> list[str]:
        resources, slurm = self._resources, self._slurm
        parameters: dict[str, Any] = {
            "job_name": name,
            "time": resources.time_limit_minutes,
            # Time to go back to the queue before the limit, but most of the time for work when the limit is short.
            "signal_delay_s": min(90, 15 * resources.time_limit_minutes),
            "nodes": resources.nodes,
            "ntasks_per_node": resources.processes_per_node,
            "cpus_per_task": resources.cpus_per_process,
            "gpus_per_node": resources.gpus_per_node or None,
            "mem": f"{resources.memory_gb}GB" if resources.memory_gb else None,
            "array_parallelism": at_once,
            "partition": slurm.partition,
            "account": slurm.account,
            "qos": slurm.qos,
            "constraint": slurm.constraint,
            "exclude": ",".join([*([slurm.exclude] if slurm.exclude else []), *sorted(avoid)]) or None,
            "setup": list(slurm.setup) or None,
            # Clusters may be set up to forget jobs of crashed nodes instead of running them again.
            "additional_parameters": {
                key: value for key, value in {"requeue": True, **slurm.extra}.items() if value is not False
            },
            # Some releases of srun do not take the CPUs from sbatch. And when one of several processes fails, the
            # others would wait for it until the time limit.
            "srun_args": [
                f"--cpus-per-task={resources.cpus_per_process}",
                "--kill-on-bad-exit=1",
                *self._container_options,
                *slurm.srun,
            ],
        }
        executor = submitit.SlurmExecutor(
            folder=folder, python=self._python, max_num_timeout=resources.infrastructure_retries
        )
        executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
        arguments = [str(stage_folder)] * len(tasks), list(tasks), [resources.cpus_per_process] * len(tasks)
        try:
            with _limited(folder):
                jobs = executor.map_array(_Restartable(), *arguments)
        except (FailedJobError, FailedSubmissionError) as error:
            if any(sign in str(error) for sign in _CONTROLLER_AWAY):
                raise SchedulerAway(str(error)) from error
            if getattr(error.__cause__, "returncode", None) == -signal.SIGKILL:
                raise SchedulerAway(f"sbatch did not answer within {_SBATCH_PATIENCE:.0f} s") from error
            if any(sign in str(error) for sign in _TOO_MANY_JOBS) and self._squeue("--me"):
                # A limit on one's jobs: there is room again when some have ended.
                raise SchedulerAway(str(error)) from error
            if avoid:
                log.warning("no nodes are left without %s, using them again", ", ".join(sorted(avoid)))
                return self.submit(name, folder, tasks, stage_folder, at_once, frozenset())
            raise UserError(
                f"sbatch did not take the jobs: {error}\nSee cluster.slurm (max_array_size if there is a limit on jobs a "
                "user may submit) and cluster.resources in the configuration."
            ) from error
        return [job.job_id for job in jobs]

    def widen(self, ids: Sequence[str], at_once: int) -> None:
        for array in _arrays(ids):
            ask("scontrol", "update", f"jobid={array}", f"arraytaskthrottle={at_once}")

    def find(self, name: str, folder: Path) -> list[str]:
        deadline = time.monotonic() + _SILENCE
        while (queued := self._queued(name)) is None:
            if time.monotonic() > deadline:
                raise SchedulerAway(
                    f"squeue does not answer, and jobs named {name} may be running; try again when it does"
                )
            time.sleep(1)
        return sorted(_arrays(queued))

    def alive(self, name: str, ids: Sequence[str]) -> set[str] | None:
        queued = self._queued(name)
        return None if queued is None else queued & set(ids)

    def forget(self, job_id: str) -> None:
        ask("scancel", "--quiet", job_id)

    def running(self, name: str, ids: Sequence[str]) -> set[str]:
        return (self._queued(name, "--states=RUNNING,COMPLETING") or set()) & set(ids)

    def cancel(self, ids: Sequence[str]) -> None:
        """End jobs, running or not, and wait until they have ended, so that none commits afterwards."""
        arrays = _arrays(ids)
        if not arrays:
            return
        # submitit's workers ignore the SIGTERM of a plain scancel and would work on until Slurm's KillWait is over;
        # SIGHUP ends them. Tasks that wait go first, or they would take the place of those.
        for options in (["--state=PENDING"], ["--signal=HUP"], []):
            ask("scancel", "--quiet", *options, *sorted(arrays))
        deadline = time.monotonic() + _CANCEL_PATIENCE
        while (left := self._squeue("--me", "--format=%F")) is None or left & arrays:
            if time.monotonic() > deadline and left is None:
                raise UserError(f"squeue does not answer, jobs may run on: scancel {' '.join(sorted(arrays))}")
            if time.monotonic() > deadline:  # e.g. on a node that Slurm has lost sight of
                log.warning("jobs %s are slow to end, going on without waiting", " ".join(sorted(arrays)))
                return
            time.sleep(0.2)

    def reason(self, job_id: str) -> str:
        # The controller remembers jobs for minutes, the accounting for good; clusters may have none.
        job = f"--jobs={job_id}"
        answer = ask("squeue", "--noheader", "--states=all", job, "--format=%T (%r) on %N") or ask(
            "sacct", "--noheader", "--allocations", "--parsable2", job, "--format=State,ExitCode,NodeList"
        )
        return f"Slurm says {answer.strip()}" if answer else "the job is gone from the queue without a result"

    def _queued(self, name: str, *options: str) -> set[str] | None:
        # One line for each task: Slurm cuts a long list of an array's waiting tasks short. A job that a node failed to
        # launch is kept in the queue, but held: it would wait until somebody releases it.
        lines = self._squeue("--array", f"--name={name}", "--format=%i|%r", *options)
        if lines is None:
            return None
        return {
            job_id for job_id, _, reason in (line.partition("|") for line in lines) if reason not in _NEVER_LAUNCHED
        }

    def _squeue(self, *options: str) -> set[str] | None:
        answer = ask("squeue", "--noheader", *options)
        if self._silent != (answer is None):
            self._silent = answer is None
            log.warning("squeue %s", "fails, waiting until it answers" if self._silent else "answers again")
        return None if answer is None else set(answer.splitlines())


def command_of(slurm: Slurm, python: str | None) -> tuple[str, list[str]]:
    """The command that starts Python on a node, and what srun needs to be told for it."""
    container = slurm.container
    if container is None:
        return shlex.quote(python or sys.executable), []
    inside = python or "python3"
    if container.runtime == "apptainer":
        mounts = [f"--bind={mount}" for mount in container.mounts]
        return shlex.join(["apptainer", "exec", "--nv", *mounts, container.image, inside]), []
    mounts = [mount if ":" in mount else f"{mount}:{mount}" for mount in container.mounts]
    options = [f"--container-image={container.image}"]
    return shlex.quote(inside), [*options, f"--container-mounts={','.join(mounts)}"] if mounts else options


def largest_array() -> int | None:
    """Slurm's MaxArraySize; None if it does not say."""
    match = re.search(r"MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config") or "")
    return int(match[1]) if match else None


def _arrays(ids: Iterable[str]) -> set[str]:
    """Ids of the arrays that jobs belong to; an array of one task is to submitit a job of its own."""
    return {job_id.split("_")[0] for job_id in ids}


def ask(*command: str, timeout: float = 120.0) -> str | None:
    """What a command of Slurm answers within `timeout` seconds; None if it cannot tell."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
