"""Pairwise comparison: a judge compares two answers in both orders (Section 4.1, Evaluation Methods).

A judge with a position bias contradicts itself when the order is reversed: disagreement is a tie.

With AlpacaEval's published prompt the judge names the better output in one token, and the token's probability is the
preference. AlpacaEval asks in one random order; the mean over both orders is its expectation.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from montessori_core import programs
from montessori_core.data.rows import ComparisonRow
from montessori_core.data.tables import PAIRWISE
from montessori_core.judging.client import Answer, Question, open_client
from montessori_core.judging.frame import framed, last_line
from montessori_core.judging.published_prompts import ALPACA_EVAL
from montessori_core.program import Recorder, Row, RowProgram

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
    """Return the judge's prompt for two answers, in this order."""
    return framed(_TASK, [("Instruction", instruction), ("Answer A", first), ("Answer B", second)], _ENDING)


def read_preference(answer: Answer) -> Preference | None:
    """Return the verdict on the last line of a judge's answer.

    None if the answer was cut off, or its last line is not one of the three verdicts of the prompt.
    """
    verdict = _VERDICT.match(last_line(answer) or "")
    if verdict is None:
        return None
    return "A" if verdict[1] else "B" if verdict[2] else "tie"


def published_comparison(instruction: str, first: str, second: str) -> Question:
    """Return AlpacaEval's question about two outputs, decoded as `weighted_alpaca_eval_gpt4_turbo` decodes it."""
    text = ALPACA_EVAL.fill(instruction=instruction, output_1=first, output_2=second)
    return Question(text, temperature=1.0, max_tokens=1, system=ALPACA_EVAL.system, likeliest=5)


def read_probability(answer: Answer) -> float | None:
    """Return the probability that the first output is the better one, as AlpacaEval's `logprob_parser` reads it.

    It is the probability of token `m` against token `M`; a token that is not among the likeliest has probability 0. Without
    log-probabilities the sampled token decides, which has the same expectation. None if neither token occurs.
    """
    likeliest = {answer.text.strip(): 0.0} if answer.first_token is None else answer.first_token
    first, second = (likeliest.get(name, -math.inf) for name in ("m", "M"))
    most = max(first, second)
    if most == -math.inf:
        return None
    return math.exp(first - most) / (math.exp(first - most) + math.exp(second - most))


def outcome_of(first: Preference | None, second: Preference | None) -> Outcome:
    """Return the outcome of an answer.

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

    Inputs: see `open_client`. The result is a table of schema `PAIRWISE`: how each `answer` fares against its `other`.
    """
    api, published = open_client(settings, inputs), settings.prompts == "published"

    def question(*texts: str) -> Question:
        return published_comparison(*texts) if published else Question(comparison(*texts))

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
        api.ask(questions, lambda answered: recorder.progress(answered / 2), receive)

    return RowProgram(PAIRWISE, compute)


def _by_verdict(first: Answer, second: Answer) -> tuple[Outcome, float | None]:
    outcome = outcome_of(read_preference(first), read_preference(second))
    return outcome, _WORTH[outcome]


def _by_probability(first: Answer, second: Answer) -> tuple[Outcome, float | None]:
    chances = read_probability(first), read_probability(second)
    outcome = outcome_of(*map(_likelier, chances))
    if chances[0] is None or chances[1] is None:
        return outcome, None
    return outcome, (chances[0] + 1.0 - chances[1]) / 2.0


def _likelier(chance: float | None) -> Preference | None:
    if chance is None:
        return None
    return "tie" if chance == 0.5 else "A" if chance > 0.5 else "B"


def _record(row: ComparisonRow, outcome: Outcome, preference: float | None) -> Row:
    return {
        "question_id": row["question_id"],
        "outcome": outcome,
        "preference": preference,
        "characters": len(row["answer"]),
        "other_characters": len(row["other"]),
    }
