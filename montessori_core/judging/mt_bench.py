"""MT-Bench (Zheng et al., 2023): two-turn questions; a judge grades each answer from 1 to 10.

For questions of maths, coding and reasoning the judge sees a reference answer, since judges err when they solve these
themselves. Questions and references have the format of the published files. Prompts are this project's or FastChat's.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
from pydantic import AfterValidator, Field

from montessori_core import programs
from montessori_core.data.entries import Entry, Text, read_entries
from montessori_core.data.rows import DialogueRow
from montessori_core.data.tables import MT_BENCH
from montessori_core.errors import DataError
from montessori_core.judging.client import Question, open_client
from montessori_core.judging.frame import frame_texts, verdict_schema
from montessori_core.judging.points import read_score
from montessori_core.judging.published_prompts import MT_BENCH as PUBLISHED
from montessori_core.judging.responses import Answer
from montessori_core.models.thinking import without_thinking
from montessori_core.program import Recorder, Row, RowProgram

REFERENCE_GUIDED = ("math", "reasoning", "coding")
_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "stem": 0.1,
    "humanities": 0.1,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
}
_OTHER_TEMPERATURE = 0.7
_HIGHEST, _LOWEST = 10, 1
_RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]", re.ASCII), re.compile(r"\[(\d+\.?\d*)\]", re.ASCII))
_PUBLISHED_TOKENS = 2048
_CRITERIA = (
    "Weigh whether it is right, does what was asked, helps the person who asks, and goes as deep as the question needs; "
    "length by itself is no merit. 1 is an answer of no use, 5 one that helps in part, 10 one that leaves nothing to wish "
    "for."
)
_BY_REFERENCE = (
    " The reference shows what a right answer comes to: compare the result and each step with it. Another way to the same "
    "result is as good, a wrong result is not good."
)
_TASKS = {
    1: "You grade an assistant's answer to a question, from 1 to 10. ",
    2: "You grade the second of two answers that an assistant gave in a conversation, from 1 to 10. The first question and "
    "answer are there to understand the second by; grade the second answer alone. ",
}
_ENDING = """\
Say in at most four sentences what is good and what is wrong. Then end with one line of this form, N being a whole number:
Score: N"""

_Id = Annotated[str, Field(coerce_numbers_to_str=True)]


@dataclass(frozen=True)
class Dialogue:
    """A question with two turns.

    Attributes:
        id: question id in the file.
        category: 'writing', 'math', ...
        questions: the user's two messages.
        references: correct answers to both; empty unless the category is in `REFERENCE_GUIDED`.
    """

    id: str
    category: str
    questions: tuple[str, str]
    references: tuple[str, ...]

    @property
    def temperature(self) -> float:
        """FastChat's temperature for answers of the category (`temperature_config` in its `llm_judge/common.py`)."""
        return _TEMPERATURES.get(self.category, _OTHER_TEMPERATURE)


@dataclass(frozen=True)
class Score:
    """A mean score, 1 to 10, and its standard error over questions; None if there are too few.

    `judged` is the number of judgements in the mean, `unparsed` the number that could not be read.
    """

    mean: float | None
    standard_error: float | None
    judged: int
    unparsed: int


@dataclass(frozen=True)
class Summary:
    """Scores over questions and turns.

    Attributes:
        overall: over all judgements.
        by_turn: over the judgements of each turn.
        by_category: over the judgements of each category.
    """

    overall: Score
    by_turn: dict[int, Score]
    by_category: dict[str, Score]


def _cut_thinking(text: str) -> str:
    answer = without_thinking(text)
    if not answer:
        raise ValueError("it has thinking, but no answer")
    return answer


_Answer = Annotated[Text, AfterValidator(_cut_thinking)]


class _Question(Entry):
    question_id: _Id
    category: Text
    turns: tuple[Text, Text]


class _Choice(Entry):
    turns: tuple[_Answer, _Answer]


class _Reference(Entry):
    question_id: _Id
    choices: Annotated[list[_Choice], Field(min_length=1)]


def read_dialogues(questions: Path, references: Path | None) -> list[Dialogue]:
    """Read the questions and their references.

    Args:
        questions: file of objects with question_id, category and turns, the user's two messages.
        references: file of objects with question_id and choices; the first choice has turns, the two answers.

    Raises:
        DataError: a file cannot be used (the message names file, line and field), an id occurs twice, or a reference is
            missing (the message names the questions).
    """
    by_id = _by_id(read_entries(questions, _Question), questions)
    answers = _by_id(read_entries(references, _Reference), references) if references else {}
    guided = [id for id, question in by_id.items() if question.category in REFERENCE_GUIDED]
    missing = [id for id in guided if id not in answers]
    if missing:
        raise DataError(
            f"{references or questions}: no reference answer for the questions {', '.join(missing)}; questions of the "
            f"categories {', '.join(REFERENCE_GUIDED)} need one: give a file that has them"
        )
    return [
        Dialogue(id, question.category, question.turns, answers[id].choices[0].turns if id in guided else ())
        for id, question in by_id.items()
    ]


