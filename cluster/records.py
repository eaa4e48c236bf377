"""The JSON records that a stage, its jobs and its driver keep on disk.

A record that is missing, truncated or of another kind reads as None; whoever needs it does the work again.
"""

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from montessori_core.files import read_json

_Amount = Annotated[int, Field(ge=0, lt=10**30)]
_Number = Annotated[float, Field(ge=0.0, lt=1e15)]


class Record(BaseModel):
    """A JSON object of known fields."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class Description(Record):
    """A stage as its workers read it, and how its rows are cut; see `cluster.stage.Stage`.

    Earlier versions recorded no `key_values`.
    """

    program: str
    version: int
    entry: str
    settings: dict[str, Any]
    settings_type: str | None
    inputs: dict[str, str]
    input_hashes: dict[str, str]
    suffix: str
    kind: str = ""
    key_values: dict[str, dict[str, Any]] | None = None
    check_gpus: bool = True
    rows: Annotated[int, Field(ge=0, lt=10**10)]
    rows_per_shard: Annotated[int, Field(ge=1, lt=10**10)]
    shards: Annotated[int, Field(ge=1, lt=10**7)]


class Manifest(Record):
    """A finished shard: its key and rows, bytes and hash of its result, and what it cost."""

    key: str
    rows: _Amount
    bytes: _Amount
    sha256: str
    job_id: str
    opening: _Number = 0.0
    seconds: _Number
    row_seconds: _Number | None = None
    flops: _Amount


class ShardProgress(Record):
    """Progress of a running shard: rows done, in fractions, seconds per row, and its job.

    Without `row_seconds`, the job has done none of the rows yet: others were done before.
    """

    done: _Number
    row_seconds: _Number | None = None
    job_id: str = ""


class DraftRows(Record):
    """State of unfinished rows by their position in the shard: JSON text, and its hash."""

    drafts: str
    sha256: str


class Failure(Record):
    """Why a shard failed.

    `opening` is true if the program failed to open, or to load at the shard's rows; `loading` only for the latter. `node` is
    that of the process that failed; earlier versions recorded neither.
    """

    job_id: str
    attempt: str
    kind: str = Field(alias="class")
    opening: bool
    loading: bool = False
    node: str | None = None
    error: str
    traceback: str

    @staticmethod
    def none(job_id: str) -> "Failure":
        """Return the record of a job that reported no failure."""
        return Failure.model_validate(
            {"job_id": job_id, "attempt": "", "class": "", "opening": False, "error": "", "traceback": ""}
        )


class JobStart(Record):
    """The node where a job last started, and how often Slurm had requeued it before."""

    node: str
    restarts: _Amount


AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_record(path: Path, kind: type[AnyRecord]) -> AnyRecord | None:
    """Read a record; None if it is missing, truncated or of another kind."""
    try:
        return kind.model_validate(read_json(path))
    except ValidationError:
        return None
