"""The ledger: the jobs submitted for a stage, and which of them may still be running."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field as Bound
from pydantic import TypeAdapter, ValidationError

from cluster.backends import backend_at
from cluster.backends.base import Backend
from montessori_core.config import Cluster
from montessori_core.errors import UserError
from montessori_core.files import is_copy, make_folder_of_pickles, read_json, write_json

log = logging.getLogger(__name__)


_Index = Annotated[int, Bound(ge=0)]
_JobId = Annotated[str, Bound(pattern=r"^[0-9]{1,10}(_[0-9]{1,10}|:[0-9]{1,12}(\.[0-9]{1,12})?)?$")]


@dataclass
class Submission:
    """Jobs that were submitted together: an entry of the ledger.

    Attributes:
        name: unique name of the jobs.
        work: hash of the keys of all shards of the stage at submission.
        tasks: shards of each job.
        host: host of local jobs and of the steps of an allocation; None for Slurm jobs.
        at_once: how many of the jobs the scheduler may run at a time.
        gpus: GPUs of each job.
        steps: whether the jobs are steps of a Slurm job, each started by an srun process of `host`; None if unknown: earlier
            versions did not record it.
        ids: ids of the jobs; None until the scheduler has answered.
        missed: consecutive polls that did not find a job, by job id.
        lost: class of the loss, by id, of each lost job whose shards were submitted again.
        closed: whether all jobs have ended.
        folder: resolved folder of the ledger at submission.
    """

    name: str
    work: str
    tasks: list[list[_Index]]
    host: str | None
    at_once: int
    gpus: int = 0
    steps: bool | None = None
    ids: list[_JobId] | None = None
    missed: dict[str, int] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    closed: bool = False
    folder: str | None = None


def _read_submissions(file: Path) -> list[Submission]:
    try:
        submissions = TypeAdapter(list[Submission]).validate_python(read_json(file))
        consistent = all(entry.ids is None or len(entry.ids) == len(entry.tasks) for entry in submissions)
    except ValidationError:
        consistent = False
    if not consistent:
        # Treating it as empty would start running jobs a second time.
        raise UserError(
            f"{file} is corrupt: cannot tell which jobs are still running. End them (Slurm: squeue --me, names that "
            f"begin with montessori-{file.parent.parent.name}-; local: processes of cluster.supervisor, cluster.step or "
            f"submitit whose command has {file.parent}), then remove the file and "
            "resume the run; finished shards are kept"
        )
    return submissions


class Ledger:
    """The submissions of a stage, saved before and after each submission."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / "ledger.json"
        self.submissions = _read_submissions(self._file) if self._file.exists() else []
        for submission in self.submissions:
            # Jobs of another run, of which this is a copy, write their results there: they are neither awaited nor ended.
            submission.closed = submission.closed or is_copy(folder, submission.folder)

    def save(self) -> None:
        """Write the ledger, in a folder that only its owner may write: submitit keeps pickles there."""
        make_folder_of_pickles(self.folder)
        write_json([vars(submission) for submission in self.submissions], self._file)

    def open_submissions(self) -> list[Submission]:
        """Submissions that may still have jobs."""
        return [submission for submission in self.submissions if not submission.closed]


def close_submissions(ledger: Ledger, cluster: Cluster, submissions: Sequence[Submission] | None = None) -> int:
    """End the jobs of open submissions, by default of all, even if their ids were never recorded; return their number.

    Jobs of one backend end together: each may take a while. An error of one does not keep those of others from ending.

    Raises:
        JobsRemain: some jobs may still run; their submissions stay open.
        SchedulerUnavailable: it cannot be asked for jobs without recorded ids.
        OSError: the ledger cannot be written.
    """
    submissions = ledger.open_submissions() if submissions is None else submissions
    places: dict[tuple[str | None, bool | None], list[Submission]] = {}
    for submission in submissions:
        places.setdefault((submission.host, submission.steps), []).append(submission)
    problems: list[UserError | OSError] = []
    for (host, steps), group in places.items():
        try:
            _end_jobs(group, backend_at(host, steps, cluster), ledger.folder)
            for submission in group:
                submission.closed = True
            ledger.save()
        except (UserError, OSError) as error:
            problems.append(error)
    if problems:
        raise problems[0]
    return len(submissions)


def _end_jobs(submissions: Sequence[Submission], backend: Backend | None, folder: Path) -> None:
    """End the jobs of submissions of one backend; None if they are processes of another host."""
    if backend is None:
        # They do no harm: commits are atomic, the first result of a shard counts, and one with another key is dropped.
        for submission in submissions:
            log.warning("jobs named %s may still run on host %s", submission.name, submission.host)
        return
    backend.cancel([job_id for submission in submissions for job_id in submission.ids or []])
    for submission in submissions:
        if submission.ids is None:
            backend.cancel(backend.find(submission.name, folder / submission.name))
            submission.tasks = []  # keep the ledger small: a scheduler may reject submissions for days
