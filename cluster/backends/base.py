"""What a backend does: start jobs, find them again, look at them, end them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from montessori_core.errors import UserError

Task = list[int]  # shards that one job works through
AnyShard = TypeVar("AnyShard")


class SchedulerUnavailable(UserError):
    """The scheduler did not answer, or takes no job at present; it may have taken some all the same."""


class Backend(Protocol):
    """Where jobs run. Job ids are texts that any later process can use."""

    polls_until_lost: int
    """Looks in a row at which a job must be missing before it counts as lost."""

    def prepare(self) -> None:
        """Begin what takes seconds before the first job can start, without waiting for it."""
        ...

    def group(self, shards: Sequence[int], free: int) -> list[Task]:
        """Cut shards into the tasks to submit now, if so many more may run; the rest waits."""
        ...

    def submit(
        self, name: str, folder: Path, tasks: Sequence[Task], stage_folder: Path, at_once: int, avoid: frozenset[str]
    ) -> list[str]:
        """Start one job a task under a name that no other submission has, on other nodes than `avoid`; return their ids.

        At most `at_once` of them run at a time.

        Raises:
            SchedulerUnavailable: for now.
        """
        ...

    def set_parallelism(self, ids: Sequence[str], at_once: int) -> None:
        """Let more jobs of a submission run at a time."""
        ...

    def find(self, name: str, folder: Path) -> list[str]:
        """Ids of jobs submitted under `name`, even if the submitter died before it could note them.

        Raises:
            SchedulerUnavailable: it is silent.
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


def split_evenly(shards: Sequence[AnyShard], jobs: int) -> list[list[AnyShard]]:
    """Shards by local job: dealt evenly to at most so many."""
    jobs = min(jobs, len(shards))
    return [list(shards[start::jobs]) for start in range(jobs)]


def split_for_array(shards: Sequence[AnyShard], at_once: int, most: int) -> list[list[AnyShard]]:
    """Shards by task of an array: dealt evenly to as many as run at once, to more where one would have more than `most`."""
    return split_evenly(shards, max(at_once, -(-len(shards) // most)))


def log_file(folder: Path, job_id: str) -> Path:
    """Standard error of a job's first process; it is there once the job has begun."""
    return folder / f"{job_id.split(':')[0]}_0_log.err"
