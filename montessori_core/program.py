"""A job runs a *program*: it opens the program once with its settings, then applies it to its shards in order.

Programs are declared in `montessori_core.programs`. A program's entry loads what every shard needs, such as a model, and
returns the function that computes a shard. It knows neither the scheduler nor the driver.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import pyarrow as pa
from pydantic import BaseModel

Kind = Literal["generation", "training", "teacher_update", "influence", "evaluation", "judging"]
"""A section of `cluster.resources`."""

Row = dict[str, Any]
"""A row of a result. Rows that a program computes are typed, see `montessori_core.data.rows`."""
Report = Callable[[float], None]
"""Called with the number of rows (or steps) that are done; rows that are being computed count in fractions."""

RowT = TypeVar("RowT")
Compute = Callable[[list[RowT], Path, Report], None]
"""Computes a shard's rows and writes the result, a file or a folder, to a path that does not exist yet."""


class NotOpened(Exception):
    """A program that loads its model at its first rows did not load it: it computes no shard here, or not these rows."""


class ProcessLost(Exception):
    """A process that a program had started has ended, and the program does not know why: it may have been killed."""


class Recorder(Protocol):
    """Records the results of a shard's rows, in any order; they are committed every 30 seconds.

    Only `progress` and `keep` commit: rows that are finished between two such calls, as those of a batch, are committed
    together or not at all.

    Attributes:
        drafts: state of unfinished rows that an earlier job kept, by position.
        finished_before: number of the shard's rows that an earlier job finished.
    """

    drafts: Mapping[int, Any]
    finished_before: int

    def finish(self, position: int, records: list[Row]) -> None:
        """Record that the row at `position` is done, and its records in the result table."""
        ...

    def keep(self, drafts: Callable[[], Mapping[int, Any]]) -> None:
        """Offer the state of unfinished rows, as JSON values by position.

        It may be called after every decoding step: `drafts` is evaluated only when a commit is due.
        """
        ...

    def progress(self, done: float) -> None:
        """Report how many of the program's rows are done; rows that are being computed count in fractions.

        Call it before the first row and at least after each finished row or batch. The first call tells where the program
        starts: drafts and cached answers do not count for its pace.
        """
        ...


@dataclass(frozen=True)
class RowProgram(Generic[RowT]):
    """A program whose rows are independent of each other; `RowT` is their type.

    Attributes:
        schema: of the result table.
        compute: called with rows and a recorder, which counts positions among these rows. After an interruption it is called
            with the unfinished rows.
    """

    schema: pa.Schema
    compute: Callable[[list[RowT], Recorder], None]


SettingsT = TypeVar("SettingsT", bound=BaseModel)


@dataclass(frozen=True)
class Program(Generic[SettingsT]):
    """The declaration of a program.

    Attributes:
        name: part of every shard's key; never renamed.
        version: part of the key; raised when results change for equal settings, inputs and rows.
        entry: `module:function` that opens the program on a node with its settings and the paths of its inputs. It is not
            part of the key: code may move.
        settings: their type; validated on the driver and on the node.
        rows: their type, a TypedDict of `montessori_core.data.rows`.
        kind: the section of `cluster.resources` that its jobs use.
        suffix: of a shard's result: '.parquet' for a table, '' for a folder.
        key_values: settings that do not decide results, by section, with the values that keys have in their place.
    """

    name: str
    version: int
    entry: str
    settings: type[SettingsT]
    rows: type
    kind: Kind
    suffix: str = ".parquet"
    key_values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def open_program(
    entry: str, settings_type: str | None, settings: Mapping[str, Any], inputs: Mapping[str, Path]
) -> Compute[Any] | RowProgram[Any]:
    """Open a program on a node.

    Args:
        entry: see `Program`.
        settings_type: `module:class` that validates the settings; None passes them unchanged.
        settings: plain data.
        inputs: path of each input, by its name; `shared` is a folder of all jobs with the same settings and inputs, which may
            not exist yet and is removed after the last job.
    """
    validated = load(settings_type).model_validate(settings) if settings_type else settings
    opened: Compute[Any] | RowProgram[Any] = load(entry)(validated, inputs)
    return opened


def load(name: str) -> Any:
    """Import the object that `module:name` names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
