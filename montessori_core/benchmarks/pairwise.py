"""Two answers to one instruction, compared by a judge in both orders (Section 4.1, Evaluation Methods).

A judge that prefers whatever stands first contradicts itself when the order is turned round: disagreement is a tie.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from montessori_core import programs
from montessori_core.api import Answer, Question, open_api
from montessori_core.benchmarks.framing import framed
from montessori_core.judging import last_line
from montessori_core.program import Recorder, Row, RowProgram
from montessori_core.schema import PAIRWISE

Preference = Literal["A", "B", "tie"]
Outcome = Literal["win", "loss", "tie", "unparsed"]

_VERDICT = re.compile(r"^[\s*_#]*better[\s*_]*:[\s*_]*(?:(A)|(B)|(tie))[\s*_.]*$", re.IGNORECASE | re.ASCII)
_WORTH: dict[Outcome, float | None] = {"win": 1.0, "loss": 0.0, "tie": 0.5, "unparsed": None}
_TASK = (
    "You compare two answers, A and B, to one instruction. The better one serves the person who gave the instruction "
    "better: it does what was asked, what it says is right, and nothing that matters is missing. Neither the order of "
    "the answers nor their length counts by itself."
)
_ENDING = """\
Say in at most three sentences where they differ in what matters. Then end with one of these three lines:
Better: A
Better: B
Better: tie"""


def comparison(instruction: str, first: str, second: str) -> str:
    """What a judge is asked about two answers, in this order."""
    return framed(_TASK, [("Instruction", instruction), ("Answer A", first), ("Answer B", second)], _ENDING)


def read_preference(answer: Answer) -> Preference | None:
    """The verdict that a judge ended with; None if there is none, and never a guess.

    An answer that was cut off, or whose last line is not one of the three that were asked for, has none.
    """
    found = _VERDICT.match(last_line(answer) or "")
    if found is None:
        return None
    return "A" if found[1] else "B" if found[2] else "tie"


def outcome_of(first: Preference | None, second: Preference | None) -> Outcome:
    """How an answer fares.

    Args:
        first: the verdict where it stood as A.
        second: the verdict where it stood as B.
    """
    if first is None or second is None:
        return "unparsed"
    if (first, second) == ("A", "B"):
        return "win"
    if (first, second) == ("B", "A"):
        return "loss"
    return "tie"


def open_pairwise_judge(settings: programs.Asked, inputs: Mapping[str, Path]) -> RowProgram:
    """Open the judge's endpoint.

    Inputs: see `open_api`. Rows: `id`, `instruction`, `answer`, `other`. The result is a table of schema
    `PAIRWISE`: how `answer` fares against `other`.
    """
    api = open_api(settings, inputs)

    def compute(rows: list[Row], recorder: Recorder) -> None:
        verdicts: dict[int, Preference | None] = {}

        def receive(number: int, answer: Answer) -> None:
            verdicts[number] = read_preference(answer)
            position = number // 2
            if {2 * position, 2 * position + 1} <= verdicts.keys():
                outcome = outcome_of(verdicts[2 * position], verdicts[2 * position + 1])
                recorder.finish(position, [_record(rows[position], outcome)])

        orders = [
            comparison(row["instruction"], *pair)
            for row in rows
            for pair in ((row["answer"], row["other"]), (row["other"], row["answer"]))
        ]
        api.ask([Question(text) for text in orders], lambda answered: recorder.progress(answered / 2), receive)

    return RowProgram(PAIRWISE, compute)


def _record(row: Row, outcome: Outcome) -> Row:
    return {
        "question_id": row["id"],
        "outcome": outcome,
        "preference": _WORTH[outcome],
        "characters": len(row["answer"]),
        "other_characters": len(row["other"]),
    }
