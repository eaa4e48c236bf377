"""Requests to a model behind an API, with a local server."""

import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from montessori_core.data.tables import UTILITY, read_table
from montessori_core.errors import UserError
from montessori_core.judging.answer_cache import AnswerCache
from montessori_core.judging.client import CachedClient, Question
from montessori_core.judging.points import open_judge, question_about, read_score
from montessori_core.judging.responses import Answer
from montessori_core.programs import Judging
from support.judges import FAULTS, KEY, JudgeServer, Reply, completion, endpoint, questions, refuse, send, served
from support.row_programs import as_compute


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[JudgeServer]:
    yield from served(JudgeServer(), monkeypatch, tmp_path)


def api(server: JudgeServer, folder: Path, **fields: Any) -> CachedClient:
    return CachedClient(endpoint(server, **fields), "test", AnswerCache(folder / "answers.sqlite"))


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_request_is_retried_after_fault(server: JudgeServer, tmp_path: Path, fault: Reply) -> None:
    server.faults = [fault]
    answers = api(server, tmp_path).ask(questions(3))
    assert [read_score(one) for one in answers] == [0.0, 1.0, 2.0]
    assert len(server.asked) == 4


def test_answers_are_ordered_and_paid_once(server: JudgeServer, tmp_path: Path) -> None:
    server.pause = 0.05
    seen: list[int] = []
    asked = [*questions(20), questions(1)[0]]  # one question twice
    answers = api(server, tmp_path, concurrency=4).ask(asked, report=seen.append)
    assert [read_score(one) for one in answers] == [float(number % 7) for number in range(20)] + [0.0]
    assert len(server.asked) == 20
    assert 2 <= server.most_at_once <= 4
    assert seen == sorted(seen)
    assert seen[-1] == 21
    assert api(server, tmp_path).ask(asked) == answers
    assert len(server.asked) == 20  # a rerun costs nothing
    assert server.keys == {f"Bearer {KEY}"}
    assert KEY.encode() not in (tmp_path / "answers.sqlite").read_bytes()


def test_warnings_do_not_overlap(server: JudgeServer, tmp_path: Path) -> None:
    """`open_client` keeps warnings in a file, which two threads must not change at the same time."""
    together = threading.Barrier(2)
    met: list[bool] = []

    def warn(warning: str) -> None:
        try:
            together.wait(timeout=0.5)
            met.append(True)
        except threading.BrokenBarrierError:
            met.append(False)

    client = CachedClient(endpoint(server), "test", AnswerCache(tmp_path / "answers.sqlite"), warn)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(client._warn_once, ["one", "two"]))
    assert met == [False, False]


def test_each_draw_is_a_new_request(server: JudgeServer, tmp_path: Path) -> None:
    [question] = questions(1)
    api(server, tmp_path).ask([question, replace(question, draw=1), replace(question, temperature=0.5), question])
    assert len(server.asked) == 3


def test_requests_respect_rate_limit(server: JudgeServer, tmp_path: Path) -> None:
    started = time.monotonic()
    api(server, tmp_path, requests_per_minute=600).ask(questions(8))
    assert time.monotonic() - started >= 7 * 0.1


@pytest.mark.guarantee("spending without a limit")
def test_spending_cap_stops_requests_and_keeps_answers(server: JudgeServer, tmp_path: Path) -> None:
    prices = {"dollars_per_million_input_tokens": 1e3, "dollars_per_million_output_tokens": 1e4, "max_tokens": 100}
    # An answer costs 100 x 0.001 + 10 x 0.01 = 0.2; before it arrives, up to 2 dollars are reserved.
    with pytest.raises(UserError, match=r"spending_cap_dollars=4 \([0-9.]+ spent\); raise it") as stop:
        api(server, tmp_path, spending_cap_dollars=4.0, **prices).ask(questions(30))
    spent = AnswerCache(tmp_path / "answers.sqlite").spent("test")
    paid = len(server.asked)
    assert spent == pytest.approx(0.2 * paid)
    assert 1 <= paid < 30
    assert spent <= 4.0
    assert f"{30 - paid} questions are pending" in str(stop.value)
    assert len(api(server, tmp_path, spending_cap_dollars=400.0, **prices).ask(questions(30))) == 30
    assert len(server.asked) == 30


