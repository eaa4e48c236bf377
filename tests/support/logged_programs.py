"""Two programs that log the rows they compute; the second reads a part of the first."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from montessori_core.config import Section
from montessori_core.program import Compute, Program, Report, Row


class NumberRow(TypedDict):
    """A number."""

    n: int


class LogSettings(Section):
    """The log file of the programs."""

    log: str


def open_doubling(settings: LogSettings, inputs: Mapping[str, Path]) -> Compute[Any]:
    """Write twice the number of each row."""
    return _open(settings, "doubling", 0)


def open_adding(settings: LogSettings, inputs: Mapping[str, Path]) -> Compute[Any]:
    """Add the number of each row to the output of the first program."""
    return _open(settings, "adding", int(inputs["doubled"].read_text()))


def _open(settings: LogSettings, name: str, start: int) -> Compute[Any]:
    def compute(rows: list[Row], output: Path, report: Report) -> None:
        with Path(settings.log).open("a") as log:
            log.write(f"{name}\n")
        output.write_text(str(start + sum(2 * row["n"] for row in rows)))

    return compute


DOUBLING = Program("doubling", 1, f"{__name__}:open_doubling", LogSettings, NumberRow, "evaluation", ".txt")
ADDING = Program("adding", 1, f"{__name__}:open_adding", LogSettings, NumberRow, "evaluation", ".txt")
