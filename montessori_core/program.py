"""What a job runs: a *program*, opened once with its settings, then applied to one shard after another.

A program is named `module:function`. The function loads what every shard needs (a resident model) and returns the
compute function. Programs get plain data and know neither the scheduler nor the driver.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

Row = dict[str, Any]
Report = Callable[[float], None]
"""Called with the number of rows (or steps) done so far; a fraction counts rows that are being computed."""

Compute = Callable[[list[Row], Path, Report], None]
"""Computes a shard's rows and writes the result to a path that does not exist yet: a file or a folder."""


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
class RowProgram:
    """A program whose rows do not depend on each other.

    Attributes:
        schema: of the table that the rows become.
        compute: called with rows and a recorder; `position` is the index into these rows. After an interruption it is
            called with those that were not finished.
    """

    schema: pa.Schema
    compute: Callable[[list[Row], Recorder], None]


Program = Callable[[Mapping[str, Any], Mapping[str, Path]], Compute | RowProgram]
"""Opens a stage from its settings and its input paths."""


def load_program(name: str) -> Program:
    """Import the function that `module:function` names."""
    module, _, function = name.partition(":")
    program: Program = getattr(importlib.import_module(module), function)
    return program
