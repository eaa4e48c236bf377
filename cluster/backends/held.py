"""Backend that holds Slurm jobs from one stage of a run to the next, and runs jobs as their srun steps.

A held job is queued once. It computes nothing itself: it waits on its node, and serves all stages of the run that ask sbatch
for the same, one srun step at a time. It ends with the run, or when it has had no step for a while.
"""

import logging
import re
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.backends.allocation import AllocationBackend
from cluster.backends.base import JobsRemain, SchedulerUnavailable, Task
from cluster.backends.command import run_command
from cluster.backends.sbatch import call_sbatch
from cluster.backends.slurm import SlurmBackend, seconds_of
from cluster.retry import classify_loss
from montessori_core import layout
from montessori_core.config import HeldJobs, Resources, Slurm
from montessori_core.errors import UserError
from montessori_core.files import hash_json

log = logging.getLogger(__name__)

_PREFIX = "montessori-held"
_IDLE_POLLS = 5  # at the queue, in the time after which an idle job ends
_REFUSAL_PAUSE = 60.0  # seconds until jobs are submitted again, after sbatch refused some
_SHORTEST_CALL = 5.0  # seconds for which Slurm is awaited when there is no patience
_OWN_OPTIONS = "error|job-name|open-mode|output|requeue|signal|time"
_PENDING_STATES = ("PENDING", "CONFIGURING")
_IDLE_SCRIPT = """\
unset "${{!SQUEUE_@}}" # options of the user, which may hide steps
idle=0
while [ $idle -lt {limit} ]; do
  sleep {pause}
  if steps=$(squeue --noheader --steps --jobs="${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}" --format=%i) &&
    ! grep --quiet --invert-match --extended-regexp '[.](batch|extern)$' <<<"${{steps:-.batch}}"; then
    idle=$((idle + {pause}))
  else
    idle=0 # a step runs, or the queue is unknown
  fi
done
"""


@dataclass(frozen=True)
class _Held:
    """A held job in the queue: its id, name and state, the reason why it waits, and the seconds until its time limit.

    The id of one job of an array is that of the array, by which scancel and squeue mean all of its jobs; `element`, such as
    17_3, means one.
    """

    id: str
    element: str
    name: str
    state: str
    reason: str
    seconds_left: float


