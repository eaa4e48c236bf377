"""A judge compares two answers to one instruction, in both orders (Section 4, Evaluation Methods).

A judge that always prefers the first answer contradicts itself in the reverse order: disagreement counts as a tie.

With AlpacaEval's published prompt, the judge names the better output in one token; the token's probability is the
preference. AlpacaEval asks in one order, drawn at random; the mean over both orders is its expected value.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, cast

from montessori_core import programs
from montessori_core.data.rows import ComparisonRow
from montessori_core.data.tables import PAIRWISE
from montessori_core.judging.client import Question, open_client
from montessori_core.judging.frame import frame_texts, last_line, verdict_field, verdict_schema
from montessori_core.judging.published_prompts import ALPACA_EVAL
from montessori_core.judging.responses import Answer
from montessori_core.program import Recorder, Row, RowProgram

Preference = Literal["A", "B", "tie"]
Outcome = Literal["win", "loss", "tie", "unparsed"]

_VERDICT = re.compile(
    r"^[\s*_#`>-]*better(?:\s+(?:answer|one))?[\s*_`]*:[\s*_`]*(?P<open>\[{0,2})"
    r"(?:(?:answer\s+)?(?:(?P<A>A)|(?P<B>B))|(?P<tie>tie))(?P<close>\]{0,2})[\s*_`.]*$",
    re.IGNORECASE | re.ASCII,
)
_PREFERENCES: dict[Outcome, float | None] = {"win": 1.0, "loss": 0.0, "tie": 0.5, "unparsed": None}
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
    """Return this project's prompt about two answers, in this order."""
    return frame_texts(_TASK, [("Instruction", instruction), ("Answer A", first), ("Answer B", second)], _ENDING)


def read_preference(answer: Answer) -> Preference | None:
    """Return the judge's verdict, or None if the answer is truncated or has none.

    It is the last line, or the field `better` of an answer that is a JSON object.
    """
    field = verdict_field(answer, "better")
    if field in ("A", "B", "tie"):
        return cast(Preference, field)
    match = _VERDICT.match(last_line(answer) or "")
    if match is None or len(match["open"]) != len(match["close"]):
        return None
    return "A" if match["A"] else "B" if match["B"] else "tie"


def published_comparison(instruction: str, first: str, second: str) -> Question:
    """Return AlpacaEval's prompt about two outputs, with the decoding of `weighted_alpaca_eval_gpt4_turbo`."""
    text = ALPACA_EVAL.fill(instruction=instruction, output_1=first, output_2=second)
    return Question(text, temperature=1.0, max_tokens=1, system=ALPACA_EVAL.system, likeliest=5)


def read_probability(answer: Answer) -> float | None:
    """Return the probability that the first output is better, as AlpacaEval's `logprob_parser` reads it.

    It is the probability of token `m` relative to `M`; a token that is not among the likeliest counts as 0. Without
    log-probabilities the sampled token decides, which has the same mean. None if neither token occurs.
    """
    likeliest = {answer.text.strip(): 0.0} if answer.first_token is None else answer.first_token
    first, second = (likeliest.get(name, -math.inf) for name in ("m", "M"))
    larger = max(first, second)
    if larger == -math.inf:
        return None
    return math.exp(first - larger) / (math.exp(first - larger) + math.exp(second - larger))


def outcome_of(first: Preference | None, second: Preference | None) -> Outcome:
    """Return the outcome for an answer that was judged in both positions.

    Args:
        first: the verdict with the answer as A.
        second: the verdict with the answer as B.
    """
    if first is None or second is None:
        return "unparsed"
    if (first, second) == ("A", "B"):
        return "win"
    if (first, second) == ("B", "A"):
        return "loss"
    return "tie"


def open_pairwise_judge(settings: programs.BenchmarkJudging, inputs: Mapping[str, Path]) -> RowProgram[ComparisonRow]:
    """Open the judge's endpoint.

    Inputs: see `open_client`. The result is a table of schema `PAIRWISE`: the outcome of `answer` against `other`.
    """
    api, published = open_client(settings, inputs), settings.prompts == "published"

    def question(*texts: str) -> Question:
        if published:
            return published_comparison(*texts)
        return Question(comparison(*texts), schema=verdict_schema("better", ("A", "B", "tie")))

    def compute(rows: list[ComparisonRow], recorder: Recorder) -> None:
        answers: dict[int, Answer] = {}

        def receive(number: int, answer: Answer) -> None:
            answers[number] = answer
            position = number // 2
            if {2 * position, 2 * position + 1} <= answers.keys():
                pair = answers[2 * position], answers[2 * position + 1]
                judged = _by_probability(*pair) if published else _by_verdict(*pair)
                recorder.finish(position, [_record(rows[position], *judged)])

        questions = [
            question(row["instruction"], *pair)
            for row in rows
            for pair in ((row["answer"], row["other"]), (row["other"], row["answer"]))
        ]
        before = 2 * recorder.finished_before
        api.ask(questions, lambda answered: recorder.progress(answered / 2), receive, before)

    return RowProgram(PAIRWISE, compute)


def _by_verdict(first: Answer, second: Answer) -> tuple[Outcome, float | None]:
    outcome = outcome_of(read_preference(first), read_preference(second))
    return outcome, _PREFERENCES[outcome]


def _by_probability(first: Answer, second: Answer) -> tuple[Outcome, float | None]:
    as_first, as_second = read_probability(first), read_probability(second)
    outcome = outcome_of(_preferred(as_first), _preferred(as_second))
    if as_first is None or as_second is None:
        return outcome, None
    return outcome, (as_first + 1.0 - as_second) / 2.0


def _preferred(probability: float | None) -> Preference | None:
    if probability is None:
        return None
    return "tie" if probability == 0.5 else "A" if probability > 0.5 else "B"


def _record(row: ComparisonRow, outcome: Outcome, preference: float | None) -> Row:
    return {
        "question_id": row["question_id"],
        "outcome": outcome,
        "preference": preference,
        "characters": len(row["answer"]),
        "other_characters": len(row["other"]),
    }
