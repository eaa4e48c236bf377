"""Servers that follow the OpenAI API loosely: parameters they refuse, questions they do not answer, forms of answers."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from montessori_core.config import Endpoint, Sampling
from montessori_core.data.tables import GENERATION, MT_BENCH, PAIRWISE, UTILITY, read_table
from montessori_core.errors import UserError
from montessori_core.judging.answer_cache import AnswerCache
from montessori_core.judging.client import CachedClient, Question, warnings_file
from montessori_core.judging.points import read_score
from montessori_core.program import Row
from montessori_core.programs import API_GENERATION, JUDGE, MT_BENCH_JUDGE, PAIRWISE_JUDGE
from support.judges import Judge, JudgeServer, completion, endpoint, open_with, questions, send, served

Problem = Callable[[dict[str, Any]], tuple[int, Any] | None]
PRICES = {"dollars_per_million_input_tokens": 1.0, "dollars_per_million_output_tokens": 0.0}


class StrictServer(Judge):
    """A judge for all prompts that refuses requests with a problem."""

    def __init__(self) -> None:
        super().__init__()
        self.problem: Problem = lambda request: None

    def answer(self, handler: BaseHTTPRequestHandler, question: str) -> None:
        request = next(request for request in reversed(self.requests) if request["messages"][-1]["content"] == question)
        problem = self.problem(request)
        if problem is not None:
            return send(handler, problem[0], json.dumps(problem[1]).encode())
        if question.startswith("You grade training"):
            return JudgeServer.answer(self, handler, question)
        if question.startswith(("You grade", "You compare", "I require")):
            return super().answer(handler, question)
        return send(handler, 200, completion(f"An answer to: {question}"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StrictServer]:
    yield from served(StrictServer(), monkeypatch, tmp_path)


def client(server: JudgeServer, folder: Path, warnings: list[str], **fields: Any) -> CachedClient:
    return CachedClient(endpoint(server, **fields), "test", AnswerCache(folder / "answers.sqlite"), warnings.append)


def openai_error(message: str, **fields: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", **fields}}


def refuse_if(name: str, status: int, body: Any) -> Problem:
    return lambda request: (status, body) if name in request else None


UNSUPPORTED = "Unsupported parameter: '{}' is not supported with this model."
REFUSED_PARAMETERS: dict[str, tuple[str, int, Any]] = {
    "openai max_tokens": (
        "max_tokens",
        400,
        openai_error(
            UNSUPPORTED.format("max_tokens") + " Use 'max_completion_tokens' instead.",
            param="max_tokens",
            code="unsupported_parameter",
        ),
    ),
    "openai temperature": (
        "temperature",
        400,
        openai_error(
            "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported.",
            param="temperature",
            code="unsupported_value",
        ),
    ),
    "top_p": ("top_p", 400, openai_error("`temperature` and `top_p` cannot both be specified for this model.")),
    "grok": ("presence_penalty", 400, {"code": "invalid", "error": "Argument not supported: presence_penalty"}),
    "mistral": (
        "presence_penalty",
        422,
        {
            "detail": [
                {"type": "extra_forbidden", "loc": ["body", "presence_penalty"], "msg": "Extra inputs", "input": 0}
            ]
        },
    ),
}


@pytest.mark.parametrize("case", REFUSED_PARAMETERS)
def test_refused_parameter_is_left_out_and_named_once(case: str, server: StrictServer, tmp_path: Path) -> None:
    name, status, body = REFUSED_PARAMETERS[case]
    server.problem = refuse_if(name, status, body)
    warnings: list[str] = []
    answers = client(server, tmp_path, warnings, concurrency=4).ask(questions(12))
    assert [read_score(answer) for answer in answers] == [float(number % 7) for number in range(12)]
    assert len(server.requests) <= 12 + 4  # at most one refusal for each concurrent request
    [warning] = warnings
    assert f"refuses {name}" in warning
    if name == "max_tokens":
        assert server.requests[-1]["max_completion_tokens"] == 1024


def test_all_optional_parameters_are_dispensable(server: StrictServer, tmp_path: Path) -> None:
    allowed = {"model", "messages", "max_completion_tokens"}

    def refuse(request: dict[str, Any]) -> tuple[int, Any] | None:
        unknown = sorted(request.keys() - allowed)
        return (400, openai_error(UNSUPPORTED.format(unknown[0]), param=unknown[0])) if unknown else None

    server.problem = refuse
    warnings: list[str] = []
    asked = [Question("Say hello.", likeliest=5), Question("Say no.", likeliest=5)]
    answers = client(server, tmp_path, warnings, concurrency=1).ask(asked)
    assert [answer.text for answer in answers] == ["An answer to: Say hello.", "An answer to: Say no."]
    assert server.requests[-1].keys() == allowed
    assert len(warnings) == 5  # log-probabilities are one


def test_parameters_are_set_and_omitted(server: StrictServer, tmp_path: Path) -> None:
    parameters = {"temperature": None, "presence_penalty": None, "top_p": 0.5, "reasoning_effort": "low"}
    client(server, tmp_path, [], parameters=parameters, token_limit="max_completion_tokens").ask(questions(1))
    [request] = server.requests
    del request["model"], request["messages"]
    assert request == {"max_completion_tokens": 1024, "top_p": 0.5, "reasoning_effort": "low"}
    client(server, tmp_path, [], token_limit="none").ask(questions(1))
    assert not {"max_tokens", "max_completion_tokens"} & server.requests[-1].keys()
    assert len({json.dumps(endpoint(server, **fields).identity()) for fields in ({}, {"parameters": parameters})}) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parameters": {"max_tokens": 5}}, "parameters.max_tokens: set max_tokens and token_limit"),
        ({"parameters": {"stream": True}}, "parameters.stream"),
        ({"token_limit": "none", "spending_cap_dollars": 1.0, **PRICES}, "needs a limit of tokens"),
        (
            {"spending_cap_dollars": 1.0, "dollars_per_million_input_tokens": 1.0},
            "needs dollars_per_million_input_tokens and dollars_per_million_output_tokens",
        ),
    ],
)
def test_conflicting_parameters_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Endpoint(model="judge", **fields)


def test_refused_configured_parameter_fails(server: StrictServer, tmp_path: Path) -> None:
    server.problem = refuse_if("top_p", 400, openai_error(UNSUPPORTED.format("top_p"), param="top_p"))
    with pytest.raises(UserError, match="'top_p' is not supported.*to null in the section's parameters"):
        client(server, tmp_path, [], parameters={"top_p": 0.5}).ask(questions(1))


TOO_LONG = "This model's maximum context length is 512 tokens. However, you requested 9000 tokens"
REFUSED_QUESTIONS: dict[str, tuple[str, int, Any]] = {
    "openai context": ("context", 400, openai_error(TOO_LONG, param="messages", code="context_length_exceeded")),
    "vllm": ("context", 400, openai_error(TOO_LONG, type="BadRequestError", param=None, code=400)),
    "vllm input": ("context", 400, openai_error(TOO_LONG, type="BadRequestError", param="input_tokens", code=400)),
    "vllm max_tokens": (
        "context",
        400,
        openai_error(
            "'max_tokens' or 'max_completion_tokens' is too large: 1024. This model's maximum context length is 512 tokens "
            "and your request has 400 input tokens",
            param="max_tokens",
            code=400,
        ),
    ),
    "old vllm": ("context", 400, {"object": "error", "message": TOO_LONG, "type": "BadRequestError", "code": 400}),
    "sglang": (
        "context",
        400,
        {
            "object": "error",
            "message": "The input (9000 tokens) is longer than the model's context length (512 tokens).",
        },
    ),
    "llama.cpp": (
        "context",
        400,
        openai_error("the request exceeds the available context size", code=400, type="exceed_context_size_error"),
    ),
    "tgi": ("context", 422, {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 512"}),
    "anthropic": ("context", 400, openai_error("prompt is too long: 208310 tokens > 200000 maximum")),
    "proxy": ("context", 413, {"error": "Payload"}),
    "azure": ("filter", 400, openai_error("The response was filtered", param="prompt", code="content_filter")),
    "openai flag": (
        "filter",
        400,
        openai_error("Invalid prompt: your prompt was flagged as potentially violating our usage policy."),
    ),
    "openrouter": (
        "filter",
        403,
        openai_error(
            "Your chosen model requires moderation and your input was flagged for violence.",
            code=403,
            metadata={"flagged_input": "temperature"},
        ),
    ),
    "deepseek": ("filter", 400, openai_error("Content Exists Risk")),
}


@pytest.mark.parametrize("case", REFUSED_QUESTIONS)
def test_refused_question_is_unanswered_and_counted(case: str, server: StrictServer, tmp_path: Path) -> None:
    kind, status, body = REFUSED_QUESTIONS[case]
    server.problem = lambda request: (status, body) if "number 3." in request["messages"][-1]["content"] else None
    warnings: list[str] = []
    received: dict[int, str] = {}
    reports: list[int] = []
    judge = client(server, tmp_path, warnings)
    answers = judge.ask(questions(8), reports.append, lambda position, answer: received.update({position: answer.text}))
    assert [read_score(answer) for answer in answers] == [0.0, 1.0, 2.0, None, 4.0, 5.0, 6.0, 0.0]
    assert {"context": "context_length_exceeded", "filter": "content_filter"}[kind] == answers[3].finish_reason
    assert sorted(received) == list(range(8))
    assert reports[-1] == 8
    [warning] = warnings
    assert "does not answer 1 of 8 questions (1 " + {"context": "too long", "filter": "refused"}[kind] in warning
    server.problem = lambda request: None  # now with a longer context: asked again, once
    assert client(server, tmp_path, []).ask(questions(8))[3].text.endswith("Score: 3")
    assert len(server.requests) == 9


def test_share_of_unanswered_questions_is_bounded(server: StrictServer, tmp_path: Path) -> None:
    _, status, body = REFUSED_QUESTIONS["vllm"]
    numbers = {"number 1.", "number 2.", "number 3.", "number 4.", "number 5.", "number 6."}
    server.problem = lambda request: (
        (status, body) if any(text in request["messages"][-1]["content"] for text in numbers) else None
    )
    received: list[int] = []
    with pytest.raises(UserError, match=r"does not answer 6 of 30 questions \(6 too long\).*unanswered_limit=0.1; use"):
        client(server, tmp_path, []).ask(questions(30), receive=lambda position, answer: received.append(position))
    assert not set(range(1, 7)) & set(received)
    for fields, before in (({"unanswered_limit": 0.2}, 0), ({}, 70)):  # an earlier job finished 70 questions
        answers = client(server, tmp_path, [], **fields).ask(questions(30), answered_before=before)
        assert sum(answer.refused for answer in answers) == 6
    with pytest.raises(UserError, match="does not answer 1 of 1 questions"):
        client(server, tmp_path, []).ask(questions(2)[1:])


@pytest.mark.parametrize(("status", "message"), [(401, "Incorrect API key provided"), (403, "Country not supported")])
def test_refused_key_fails(status: int, message: str, server: StrictServer, tmp_path: Path) -> None:
    server.problem = lambda request: (status, openai_error(message, code="invalid_api_key"))
    with pytest.raises(UserError, match=f"{status}: the environment variable OPENAI_API_KEY is set but refused"):
        client(server, tmp_path, []).ask(questions(3))


def changed(text: Any, **fields: Any) -> bytes:
    """Return an answer's body with other content or fields; a field that is None is removed."""
    body = json.loads(completion("Score: 3"))
    body["choices"][0]["message"]["content"] = text
    if "finish_reason" in fields:
        body["choices"][0]["finish_reason"] = fields.pop("finish_reason")
    body = {name: value for name, value in (body | fields).items() if value is not None}
    return json.dumps(body).encode()


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def test_damaged_cache_of_answers_is_named(server: StrictServer, tmp_path: Path) -> None:
    (tmp_path / "answers.sqlite").write_text("not a database" * 99)
    with pytest.raises(UserError, match=r"answers.sqlite: the cache of answers cannot be used .*remove the file"):
        client(server, tmp_path, [])