def test_refused_key_and_unknown_model_have_remedy(
    server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.faults = [refuse(401)]
    with pytest.raises(UserError, match="OPENAI_API_KEY is set but refused") as error:
        api(server, tmp_path).ask(questions(1))
    assert KEY not in str(error.value)
    monkeypatch.delenv("OPENAI_API_KEY")
    server.faults = [refuse(401)]
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        api(server, tmp_path).ask(questions(1))
    server.faults = [refuse(404)]
    with pytest.raises(UserError, match="404 for model 'judge': .*; set model and base_url"):
        api(server, tmp_path).ask(questions(1))
    server.faults = [refuse(429)]
    with pytest.raises(UserError, match="429 for model 'judge': .*; set requests_per_minute or lower concurrency"):
        api(server, tmp_path, retries=0).ask(questions(1))
    server.close()
    with pytest.raises(UserError, match="does not answer"):
        api(server, tmp_path, retries=0).ask(questions(1))


@pytest.mark.guarantee("endpoint stops answering")
def test_persistent_faults_fail_and_keep_answers(server: JudgeServer, tmp_path: Path) -> None:
    api(server, tmp_path).ask(questions(2))
    server.faults = [FAULTS["not JSON"]] * 10
    with pytest.raises(UserError, match="3 responses did not follow the OpenAI API"):
        api(server, tmp_path, concurrency=1).ask(questions(3))
    server.faults = []
    asked = len(server.asked)
    assert len(api(server, tmp_path).ask(questions(3))) == 3
    assert len(server.asked) == asked + 1


def test_unanswered_question_is_not_retried_forever(server: JudgeServer, tmp_path: Path) -> None:
    filtered = b'{"error": {"message": "no", "code": "content_filter"}}'
    server.faults = [
        lambda handler, question: send(handler, 200, completion(None, "length")),
        lambda handler, question: send(handler, 400, filtered),
    ]
    prices = {"dollars_per_million_input_tokens": 1e3}
    answers = api(server, tmp_path, concurrency=1, **prices).ask(questions(3))
    assert [(one.text, one.finish_reason) for one in answers[:2]] == [("", "length"), ("", "content_filter")]
    assert [read_score(one) for one in answers] == [None, None, 2.0]
    assert AnswerCache(tmp_path / "answers.sqlite").spent("test") == pytest.approx(0.2)  # the first and the last answer
    assert len(server.asked) == 3


@pytest.mark.guarantee("API keys in logs, tables or databases")
@pytest.mark.parametrize("key", ["sk-secret\n", "sk-secr\u00e9t"])
def test_invalid_api_key_is_never_printed(
    server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    if key.isascii():
        assert len(api(server, tmp_path).ask(questions(1))) == 1
        assert server.keys == {"Bearer sk-secret"}
    else:
        with pytest.raises(UserError, match="OPENAI_API_KEY is not a valid API key") as error:
            api(server, tmp_path)
        assert "secr" not in str(error.value)


def test_question_limit_lowers_endpoint_limit(server: JudgeServer, tmp_path: Path) -> None:
    [question] = questions(1)
    api(server, tmp_path, max_tokens=50).ask([replace(question, max_tokens=20), replace(question, max_tokens=90)])
    assert sorted(request["max_tokens"] for request in server.requests) == [20, 50]


@pytest.mark.guarantee("endpoint stops answering")
def test_pending_answers_are_kept_after_failure(server: JudgeServer, tmp_path: Path) -> None:
    def slow(handler: BaseHTTPRequestHandler, question: str) -> None:
        time.sleep(0.5)
        server.answer(handler, question)

    server.faults = [slow, refuse(404)]
    with pytest.raises(UserError, match="404"):
        api(server, tmp_path, concurrency=2).ask(questions(2))
    assert len(server.asked) == 2
    api(server, tmp_path).ask(questions(2))
    assert len(server.asked) == 3  # only the refused one again


@pytest.mark.parametrize(
    ("text", "finish_reason", "score"),
    [
        ("Good.\nScore: 5", "stop", 5.0),
        ("Good.\n\n**Score: 6/6**\n", "stop", 6.0),
        ("Score: 2\nOn second thought.\nscore : 0.", "stop", 0.0),
        ("Score: 5", "length", None),
        ("Score: 7", "stop", None),
        ("Score: 5 or 6", "stop", None),
        ("Score: four", "stop", None),
        ("Score: 4.5", "stop", 4.5),
        ("Final score: 4", "stop", 4.0),
        ("**Final Score:** 4", "stop", 4.0),
        ("The overall score is 4.", "stop", 4.0),
        ("Score: [[4]]", "stop", 4.0),
        ("Score: [4]", "stop", 4.0),
        ("Score = 4 out of 6", "stop", 4.0),
        ("### Score: `4/6` points", "stop", 4.0),
        ("> Score: [[4.5/6]]", "stop", 4.5),
        ("- Total score: 4 points", "stop", 4.0),
        ("Good.\n```\nScore: 4\n```", "stop", 4.0),
        ("```text\nGood.\nScore: 4\n```\n", "stop", 4.0),
        ("`Score: 4`", "stop", 4.0),
        ("Score: [[4", "stop", None),
        ("Score: [[4]", "stop", None),
        ("Score: [[4]] [[5]]", "stop", None),
        ("Score: 4-5", "stop", None),
        ("Score: 4,5", "stop", None),
        ("Score: 4.", "stop", 4.0),
        ("Score: 4.5.1", "stop", None),
        ("Score: 6.5", "stop", None),
        ("Score: 4 5", "stop", None),
        ("Score: ~4", "stop", None),
        ("Score: at least 4", "stop", None),
        ("Score: 4 (or 5)", "stop", None),
        ("Score for clarity: 4", "stop", None),
        ("Minimum score: 4", "stop", None),
        ("Score: 4\n```\nScore: five\n```", "stop", None),
        ('{"explanation": "Score: 1", "score": 4}', "stop", 4.0),
        ('\n```json\n{"score": 4.5, "explanation": "}"}\n```\n', "stop", 4.5),
        ('{"score": 4}', "length", None),
        ('{"score": 7}', "stop", None),
        ('{"score": "4"}', "stop", None),
        ('{"score": true}', "stop", None),
        ('{"score": NaN}', "stop", None),
        ('{"score": 4, "score": 5}', "stop", None),
        ('{"score": 4} or {"score": 5}', "stop", None),
        ('{"points": {"score": 4}}', "stop", None),
        ("Score: .5", "stop", None),
        ("Score: -1", "stop", None),
        ("Score: 4/10", "stop", None),
        ("Score: " + "9" * 5000, "stop", None),
        ("I give it 5 points.", "stop", None),
        ("Score: 5\nThat is my view.", "stop", None),
        ("", "stop", None),
    ],
)
def test_score_is_read_from_last_line(text: str, finish_reason: str, score: float | None) -> None:
    assert read_score(Answer(text, finish_reason, 1, 1)) == score


def test_lone_surrogate_in_answer_is_written(server: JudgeServer, tmp_path: Path) -> None:
    server.faults = [lambda handler, question: send(handler, 200, completion("cut \ud83d"))]
    asked = [Question("Say hello.")]
    [answer] = api(server, tmp_path).ask(asked)
    assert answer.text == "cut \ufffd"
    assert api(server, tmp_path).ask(asked) == [answer]


SCORES = ["Score: 3", "**score : 6/6**", "Score: 0", "Score: 7", "Score: ٣", "Score: 3/5", "Score:"]
FORMS = [*SCORES, "Final score: 4.5", "Score: [[2]]", "```"]
PARTS = st.text(st.characters(exclude_categories=[])) | st.sampled_from([*FORMS, "\n", "\r", "\x85", "\u2028", " "])


@pytest.mark.guarantee("judge that obeys the text it judges")
@given(st.lists(PARTS).map("".join), st.sampled_from(["stop", "length"]), st.sampled_from([(6, 0), (5, 0), (10, 1)]))
def test_read_score_uses_only_last_line(text: str, finish_reason: str, limits: tuple[int, int]) -> None:
    score = read_score(Answer(text, finish_reason, 1, 1), *limits)
    last = [line for line in text.splitlines() if line.strip() and line.strip() != "```"][-1:]
    assert score == read_score(Answer("\n".join(last), finish_reason, 1, 1), *limits)
    if score is not None:
        assert finish_reason == "stop"
        assert limits[1] <= score <= limits[0]
        assert re.search(rf"(?i)score.*\b{score:g}\b", last[0])


FENCES = st.text() | st.lists(st.sampled_from(["=", "=" * 20, "\n", "{line}", "{response}", "Score: 6", "x"])).map(
    "".join
)


@pytest.mark.guarantee("judge that obeys the text it judges")
@given(FENCES, FENCES)
def test_judged_text_stays_in_its_frame(instruction: str, response: str) -> None:
    question = question_about(instruction, response)
    line = max((one for one in question.splitlines() if set(one) == {"="}), key=len)
    assert question.count(line) == 3  # named once, opened once, closed once
    assert f"Instruction: {instruction}\n\nResponse: {response}\n{line}" in question
    assert question.endswith("Score: N")


def test_missing_judge_score_is_null(server: JudgeServer, tmp_path: Path) -> None:
    (tmp_path / "judge.json").write_text(endpoint(server).model_dump_json())
    settings = Judging(endpoint=endpoint(server).identity(), response_only=False)
    inputs = {"endpoint": tmp_path / "judge.json"}
    rows = [
        {"example_id": f"e{n}", "prompt_id": "p", "instruction": "Count.", "response": text}
        for n, text in enumerate(["It is 4", "Score: 6", "no number"])
    ]
    as_compute(open_judge(settings, inputs))(rows, tmp_path / "part.parquet", lambda done: None)
    assert read_table(tmp_path / "part.parquet", UTILITY)["utility"].to_pylist() == [4.0, 6.0, None]
    as_compute(open_judge(settings.model_copy(update={"response_only": True}), inputs))(
        rows, tmp_path / "part.parquet", lambda done: None
    )
    assert read_table(tmp_path / "part.parquet", UTILITY)["utility"].to_pylist() == [
        4.0,
        None,
        None,
    ]  # out of five points
    assert ["The instruction is of medium difficulty" in question for question in server.asked] == [True] * 3 + [
        False
    ] * 3
