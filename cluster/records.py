"""What a stage, its jobs and its driver note on disk, and how it is read back.

A note that is missing, not whole, or not of its kind counts as not there: what it would have said is then found out, or
done, again.
"""

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from montessori_core.files import read_json

_Amount = Annotated[int, Field(ge=0, lt=10**30)]
_Seconds = Annotated[float, Field(ge=0.0, lt=1e15)]
_Rows = Annotated[float, Field(ge=0.0, lt=1e15)]


class Record(BaseModel):
    """A JSON object of known fields."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class Description(Record):
    """A stage, as its workers are told of it, and how its rows are cut; see `cluster.stage.Stage`."""

    program: str
    version: int
    entry: str
    settings: dict[str, Any]
    settings_type: str | None
    inputs: dict[str, str]
    input_hashes: dict[str, str]
    suffix: str
    kind: str = ""
    rows: Annotated[int, Field(ge=0, lt=10**10)]
    rows_per_shard: Annotated[int, Field(ge=1, lt=10**10)]
    shards: Annotated[int, Field(ge=1, lt=10**7)]


class Manifest(Record):
    """That a shard is done: its key and rows, bytes and hash of its result, and what that took."""

    key: str
    rows: _Amount
    bytes: _Amount
    sha256: str
    job_id: str
    opening: _Seconds = 0.0
    seconds: _Seconds
    row_seconds: _Seconds | None = None
    flops: _Amount


class ShardProgress(Record):
    """How many rows of a shard at work are done, in fractions, and how long its job takes for one."""

    done: _Rows
    row_seconds: _Seconds | None = None


class DraftRows(Record):
    """State of rows that a program has not finished, by position in the shard: JSON as text, and a hash of it."""

    drafts: str
    sha256: str


class Failure(Record):
    """Why a shard failed; `opening` says that the program could not even be opened."""

    job_id: str
    attempt: str
    kind: str = Field(alias="class")
    opening: bool
    error: str
    traceback: str


class JobStart(Record):
    """Where a job started last, and how often Slurm had put it back into the queue before."""

    node: str
    restarts: _Amount


AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_record(path: Path, kind: type[AnyRecord]) -> AnyRecord | None:
    """Read a note; None if it is missing, not whole, or not of its kind."""
    try:
        return kind.model_validate(read_json(path))
    except ValidationError:
        return None