def judgements(dialogues: Iterable[Dialogue], answers: Mapping[str, tuple[str, str]]) -> list[DialogueRow]:
    """Return rows for `open_mt_bench_judge`: one per turn, with the conversation up to there.

    Args:
        dialogues: the questions.
        answers: question id -> the model's two answers.
    """
    return [
        {
            "question_id": dialogue.id,
            "category": dialogue.category,
            "turn": turn,
            "questions": list(dialogue.questions[:turn]),
            "answers": list(answers[dialogue.id][:turn]),
            "references": list(dialogue.references[:turn]),
        }
        for dialogue in dialogues
        for turn in (1, 2)
    ]


def question_about(row: DialogueRow) -> str:
    """Return this project's prompt about the last answer of a row of `judgements`."""
    sections = []
    for number, (question, answer) in enumerate(zip(row["questions"], row["answers"], strict=True), 1):
        sections += [(f"Question {number}", question), (f"The assistant's answer {number}", answer)]
    sections += [(f"Reference answer {number}", text) for number, text in enumerate(row["references"], 1)]
    return frame_texts(
        _TASKS[row["turn"]] + _CRITERIA + (_BY_REFERENCE if row["references"] else ""), sections, _ENDING
    )


def published_question(row: DialogueRow) -> Question:
    """Return FastChat's prompt about the last answer of a row of `judgements`, with FastChat's decoding."""
    prompt = PUBLISHED[row["turn"], bool(row["references"])]
    texts = {f"ref_answer_{number}": text for number, text in enumerate(row["references"], 1)}
    if row["turn"] == 1:
        texts |= {"question": row["questions"][0], "answer": row["answers"][0]}
    else:
        for number, pair in enumerate(zip(row["questions"], row["answers"], strict=True), 1):
            texts |= {f"question_{number}": pair[0], f"answer_{number}": pair[1]}
    return Question(prompt.fill(**texts), max_tokens=_PUBLISHED_TOKENS, system=prompt.system)


def read_rating(answer: Answer) -> float | None:
    """Return the first `[[rating]]` of an answer, else the first `[rating]`, as FastChat does; None if there is none.

    Unlike in FastChat, a rating out of range gives None.
    """
    match = next(filter(None, (pattern.search(answer.text) for pattern in _RATINGS)), None)
    rating = float(match[1]) if match else math.nan
    return rating if _LOWEST <= rating <= _HIGHEST else None


def open_mt_bench_judge(settings: programs.BenchmarkJudging, inputs: Mapping[str, Path]) -> RowProgram[DialogueRow]:
    """Open the judge's endpoint.

    Inputs: see `open_client`. The result is a table of schema `MT_BENCH`.
    """
    api, published = open_client(settings, inputs), settings.prompts == "published"

    def compute(rows: list[DialogueRow], recorder: Recorder) -> None:
        def receive(position: int, answer: Answer) -> None:
            row = rows[position]
            ids = {"question_id": row["question_id"], "category": row["category"], "turn": row["turn"]}
            score = read_rating(answer) if published else read_score(answer, _HIGHEST, _LOWEST)
            recorder.finish(position, [{**ids, "score": score}])

        schema = verdict_schema("score", range(_LOWEST, _HIGHEST + 1))
        questions = [
            published_question(row) if published else Question(question_about(row), schema=schema) for row in rows
        ]
        api.ask(questions, recorder.progress, receive, recorder.finished_before)

    return RowProgram(MT_BENCH, compute)


def summarize(table: pa.Table) -> Summary:
    """Compute mean scores from a table of schema `MT_BENCH`.

    The standard error is over questions: the two turns of a question are not independent and count as one draw.
    """
    rows = table.to_pylist()
    return Summary(
        overall=_score(rows),
        by_turn={turn: _score([row for row in rows if row["turn"] == turn]) for turn in (1, 2)},
        by_category={
            category: _score([row for row in rows if row["category"] == category])
            for category in dict.fromkeys(row["category"] for row in rows)
        },
    )


def _score(judgements: list[Row]) -> Score:
    rows = [row for row in judgements if row["score"] is not None]
    unparsed = len(judgements) - len(rows)
    if not rows:
        return Score(None, None, 0, unparsed)
    mean = sum(row["score"] for row in rows) / len(rows)
    deviations: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        deviations[row["question_id"]] += row["score"] - mean
    count = len(deviations)
    if count == 1:
        return Score(mean, None, len(rows), unparsed)
    squares = sum(deviation**2 for deviation in deviations.values())
    return Score(mean, math.sqrt(squares * count / (count - 1)) / len(rows), len(rows), unparsed)


def _by_id(entries: list[Any], path: Path) -> dict[str, Any]:
    by_id = {entry.question_id: entry for entry in entries}
    if len(by_id) < len(entries):
        ids = [entry.question_id for entry in entries]
        duplicates = sorted({id for id in ids if ids.count(id) > 1})
        raise DataError(f"{path}: field question_id: {', '.join(duplicates)} occurs more than once; ids must differ")
    return by_id
