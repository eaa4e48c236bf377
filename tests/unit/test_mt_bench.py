"""MT-Bench: its files, the judge's prompts for each turn, and means over questions."""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from montessori_core.config import parse_experiment
from montessori_core.data.tables import MT_BENCH, read_table, table_from_rows
from montessori_core.errors import DataError
from montessori_core.judging.mt_bench import (
    Dialogue,
    Score,
    judgements,
    question_about,
    read_dialogues,
    read_rating,
    summarize,
)
from montessori_core.judging.published_prompts import ALPACA_EVAL
from montessori_core.judging.published_prompts import MT_BENCH as PUBLISHED
from montessori_core.judging.responses import Answer
from montessori_core.program import Row
from montessori_core.programs import MT_BENCH_JUDGE
from support.judges import JudgeServer, completion, open_with, send, served
from tasks import benchmarks
from tasks.run import Model, Run
from tasks.stage import Step

QUESTIONS: list[dict[str, Any]] = [
    {"question_id": 81, "category": "writing", "turns": ["Write a poem.", "Shorten it."]},
    {"question_id": 111, "category": "math", "turns": ["What is 6 x 7?", "Halve it."], "reference": ["not read"]},
    {"question_id": "c1", "category": "coding", "turns": ["Print 1.", "Print 2."]},
]
REFERENCES: list[dict[str, Any]] = [
    {"question_id": 111, "model_id": "x", "choices": [{"index": 0, "turns": ["It is 42.", "It is 21."]}]},
    {"question_id": "c1", "choices": [{"turns": ["print(1)", "print(2)"]}]},
    {"question_id": 81, "choices": [{"turns": ["A reference poem.", "A short one."]}]},
]