def test_answer_without_usage_is_estimated(server: StrictServer, tmp_path: Path) -> None:
    usages = [None, {}, {"prompt_tokens": 100}]
    for usage in usages:
        server.faults.append(lambda handler, _, usage=usage: send(handler, 200, changed("Score: 3", usage=usage)))  # type: ignore[misc]
    warnings: list[str] = []
    prices = {"dollars_per_million_input_tokens": 1e6, "concurrency": 1}
    asked = [Question("How good?" * 10, draw=draw) for draw in range(3)]
    answers = client(server, tmp_path, warnings, **prices).ask(asked)
    assert [(answer.input_tokens, answer.output_tokens) for answer in answers] == [(30, 3), (30, 3), (100, 3)]
    assert len(server.requests) == 3
    [warning] = warnings
    assert "does not report tokens; they are estimated" in warning
    assert AnswerCache(tmp_path / "answers.sqlite").spent("test") == pytest.approx(160.0)


@pytest.mark.parametrize(
    ("content", "thinking"),
    [
        ([text_part("Good.\n"), text_part("Score: 3")], None),
        (["Good.\n", "Score: 3"], None),
        ([{"type": "thinking", "thinking": [text_part("Hm.")]}, text_part("Good.\nScore: 3")], "Hm."),
        ([{"type": "reasoning", "text": "Hm."}, {"type": "output_text", "text": "Good.\nScore: 3"}], "Hm."),
        ([text_part("<think>Hm.</think>Good.\nScore: 3")], "Hm."),
    ],
)
def test_content_in_parts_is_read(content: Any, thinking: str | None, server: StrictServer, tmp_path: Path) -> None:
    server.faults = [lambda handler, question: send(handler, 200, changed(content))]
    [answer] = client(server, tmp_path, []).ask([Question("How good?")])
    assert (answer.text, answer.thinking) == ("Good.\nScore: 3", thinking)


