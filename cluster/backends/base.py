"""Protocol of a backend: submit, find, poll and cancel jobs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from montessori_core.errors import UserError

Task = list[int]  # shards that one job computes
AnyShard = TypeVar("AnyShard")


class SchedulerUnavailable(UserError):
    """The scheduler did not answer, or accepts no jobs at present; it may still have accepted some of these."""


class JobsRemain(UserError):
    """Jobs were not ended, or may not have been: the scheduler did not answer, or they still run."""


class Backend(Protocol):
    """Where jobs run. Job ids are strings that stay valid in later processes."""

    polls_until_lost: int
    """Consecutive polls that must not find a job before it counts as lost."""

    host: str | None
    """Host that a job belongs to, with the driver; None if any driver can find it."""

    steps: bool
    """Whether jobs are steps of a Slurm job."""

    def prepare(self) -> None:
        """Start slow preparations for the first job, without waiting for them."""
        ...

    def plan_jobs(
        self, shards: Sequence[int], free: int, avoid: frozenset[str], slow_node: str | None = None
    ) -> list[Task]:
        """Cut shards into the tasks to submit now, if `free` more jobs may run outside the nodes `avoid`; the others wait.

        Copies of slow shards may not run on `slow_node` either; unlike `avoid`, it is not excluded for other shards.
        """
        ...

    def submit(
        self, name: str, folder: Path, tasks: Sequence[Task], stage_folder: Path, at_once: int, avoid: frozenset[str]
    ) -> list[str]:
        """Submit one job per task under a unique name, excluding the nodes `avoid`; return the job ids.

        At most `at_once` of the jobs run at a time.

        Raises:
            SchedulerUnavailable: no answer, or no jobs accepted at present.
        """
        ...

    def can_run_outside(self, nodes: frozenset[str]) -> bool:
        """Return whether jobs can run on other nodes than these; true if the scheduler does not say."""
        ...

    def keep_away(self, ids: Sequence[str], nodes: frozenset[str]) -> None:
        """Keep those of these jobs that have not started away from `nodes`, and from no others that were given before.

        Nothing is changed if jobs may not run elsewhere, or the scheduler does not say.
        """
        ...

    def set_parallelism(self, ids: Sequence[str], at_once: int) -> None:
        """Change how many jobs of a submission may run at a time."""
        ...

    def find(self, name: str, folder: Path) -> list[str]:
        """Return the ids of jobs submitted under `name`, even if the submitter died before it recorded them.

        Raises:
            SchedulerUnavailable: no answer.
        """
        ...

    def alive(self, name: str, ids: Sequence[str]) -> set[str] | None:
        """Return the jobs of a submission that are running or will run; None if unknown at present."""
        ...

    def running(self, name: str, ids: Sequence[str]) -> set[str] | None:
        """Return the jobs of a submission that have started; None if unknown at present."""
        ...

    def cancel(self, ids: Sequence[str]) -> None:
        """End jobs, running or queued.

        Raises:
            JobsRemain: some may still run.
        """
        ...

    def exit_reason(self, job_id: str) -> str:
        """Describe why a job ended without a result."""
        ...

    def cancel_lost(self, job_id: str, kind: str) -> None:
        """Make sure that a lost job does not run again; `kind` is the class of its loss (`cluster.retry`)."""
        ...


def split_evenly(shards: Sequence[AnyShard], jobs: int) -> list[list[AnyShard]]:
    """Distribute shards evenly over at most `jobs` local jobs."""
    jobs = min(jobs, len(shards))
    return [list(shards[start::jobs]) for start in range(jobs)]


def split_for_array(shards: Sequence[AnyShard], at_once: int, most: int) -> list[list[AnyShard]]:
    """Distribute shards evenly over `at_once` array tasks, or over more so that none has more than `most` shards."""
    return split_evenly(shards, max(at_once, -(-len(shards) // most)))


def log_file(folder: Path, job_id: str) -> Path:
    """Return the path of the standard error of a job's first process; the file exists once the job has started."""
    return folder / f"{own_id(job_id)}_0_log.err"


def own_id(job_id: str) -> str:
    """Return the id by which a job knows itself: without the start time of a process."""
    return job_id.split(":")[0]
