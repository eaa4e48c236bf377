"""The ledger: which jobs were submitted for a stage, and which of them may still be at work."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field as Bound
from pydantic import TypeAdapter, ValidationError

from cluster.backends import backend_at
from montessori_core.config import Cluster
from montessori_core.errors import UserError
from montessori_core.files import read_json, write_json

log = logging.getLogger(__name__)


_Index = Annotated[int, Bound(ge=0)]
_JobId = Annotated[str, Bound(pattern=r"^[0-9]{1,10}(_[0-9]{1,10}|:[0-9]{1,12}(\.[0-9]{1,12})?)?$")]


@dataclass
class Submission:
    """Jobs that were started together, as the ledger has them.

    Attributes:
        name: of the jobs; no other submission has it.
        work: hash of the keys of all shards: what the jobs were started for.
        tasks: the shards of each job.
        host: whose processes the jobs are; None for jobs of Slurm.
        at_once: how many of the jobs the scheduler may run at a time.
        gpus: that each job was given.
        ids: of the jobs; None until the scheduler has answered.
        missed: looks in a row at which a job was not found.
        lost: class of the loss of each job that went and left shards to be submitted again.
        closed: no job is left.
    """

    name: str
    work: str
    tasks: list[list[_Index]]
    host: str | None
    at_once: int
    gpus: int = 0
    ids: list[_JobId] | None = None
    missed: dict[str, int] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    closed: bool = False


def _read_submissions(file: Path) -> list[Submission]:
    try:
        submissions = TypeAdapter(list[Submission]).validate_python(read_json(file))
        matched = all(one.ids is None or len(one.ids) == len(one.tasks) for one in submissions)
    except ValidationError:
        matched = False
    if not matched:
        # Taken for empty, it would have jobs that are still at work started a second time.
        raise UserError(
            f"{file}: damaged, so that nobody knows which jobs may still be at work. End those that are (Slurm: squeue --me, "
            "names that begin with montessori-; local: cluster.supervisor or submitit), then remove the file and "
            "resume the run: what is done is kept"
        )
    return submissions


class Ledger:
    """The submissions of a stage, on disk before and after each is made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)  # submitit keeps pickles here
        self._file = folder / "ledger.json"
        self.submissions = _read_submissions(self._file) if self._file.exists() else []

    def save(self) -> None:
        """Write the ledger."""
        write_json([vars(submission) for submission in self.submissions], self._file)

    def open_submissions(self) -> list[Submission]:
        """Submissions that may still have jobs."""
        return [submission for submission in self.submissions if not submission.closed]


def close_submission(submission: Submission, cluster: Cluster, ledger: Ledger) -> None:
    """End the jobs of a submission, those whose ids were never noted included."""
    backend = backend_at(submission.host, cluster)
    if backend is None:
        # Commits are atomic, and the first result of a shard counts: they do no harm.
        log.warning("jobs named %s may run on, as processes of %s", submission.name, submission.host)
    elif submission.ids is None:
        backend.cancel(backend.find(submission.name, ledger.folder / submission.name))
        submission.tasks = []  # a scheduler may refuse for days, and the ledger is written again at every turn
    else:
        backend.cancel(submission.ids)
    submission.closed = True
    ledger.save()