@pytest.mark.parametrize(
    ("reason", "score"),
    [("end_turn", 3.0), ("STOP", 3.0), ("eos", 3.0), ("max_tokens", None), ("MAX_TOKENS", None), ("tool_calls", None)],
)
def test_finish_reasons_of_other_servers(
    reason: str, score: float | None, server: StrictServer, tmp_path: Path
) -> None:
    server.faults = [lambda handler, question: send(handler, 200, changed("Score: 3", finish_reason=reason))]
    [answer] = client(server, tmp_path, []).ask([Question("How good?")])
    assert read_score(answer) == score


def example(number: int) -> Row:
    return {"example_id": f"e{number}", "prompt_id": "p", "instruction": f"Task {number}.", "response": "It is 4"}


def pair(number: int) -> Row:
    return {"question_id": str(number), "instruction": f"Task {number}.", "answer": "a longer one", "other": "short"}


def turn(number: int) -> Row:
    texts = {"questions": [f"Task {number}."], "answers": ["It is."], "references": []}
    return {"question_id": str(number), "category": "stem", "turn": 1, **texts}


def asked_of_teacher(number: int) -> Row:
    return {"example_ids": [f"e{number}"], "turns": [f"Task {number}."], "seeds": [number]}


def test_every_program_leaves_out_refused_rows(server: StrictServer, tmp_path: Path) -> None:
    """Judges of points, pairs and MT-Bench, in both forms, and teachers and answerers behind an API."""
    filtered = openai_error("The prompt was filtered", code="content_filter")

    def refuse(request: dict[str, Any]) -> tuple[int, Any] | None:
        if "temperature" in request:
            return 400, openai_error(UNSUPPORTED.format("temperature"), param="temperature")
        return (400, filtered) if "Task 2." in request["messages"][-1]["content"] else None

    server.problem = refuse
    sampling = Sampling(max_tokens=8)
    cases: list[tuple[Any, Any, Any, str, dict[str, Any]]] = [
        (JUDGE, example, UTILITY, "utility", {"response_only": False}),
        (PAIRWISE_JUDGE, pair, PAIRWISE, "preference", {"prompts": "own"}),
        (PAIRWISE_JUDGE, pair, PAIRWISE, "preference", {"prompts": "published"}),
        (MT_BENCH_JUDGE, turn, MT_BENCH, "score", {"prompts": "own"}),
        (MT_BENCH_JUDGE, turn, MT_BENCH, "score", {"prompts": "published"}),
        (API_GENERATION, asked_of_teacher, GENERATION, "raw_output", {"sampling": sampling}),
    ]
    for place, (program, row, schema, column, settings) in enumerate(cases):
        folder = tmp_path / str(place)
        folder.mkdir()
        compute = open_with(server, folder, program, **settings)
        compute([row(number) for number in range(4)], folder / "part.parquet", lambda done: None)
        values = read_table(folder / "part.parquet", schema)[column].to_pylist()
        assert [value in (None, "") for value in values] == [False, False, True, False], (program.name, values)
        warnings = json.loads(warnings_file(folder / "judge.json").read_text())
        assert any("refuses temperature" in warning for warning in warnings)
        assert any("refused by moderation" in warning for warning in warnings)