class HeldBackend(AllocationBackend):
    """Jobs as steps of held jobs. A job id has the id and start time of the srun process, as in an allocation."""

    def __init__(self, slurm: Slurm, hold: HeldJobs, resources: Resources, python: str | None, folder: Path) -> None:
        """Hold jobs for the driver of `folder`."""
        super().__init__(slurm, resources, python)
        self._hold, self._folder = hold, folder / layout.HELD
        self._sbatch = SlurmBackend(slurm, resources, python)
        self._sbatch.check()
        lines = self._sbatch.script("held", self._folder).splitlines()
        # The resources to ask for. Other options differ from job to job, or are for jobs that compute.
        self._request = [line for line in lines if re.match(rf"#SBATCH --(?!{_OWN_OPTIONS})", line)]
        self._name = f"{_names_of(folder)}{hash_json(self._request)[:8]}"
        self._ready: list[str] = []
        self._elements: dict[str, str] = {}
        self._held_of: dict[str, str] = {}
        self._needed: frozenset[str] = frozenset()  # nodes without which too few are left
        self._impossible: set[frozenset[str]] = set()  # nodes without which no copy of a slow shard can run
        self._refused_until = 0.0
        self._has_submitted = False

    def plan_jobs(
        self, shards: Sequence[int], free: int, avoid: frozenset[str], slow_node: str | None = None
    ) -> list[Task]:
        """Cut shards into a job for each held job that runs and has no step; submit held jobs that are missing.

        Held jobs on the nodes `avoid` do not count: they may have started before the driver excluded these nodes.
        """
        avoid -= self._needed
        without = avoid | ({slow_node} if slow_node else set())
        held = self._queue(without)
        if held is None or free <= 0:
            return []
        busy = _jobs_with_steps()
        free_jobs = [job for job in held if job.id not in busy]
        # A job whose step is ending counts as held: it is free in a moment.
        missing = min(min(free, len(shards)) - len(free_jobs), self._resources.parallel_jobs - len(held))
        if missing > 0 and time.monotonic() >= self._refused_until and without not in self._impossible:
            self._submit_held(missing, avoid, without)
        self._ready = [job.id for job in free_jobs if job.state == "RUNNING"][:free]
        self._elements |= {job.id: job.element for job in held}
        return self.hand_out(shards, len(self._ready), self._resources.parallel_jobs)

    def submit(
        self, name: str, folder: Path, tasks: Sequence[Task], stage_folder: Path, at_once: int, avoid: frozenset[str]
    ) -> list[str]:
        # `plan_jobs` has chosen the held jobs by their nodes.
        folder.mkdir(exist_ok=True)
        ids = []
        for task in tasks:
            held = self._ready.pop()
            job_id = self.start_step(held, name, folder, task, stage_folder)
            self._held_of[job_id] = held
            ids.append(job_id)
        return ids

    def can_run_outside(self, nodes: frozenset[str]) -> bool:
        return self._sbatch.can_run_outside(nodes)

    def keep_away(self, ids: Sequence[str], nodes: frozenset[str]) -> None:
        held = _queued("--me", f"--name={self._name}") or []
        self._sbatch.keep_away([job.id for job in held if job.state in _PENDING_STATES], nodes)

    def note_command(self, job_id: str, command: list[str]) -> None:
        super().note_command(job_id, command)
        held = [word.removeprefix("--jobid=") for word in command if word.startswith("--jobid=")]
        if held and held[0] not in self._elements:
            self._elements |= {job.id: job.element for job in _queued("--me", f"--name={self._name}") or []}
        if held and held[0] in self._elements:
            self._held_of[job_id] = held[0]

    def exit_reason(self, job_id: str) -> str:
        """Describe why a step ended: because its held job did, or by Slurm's messages about the step."""
        held = self._held_of.get(job_id)
        if held is None:
            return super().exit_reason(job_id)
        job = f"--jobs={self._elements[held]}"
        # A preempted job runs until its grace time is over, but its steps end at once.
        preempted = (run_command("squeue", "--noheader", job, "--Format=PreemptTime") or "").strip()
        if preempted not in ("", "N/A"):
            return f"Slurm says PREEMPTED at {preempted}"
        state = self._sbatch.exit_reason(self._elements[held])
        return super().exit_reason(job_id) if classify_loss(state) == "lost" else state

    def cancel_lost(self, job_id: str, kind: str) -> None:
        """Give back the held job of a lost step, if its node may be the cause: others would queue again."""
        held = self._held_of.pop(job_id, None)
        if held is not None and kind not in ("time_limit", "out_of_memory"):
            run_command("scancel", "--quiet", self._elements[held])

    def _queue(self, avoid: frozenset[str]) -> list[_Held] | None:
        """Return the held jobs with time for a job of this stage outside some nodes, running ones first.

        None if squeue does not answer.

        Raises:
            UserError: held jobs exceed the time limit of their partition.
        """
        held = _queued("--me", f"--name={self._name}")
        if held is None:
            return None
        there = _queued("--me", f"--name={self._name}", f"--nodelist={','.join(sorted(avoid))}") if avoid else None
        excluded = {job.id for job in there or []}
        needed = 60 * self._resources.time_limit_minutes
        running = [
            job for job in held if job.state == "RUNNING" and job.seconds_left >= needed and job.id not in excluded
        ]
        return running + self._startable([job for job in held if job.state in _PENDING_STATES])

    def _startable(self, pending: list[_Held]) -> list[_Held]:
        """Return the pending jobs that can start; cancel those that Slurm accepted although their partition allows less time.

        Raises:
            UserError: this driver asks for too much time; jobs of an earlier one may have had other settings.
        """
        several = "," in (self._slurm.partition or "")  # one of them may allow it
        too_long = [job for job in pending if job.reason == "PartitionTimeLimit" and not several]
        if too_long:
            run_command("scancel", "--quiet", *(job.element for job in too_long))
        if too_long and self._has_submitted:
            raise UserError(
                f"held jobs exceed their partition's time limit: they ask for cluster.slurm.hold.minutes "
                f"({self._hold.minutes}) and time_limit_minutes of the stage ({self._resources.time_limit_minutes}); lower "
                "one of them, or choose another partition"
            )
        return [job for job in pending if job not in too_long]

    def _submit_held(self, count: int, avoid: frozenset[str], without: frozenset[str]) -> None:
        """Submit held jobs, excluding the nodes `without`: those of `avoid`, and for a copy of a slow shard that shard's.

        If Slurm does not answer or accepts no more of this user's jobs, it is asked again later.

        Raises:
            UserError: sbatch refuses them.
        """
        count = min(count, self._sbatch.array_limit())
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"{self._name}.sh"
        idle = round(60 * self._hold.idle_minutes)
        wait = _IDLE_SCRIPT.format(limit=idle, pause=max(1, idle // _IDLE_POLLS))
        path.write_text("\n".join(["#!/bin/bash", *self._request, wait]), encoding="utf-8")
        options = [
            f"--job-name={self._name}",
            f"--array=0-{count - 1}",
            f"--time={self._hold.minutes + self._resources.time_limit_minutes}",
            f"--output={self._folder}/%A_%a.log",
            "--no-requeue",
        ]
        if without:
            options.append(f"--exclude={','.join(sorted(filter(None, {self._slurm.exclude, *without})))}")
        try:
            answer = call_sbatch(path, *options)
        except SchedulerUnavailable as error:
            self._pause(str(error))
            return
        if answer.returncode == 0:
            self._has_submitted = True
            self._sbatch.double_arrays()
            log.info("holding %d more jobs: Slurm job %s", count, answer.stdout.split()[-1])
            return
        refusal = answer.stderr.strip()
        passing = self._sbatch.adapt_to_refusal(refusal, count)
        if not passing and without != avoid:
            self._impossible.add(without)
            return
        if not passing and not avoid and _queued("--me", f"--name={self._name}") == []:
            raise UserError(
                f"sbatch rejected the jobs to hold: {refusal}\nSee cluster.slurm and cluster.resources in the configuration."
            )
        # Too few nodes are left, there is a limit on jobs (other stages and runs hold some), or the controller is down.
        if not passing:
            self._needed |= avoid
        self._pause(refusal)

    def _pause(self, reason: str) -> None:
        """Submit no held jobs for a while."""
        log.warning("no more jobs are held for %.0f s: %s", _REFUSAL_PAUSE, reason)
        self._refused_until = time.monotonic() + _REFUSAL_PAUSE


def end_held_jobs(folder: Path, patience: float = 120.0) -> int:
    """End the jobs that drivers of `folder` hold; return their number.

    Args:
        folder: of a driver.
        patience: seconds for which Slurm is asked again.

    Raises:
        JobsRemain: Slurm does not answer.
    """
    deadline, timeout = time.monotonic() + patience, max(patience, _SHORTEST_CALL)
    while (held := _held_jobs(folder, timeout)) is None or (
        held and run_command("scancel", "--quiet", *sorted({job.id for job in held}), timeout=timeout) is None
    ):
        if time.monotonic() >= deadline:
            raise JobsRemain("Slurm does not answer; held jobs end only when they have been idle for hold.idle_minutes")
        time.sleep(1)
    return len(held)


def end_orphaned_steps(folder: Path) -> None:
    """End the steps in held jobs of `folder` that no srun process of this host waits for.

    Their driver ran on another host, or this host crashed.
    """
    running = [job for job in _held_jobs(folder) or [] if job.state == "RUNNING"]
    awaited = _jobs_with_steps() if running else set()
    orphaned = [job.element for job in running if job.id not in awaited]
    if not orphaned:
        return
    answer = run_command("squeue", "--noheader", "--steps", f"--jobs={','.join(orphaned)}", "--format=%i") or ""
    steps = [step for step in answer.split() if not step.endswith((".batch", ".extern"))]
    if steps:
        run_command("scancel", "--quiet", *steps)


def states_of_held_jobs(folder: Path) -> Counter[str]:
    """Count the jobs that drivers of `folder` hold by their state in the queue, such as 'RUNNING'."""
    return Counter(job.state for job in _held_jobs(folder) or [])


def _held_jobs(folder: Path, timeout: float = 120.0) -> list[_Held] | None:
    """Return the jobs that drivers of `folder` hold; None if squeue does not answer."""
    if not (folder / layout.HELD).exists() or shutil.which("squeue") is None:
        return []
    queued = _queued("--me", timeout=timeout)
    return None if queued is None else [job for job in queued if job.name.startswith(_names_of(folder))]


def _queued(*options: str, timeout: float = 120.0) -> list[_Held] | None:
    command = "squeue", "--noheader", "--array", *options, "--format=%A|%i|%T|%r|%L|%j"
    answer = run_command(*command, timeout=timeout)
    if answer is None:
        return None
    lines = [line.split("|", 5) for line in answer.splitlines()]
    return [
        _Held(job_id, element, name, state, reason, seconds_of(left))
        for job_id, element, state, reason, left, name in lines
    ]


def _names_of(folder: Path) -> str:
    """Return how the names of the jobs start that drivers of `folder` hold."""
    return f"{_PREFIX}-{hash_json(str(folder.resolve()))[:12]}-"


def _jobs_with_steps() -> set[str]:
    """Return the Slurm jobs that an srun process of this host runs a step in."""
    jobs: set[str] = set()
    for process in psutil.process_iter(["cmdline"]):
        jobs.update(re.findall(r"--jobid=(\d+)", shlex.join(process.info["cmdline"] or [])))
    return jobs
