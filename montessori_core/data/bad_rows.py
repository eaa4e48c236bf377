"""Rows that cannot be used: an error, or left out, counted by reason and listed in a file."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from montessori_core.errors import DataError
from montessori_core.files import commit

BAD_ROWS = "bad_rows.jsonl"


class RowError(DataError):
    """A row cannot be used; the rows after it can still be read.

    Attributes:
        place: file and line, row or entry.
        reason: what is wrong, in the same words for every such row, so that rows can be counted by it.
    """

    def __init__(self, place: str, problem: str, reason: str) -> None:
        """Describe the problem, with a remedy."""
        super().__init__(f"{place}: {problem}")
        self.place, self.problem, self.reason = place, problem, reason


@dataclass(frozen=True)
class BadRow:
    """A row that was left out.

    Attributes:
        set: the data set, such as 'reference'.
        place, reason, problem: see `RowError`.
    """

    set: str
    place: str
    reason: str
    problem: str


def count_reasons(rows: Iterable[BadRow]) -> str:
    """Return the numbers of rows by reason, the most frequent first: '2 field 'output' is empty, 1 not valid JSON'."""
    return ", ".join(f"{count:,} {reason}" for reason, count in Counter(row.reason for row in rows).most_common())


def write_bad_rows(rows: Sequence[BadRow], folder: Path) -> None:
    """Write rows that were left out to `bad_rows.jsonl` of a folder; without such rows, remove an earlier list."""
    path = folder / BAD_ROWS
    if not rows:
        path.unlink(missing_ok=True)
        return
    with commit(path) as temporary:
        lines = (json.dumps(vars(row), ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