def follow_schema(server: StrictServer) -> None:
    """Make the server answer requests with a schema in JSON, with the last allowed verdict."""

    def answer(request: dict[str, Any]) -> tuple[int, Any] | None:
        if "response_format" not in request:
            return None
        schema = request["response_format"]["json_schema"]["schema"]
        [name] = schema["required"][1:]
        text = json.dumps({"explanation": "Score: 1", name: schema["properties"][name]["enum"][-1]})
        return 200, json.loads(completion(text))

    server.problem = answer


STRUCTURED: dict[str, tuple[Any, Any, Any]] = {
    "points": (JUDGE, {"response_only": True}, [5.0, 5.0]),
    "pairwise": (PAIRWISE_JUDGE, {"prompts": "own"}, ["tie", "tie"]),
    "mt-bench": (MT_BENCH_JUDGE, {"prompts": "own"}, [10.0, 10.0]),
}


def judge_two(server: StrictServer, folder: Path, case: str, **fields: Any) -> list[Any]:
    """Let a program judge two rows; return its verdicts."""
    program, settings, _ = STRUCTURED[case]
    rows: dict[str, list[Row]] = {
        "points": [
            {"example_id": str(n), "prompt_id": "p", "instruction": "Count.", "response": f"{n}"} for n in (2, 3)
        ],
        "pairwise": [{"question_id": str(n), "instruction": "Count.", "answer": "1", "other": "22"} for n in (2, 3)],
        "mt-bench": [
            {
                "question_id": str(n),
                "category": "writing",
                "turn": 1,
                "questions": [f"Count to {n}."],
                "answers": ["1"],
                "references": [],
            }
            for n in (2, 3)
        ],
    }
    opened = open_with(server, folder, program, fields, **settings)
    opened(rows[case], folder / "part.parquet", lambda done: None)
    schema, column = {
        "points": (UTILITY, "utility"),
        "pairwise": (PAIRWISE, "outcome"),
        "mt-bench": (MT_BENCH, "score"),
    }[case]
    verdicts: list[Any] = read_table(folder / "part.parquet", schema)[column].to_pylist()
    return verdicts