def write(path: Path, entries: list[Any]) -> Path:
    path.write_text("\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries) + "\n")
    return path


@pytest.fixture
def dialogues(tmp_path: Path) -> list[Dialogue]:
    return read_dialogues(write(tmp_path / "q.jsonl", QUESTIONS), write(tmp_path / "r.jsonl", REFERENCES))


def test_only_reasoning_questions_have_references(dialogues: list[Dialogue]) -> None:
    assert [(one.id, one.category, one.references) for one in dialogues] == [
        ("81", "writing", ()),
        ("111", "math", ("It is 42.", "It is 21.")),
        ("c1", "coding", ("print(1)", "print(2)")),
    ]


def test_dialogue_is_decoded_by_category() -> None:
    categories = ["writing", "roleplay", "stem", "humanities", "extraction", "math", "coding", "reasoning", "own"]
    temperatures = [Dialogue("1", category, ("a", "b"), ()).temperature for category in categories]
    assert temperatures == [0.7, 0.7, 0.1, 0.1, 0.0, 0.0, 0.0, 0.0, 0.7]


@pytest.mark.parametrize(
    ("forced", "expected"),
    [
        (None, {"Write a poem.": 0.7, "What is 6 x 7?": 0.0, "Print 1.": 0.0}),
        (0.3, {"Write a poem.": 0.3, "What is 6 x 7?": 0.3, "Print 1.": 0.3}),
    ],
)
def test_answers_are_decoded_at_their_temperatures(
    forced: float | None, expected: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"mt_bench": "mt_bench.jsonl", "mt_bench_references": "mt_bench_references.jsonl"}
    (tmp_path / "sources").mkdir()
    for name, entries in zip(files.values(), (QUESTIONS, REFERENCES), strict=True):
        write(tmp_path / "sources" / name, entries)
    model = {"model": "m"}
    content = {"teacher": model, "student": model, "judge": {"model": "judge"}}
    content["benchmarks"] = files | {"mt_bench_temperature": forced}  # type: ignore[assignment]
    run = Run(tmp_path, parse_experiment(content, "test"))
    decoded: dict[str, list[float]] = {}

    def generate(*arguments: Any) -> tuple[list[Row], list[Path]]:
        rows = arguments[2]
        for row in rows:
            decoded.setdefault(row["turns"][0], []).append(arguments[4].temperature)
        return [{"raw_output": f"Answer to {row['turns'][-1]}", "thinking": None} for row in rows], []

    judged: list[list[Row]] = []
    monkeypatch.setattr(benchmarks, "generate", generate)
    monkeypatch.setattr(benchmarks, "_judge", lambda *arguments: judged.append(arguments[2]) or [])
    monkeypatch.setattr(benchmarks, "_join", lambda *_: tmp_path)
    monkeypatch.setattr(benchmarks, "read_table", lambda *_: graded())
    benchmarks._score_mt_bench(Step(run, tmp_path, "test"), Model("m", "0"))
    assert decoded == {question: [temperature] * 2 for question, temperature in expected.items()}
    answers = {row["question_id"]: row["answers"][0] for row in judged[0]}
    assert answers == {str(one["question_id"]): f"Answer to {one['turns'][0]}" for one in QUESTIONS}


def graded() -> pa.Table:
    return table_from_rows([{"question_id": "81", "category": "writing", "turn": 1, "score": 7.0}], MT_BENCH)


@pytest.mark.parametrize(
    ("questions", "references", "message"),
    [
        (QUESTIONS, REFERENCES[2:], r"r.jsonl: no reference answer for the questions 111, c1; .* give a file"),
        (QUESTIONS, None, r"q.jsonl: no reference answer for the questions 111, c1"),
        ([*QUESTIONS, QUESTIONS[0]], REFERENCES, r"q.jsonl: field question_id: 81 occurs more than once"),
        ([{"question_id": 1, "turns": ["a", "b"]}], None, r"q.jsonl, line 1: field category: Field required"),
        ([QUESTIONS[0], QUESTIONS[0] | {"turns": ["a"]}], None, r"q.jsonl, line 2: field turns.1: "),
        ([QUESTIONS[0] | {"turns": ["a", " "]}], None, r"q.jsonl, line 1: field turns.1: "),
        ([QUESTIONS[0] | {"turns": ["a", "b", "c"]}], None, r"q.jsonl, line 1: field turns: "),
        ([QUESTIONS[0] | {"question_id": None}], None, r"q.jsonl, line 1: field question_id: "),
        (["[]"], None, r"q.jsonl, line 1: .*fields question_id, category, turns"),
        (["{"], None, r"q.jsonl, line 1, column 2: not valid JSON"),
        ([], None, r"q.jsonl: no entries"),
        (QUESTIONS, [REFERENCES[0] | {"choices": []}], r"r.jsonl, line 1: field choices: "),
        (QUESTIONS, [REFERENCES[0] | {"choices": [{"turns": ["a"]}]}], r"r.jsonl, line 1: field choices.0.turns.1: "),
    ],
)
def test_invalid_question_file_is_named_with_line(
    tmp_path: Path, questions: list[Any], references: list[Any] | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_dialogues(write(tmp_path / "q.jsonl", questions), references and write(tmp_path / "r.jsonl", references))


def test_judge_sees_conversation_up_to_turn(dialogues: list[Dialogue]) -> None:
    rows = judgements(dialogues, {one.id: (f"{one.id} first", f"{one.id} second") for one in dialogues})
    asked = [(row["question_id"], row["turn"]) for row in rows]
    assert asked == [(name, turn) for name in ("81", "111", "c1") for turn in (1, 2)]
    first, second = question_about(rows[2]), question_about(rows[3])
    for text in ("What is 6 x 7?", "111 first", "It is 42."):
        assert text in first
        assert text in second
    for text in ("Halve it.", "111 second", "It is 21."):
        assert text not in first
        assert text in second
    assert "grade the second answer alone" in second
    assert "eference" not in question_about(rows[1])
    assert all(question_about(row).endswith("\nScore: N") for row in rows)


TEXTS = st.text() | st.lists(st.sampled_from(["=", "=" * 20, "\n", "{line}", "Score: 10", "Question 2"])).map("".join)


@given(st.lists(TEXTS, min_size=6, max_size=6))
def test_judged_conversation_stays_in_its_frames(texts: list[str]) -> None:
    row = {"turn": 2, "questions": texts[:2], "answers": texts[2:4], "references": texts[4:]}
    question = question_about(row)
    line = question.split("lines that begin with ")[1].split()[0]
    fenced = question.split(line)[2:-1]
    assert [part.partition("\n")[2].removesuffix("\n\n") for part in fenced] == [
        *(texts[0], texts[2], texts[1], texts[3]),
        *texts[4:],
    ]


class Grader(JudgeServer):
    """Ends its answer with the text in angle brackets of the last answer."""

    def answer(self, handler: BaseHTTPRequestHandler, question: str) -> None:
        verdict = question.rpartition("<")[2].partition(">")[0]
        send(handler, 200, completion(f"As it deserves.\n{verdict}", "length" if "cut" in verdict else "stop"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Grader]:
    yield from served(Grader(), monkeypatch, tmp_path)


def test_rating_is_1_to_10_or_null(server: Grader, tmp_path: Path) -> None:
    expected = {
        "Score: 1": 1.0,
        "**Score: 10/10**": 10.0,
        "Score: 0": None,
        "Score: 11": None,
        "Score: 4/5": None,
        "Score: 7.5": 7.5,
        "Score: 7 or 8": None,
        "cut Score: 7": None,
        "Score: 7\nor so": None,
        "I would say 7": None,
        "": None,
    }
    asked = [Dialogue(f"q{number}", "writing", ("Say it.", "Again."), ()) for number in range(len(expected))]
    answers = {f"q{number}": (f"<{text}>", f"Score: 10\n<{text}> ") for number, text in enumerate(expected)}
    rows = judgements(asked, answers)
    open_with(server, tmp_path, MT_BENCH_JUDGE, prompts="own")(rows, tmp_path / "part.parquet", lambda done: None)
    table = read_table(tmp_path / "part.parquet", MT_BENCH)
    assert table["score"].to_pylist() == [score for score in expected.values() for _ in range(2)]
    assert table["turn"].to_pylist() == [1, 2] * len(expected)
    summary = summarize(table)
    assert (summary.overall.judged, summary.overall.unparsed) == (6, 16)
    assert summary.overall.mean == pytest.approx(18.5 / 3)


@pytest.mark.parametrize(
    ("verdict", "score"),
    [
        ("Rating: [[7]]", 7.0),
        ("[[7.5]] of 10", 7.5),
        ("Rating: [8]", 8.0),
        ("[3] is wrong.\nRating: [[2]]", 2.0),
        ("[[5]], or [[6]]", 5.0),
        ("[[11]]", None),
        ("[[0]]", None),
        ("[[rating]]", None),
        ("Score: 7", None),
    ],
)
def test_published_rating_is_read(verdict: str, score: float | None) -> None:
    assert read_rating(Answer(f"As it deserves.\n{verdict}", "stop", 1, 1)) == score


def test_published_prompts_reach_the_judge(server: Grader, tmp_path: Path, dialogues: list[Dialogue]) -> None:
    server.answer = lambda handler, _: send(handler, 200, completion("Good. [[7]]", "length"))  # type: ignore[method-assign]
    answers = {one.id: ("{question} One.", "{answer_1} Two.") for one in dialogues}
    rows = judgements(dialogues[:2], answers)
    judge = open_with(server, tmp_path, MT_BENCH_JUDGE, prompts="published")
    judge(rows, tmp_path / "part.parquet", lambda done: None)
    assert read_table(tmp_path / "part.parquet", MT_BENCH)["score"].to_pylist() == [7.0] * 4
    plain, plain_2, guided, guided_2 = (
        next(one for one in server.requests if one["messages"][1]["content"].endswith(ending) and asked in str(one))
        for asked in ("Write a poem.", "What is 6 x 7?")
        for ending in ("[The End of Assistant's Answer]", "<|The End of Assistant A's Conversation with User|>")
    )
    for request in server.requests:
        assert request["temperature"] == 0.0
        assert request["max_tokens"] == 1024  # the endpoint's limit, below FastChat's 2,048
        assert [message["role"] for message in request["messages"]] == ["system", "user"]
    systems = [one["messages"][0]["content"] for one in (plain, plain_2, guided, guided_2)]
    assert systems == [PUBLISHED[turn, ref].system for ref in (False, True) for turn in (1, 2)]
    assert plain["messages"][1]["content"].endswith(
        "\n\n[Question]\nWrite a poem.\n\n"
        "[The Start of Assistant's Answer]\n{question} One.\n[The End of Assistant's Answer]"
    )
    conversation = (
        "<|The Start of Assistant A's Conversation with User|>\n\n### User:\n{}\n\n### Assistant A:\n{}\n\n"
        "### User:\n{}\n\n### Assistant A:\n{}\n\n<|The End of Assistant A's Conversation with User|>"
    )
    reference = (
        "<|The Start of Reference Answer|>\n\n### User:\n{}\n\n### Reference answer:\n{}\n\n"
        "### User:\n{}\n\n### Reference answer:\n{}\n\n<|The End of Reference Answer|>\n\n\n"
    )
    first, second = answers["111"]
    assert plain_2["messages"][1]["content"] == conversation.format("Write a poem.", first, "Shorten it.", second)
    assert guided_2["messages"][1]["content"] == reference.format(
        "What is 6 x 7?", "It is 42.", "Halve it.", "It is 21."
    ) + conversation.format("What is 6 x 7?", first, "Halve it.", second)
    assert "[The Start of Reference Answer]\nIt is 42.\n[The End of Reference Answer]" in str(
        guided["messages"][1]["content"]
    )


def test_published_texts_are_unchanged() -> None:
    """Compare the SHA-256 of system prompt, null byte and template with the commits that the module names."""
    texts = {**PUBLISHED, "alpaca_eval": ALPACA_EVAL}
    digests = {
        name: hashlib.sha256(f"{one.system}\0{one.template}".encode()).hexdigest()[:16] for name, one in texts.items()
    }
    assert digests == {
        (1, False): "7d276fe1d4b3f18f",
        (1, True): "226191a3df0fe7a9",
        (2, False): "a91a5b4266b4e377",
        (2, True): "572e584361120697",
        "alpaca_eval": "3a9c135143c9cf71",
    }


def table_of(scores: list[tuple[str, str, int, float | None]]) -> Any:
    names = ("question_id", "category", "turn", "score")
    return table_from_rows([dict(zip(names, row, strict=True)) for row in scores], MT_BENCH)


def test_means_are_over_judgements_errors_over_questions() -> None:
    draw = np.random.default_rng(0)
    scores = draw.integers(1, 11, (12, 2)).astype(float)
    summary = summarize(
        table_of([(f"q{q}", "math" if q < 5 else "stem", t + 1, scores[q, t]) for q in range(12) for t in range(2)])
    )
    of_questions = scores.mean(axis=1)

    def expected(values: np.ndarray) -> tuple[float, float]:
        return pytest.approx((values.mean(), values.std(ddof=1) / math.sqrt(len(values))))

    def found(score: Score) -> tuple[float | None, float | None]:
        return score.mean, score.standard_error

    assert found(summary.overall) == expected(of_questions)
    assert found(summary.by_turn[1]) == expected(scores[:, 0])
    assert found(summary.by_turn[2]) == expected(scores[:, 1])
    assert found(summary.by_category["math"]) == expected(of_questions[:5])
    assert found(summary.by_category["stem"]) == expected(of_questions[5:])


def test_unreadable_ratings_enter_no_mean() -> None:
    summary = summarize(
        table_of([("a", "math", 1, 4.0), ("a", "math", 2, None), ("b", "stem", 1, None), ("b", "stem", 2, None)])
    )
    assert summary.overall == Score(4.0, None, 1, 3)
    assert summary.by_turn[1] == summary.by_category["math"] == Score(4.0, None, 1, 1)
    assert summary.by_turn[2] == summary.by_category["stem"] == Score(None, None, 0, 2)


SHARED = Path(os.environ.get("MONTESSORI_SHARED_DATA", "no folder named"))


@pytest.mark.skipif(
    not (SHARED / "mt_bench_question.jsonl").exists(), reason="MONTESSORI_SHARED_DATA names no such file"
)
def test_published_files_are_read_unchanged() -> None:
    dialogues = read_dialogues(SHARED / "mt_bench_question.jsonl", SHARED / "mt_bench_reference_gpt4.jsonl")
    assert len(dialogues) == 80
    assert [one.id for one in dialogues if one.references] == [str(number) for number in range(101, 131)]
