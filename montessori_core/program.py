"""What a job runs: a *program*, opened once with its settings, then applied to one shard after another.

A program is declared once, see `montessori_core.programs`. Its entry loads what every shard needs (a resident model) and
returns the compute function. Entries know neither the scheduler nor the driver.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import pyarrow as pa
from pydantic import BaseModel

Kind = Literal["generation", "training", "teacher_update", "influence", "evaluation", "judging"]
"""A section of `cluster.resources`."""

Row = dict[str, Any]
Report = Callable[[float], None]
"""Called with the number of rows (or steps) done so far; a fraction counts rows that are being computed."""

RowT = TypeVar("RowT")
Compute = Callable[[list[RowT], Path, Report], None]
"""Computes a shard's rows, all of a kind, and writes the result to a path that does not exist yet: a file or a folder."""


class Recorder(Protocol):
    """Takes the results of a shard's rows as they come, in any order; a lost job loses at most a minute of them.

    What was recorded is committed during `progress` and `keep`, never in between: rows that are finished without a call
    of these, such as those of a batch, are committed together or not at all.

    Attributes:
        drafts: state that an earlier job kept of rows it did not finish, by position.
    """

    drafts: Mapping[int, Any]

    def finish(self, position: int, records: list[Row]) -> None:
        """Record that the row at `position` is done, and the records of the table that it became."""
        ...

    def keep(self, drafts: Callable[[], Mapping[int, Any]]) -> None:
        """Offer the state of unfinished rows, as JSON values by position.

        Call it as often as you like, after every decoding step: it is evaluated only when a commit is due.
        """
        ...

    def progress(self, done: float) -> None:
        """Report how many of the rows given to the program are done; a fraction counts rows that are being computed.

        Call it before the first row and after others were finished, or more often. The first call says where the program
        starts: drafts and cached answers are no part of its pace.
        """
        ...


@dataclass(frozen=True)
class RowProgram(Generic[RowT]):
    """A program whose rows do not depend on each other; `RowT` is their kind.

    Attributes:
        schema: of the table that the rows become.
        compute: called with rows and a recorder; `position` is the index into these rows. After an interruption it is
            called with those that were not finished.
    """

    schema: pa.Schema
    compute: Callable[[list[RowT], Recorder], None]


SettingsT = TypeVar("SettingsT", bound=BaseModel)


@dataclass(frozen=True)
class Program(Generic[SettingsT]):
    """The declaration of a program.

    Attributes:
        name: enters the key of every shard; it is never renamed.
        version: enters the key; raised when results change for equal settings, inputs and rows.
        entry: `module:function`, which opens the program on a node with its settings and the paths of its inputs. It does not
            enter the key: code may move.
        settings: what the program is opened with, validated on the driver and on the node.
        rows: their kind, a TypedDict of `montessori_core.data.rows`.
        kind: which resources its jobs get.
        suffix: of a shard's result: '.parquet' for a table, '' for a folder.
    """

    name: str
    version: int
    entry: str
    settings: type[SettingsT]
    rows: type
    kind: Kind
    suffix: str = ".parquet"


def open_program(
    entry: str, settings_type: str | None, settings: Mapping[str, Any], inputs: Mapping[str, Path]
) -> Compute[Any] | RowProgram[Any]:
    """Open a program on the node that computes it.

    Args:
        entry: see `Program`.
        settings_type: `module:class` that validates the settings; None hands them over as they are.
        settings: plain data.
        inputs: paths by the names that the entry knows them by.
    """
    validated = load(settings_type).model_validate(settings) if settings_type else settings
    opened: Compute[Any] | RowProgram[Any] = load(entry)(validated, inputs)
    return opened


def load(name: str) -> Any:
    """Import what `module:name` names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