@pytest.mark.parametrize("case", STRUCTURED)
def test_structured_output_has_a_verdict(case: str, server: StrictServer, tmp_path: Path) -> None:
    follow_schema(server)
    assert judge_two(server, tmp_path, case, structured_output=True) == STRUCTURED[case][2]
    sent = [request["response_format"] for request in server.requests]
    assert all(form["type"] == "json_schema" and form["json_schema"]["strict"] for form in sent)


@pytest.mark.parametrize("case", STRUCTURED)
def test_structured_output_is_off_by_default(case: str, server: StrictServer, tmp_path: Path) -> None:
    follow_schema(server)
    expected = judge_two(server, tmp_path, case)
    assert not any("response_format" in request for request in server.requests)
    assert expected == {"points": [2.0, 3.0], "pairwise": ["loss", "loss"], "mt-bench": [7.0, 7.0]}[case]


@pytest.mark.parametrize(
    "body",
    [
        openai_error("Invalid parameter: 'response_format' of type 'json_schema' is not supported with this model."),
        openai_error("This model does not support structured outputs."),
        {"detail": [{"loc": ["body", "response_format"], "msg": "Extra inputs are not permitted"}]},
    ],
)
def test_refused_structured_output_falls_back_to_text(body: Any, server: StrictServer, tmp_path: Path) -> None:
    server.problem = refuse_if("response_format", 400, body)
    warnings: list[str] = []
    schema = {"type": "object"}
    asked = [Question(question.text, schema=schema) for question in questions(6)]
    answers = client(server, tmp_path, warnings, structured_output=True, concurrency=1).ask(asked)
    assert [read_score(answer) for answer in answers] == [float(number) for number in range(6)]
    assert len(server.requests) == 7
    assert warnings == ["judge: the server refuses response_format; requests are sent without it"]


def test_schema_enters_key_only_if_it_is_sent(server: StrictServer, tmp_path: Path) -> None:
    """Answers that were paid for before schemas existed are still found."""
    plain, asked = questions(1)[0], replace(questions(1)[0], schema={"type": "object"})
    for on in (False, True):
        api = client(server, tmp_path, [], structured_output=on)
        assert (api._key(plain) == api._key(asked)) is not on


@pytest.mark.parametrize("reason", ["error", "insufficient_system_resource", "abort"])
def test_unfinished_answer_is_asked_again(reason: str, server: StrictServer, tmp_path: Path) -> None:
    """Servers that fail in the middle of an answer send its beginning, without an HTTP error."""
    server.faults.append(lambda handler, question: send(handler, 200, completion("Score: 1", reason)))
    [answer] = client(server, tmp_path, []).ask(questions(1))
    assert (answer.text[-8:-1], answer.finish_reason) == ("Score: ", "stop")
    assert len(server.requests) == 2
