"""A local server with the OpenAI API, which can fail in many ways."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import pytest

from montessori_core.config import Endpoint
from montessori_core.judging.client import Question
from montessori_core.judging.points import question_about
from montessori_core.program import Compute, Program, SettingsT, load
from support.row_programs import as_compute

KEY = "sk-canary-that-nobody-should-write-down"
Reply = Callable[[BaseHTTPRequestHandler, str], None]


def questions(count: int) -> list[Question]:
    """Return questions whose right answers are the scores 0 to 6, in turn."""
    return [Question(question_about(f"Say the number {number}.", f"It is {number % 7}")) for number in range(count)]


class JudgeServer:
    """A judge that scores an example by the last word of its response, or by `score`; and a teacher.

    `faults` are used first, one per request.
    """

    def __init__(self, score: Callable[[str], str] = lambda response: response.split()[-1]) -> None:
        self.score = score
        self.asked: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.faults: list[Reply] = []
        self.at_once = self.most_at_once = 0
        self.pause = 0.0
        served, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = content["messages"][-1]["content"]
                with lock:
                    served.asked.append(question)
                    served.requests.append(content)
                    served.keys.add(self.headers["Authorization"])
                    served.at_once += 1
                    served.most_at_once = max(served.most_at_once, served.at_once)
                    fault = served.faults.pop(0) if served.faults else None
                time.sleep(served.pause)
                try:
                    (fault or served.answer)(self, question)
                finally:
                    with lock:
                        served.at_once -= 1

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler, question: str) -> None:
        if question.startswith("You write tasks"):
            number = len(self.asked)
            text = f"<instruction>Explain {'the rule of ' * (number % 3)}number {number * number}.</instruction>"
            return send(handler, 200, completion(text))
        if not question.startswith("You grade"):
            return send(handler, 200, completion(f"An answer to: {question}"))
        response = question.rpartition("Response: ")[2].rpartition("\n\nSay")[0].rpartition("\n")[0]
        return send(handler, 200, completion(f"All points that are earned.\nScore: {self.score(response)}"))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


Server = TypeVar("Server", bound=JudgeServer)


def served(server: Server, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Server]:
    """For a fixture: a server, with its key and a separate answer cache in the environment; clients hardly pause."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("MONTESSORI_CACHE", str(folder / "cache"))
    monkeypatch.setattr("montessori_core.judging.client._FIRST_PAUSE", 0.05)
    yield server
    server.close()


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body)))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def completion(text: str | None, finish_reason: str = "stop", first_token: dict[str, float] | None = None) -> bytes:
    """Return the body of an answer; `first_token` has log-probabilities."""
    message = {"role": "assistant", "content": text}
    likeliest = [{"token": token, "logprob": value, "bytes": None} for token, value in (first_token or {}).items()]
    logprobs = {"content": [likeliest[0] | {"top_logprobs": likeliest}]} if likeliest else None
    return json.dumps(
        {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "judge",
            "choices": [{"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": logprobs}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }
    ).encode()


def refuse(status: int, **headers: str) -> Reply:
    return lambda handler, question: send(handler, status, b'{"error": {"message": "no"}}', **headers)


def hang(handler: BaseHTTPRequestHandler, question: str) -> None:
    time.sleep(5.0)  # longer than the client's timeout
    send(handler, 200, completion("Score: 3"))


def cut_off(handler: BaseHTTPRequestHandler, question: str) -> None:
    whole = completion("Score: 3")
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(whole)))
    handler.end_headers()
    handler.wfile.write(whole[: len(whole) // 2])
    handler.close_connection = True


FAULTS: dict[str, Reply] = {
    "429": refuse(429, Retry_After="0.1"),
    "500": refuse(500),
    "503": refuse(503),
    "time-out": hang,
    "lost connection": cut_off,
    "not JSON": lambda handler, question: send(handler, 200, b"<html>gateway</html>"),
    "cut JSON": lambda handler, question: send(handler, 200, completion("Score: 3")[:40]),
    "endless use": lambda handler, question: send(handler, 200, completion("Score: 3").replace(b": 100,", b": 1e999,")),
    "negative use": lambda handler, question: send(handler, 200, completion("Score: 3").replace(b": 10,", b": -10,")),
    "deep JSON": lambda handler, question: send(handler, 200, b"[" * 100_000),
    "no choices": lambda handler, question: send(handler, 200, b'{"id": "x", "choices": []}'),
}


def endpoint(server: JudgeServer, **fields: Any) -> Endpoint:
    return Endpoint(model="judge", base_url=server.url, timeout_seconds=3.0, **({"retries": 2} | fields))


def open_with(
    server: JudgeServer,
    folder: Path,
    program: Program[SettingsT],
    fields: dict[str, Any] | None = None,
    **settings: Any,
) -> Compute:
    """Open a judge's program with the server as its endpoint; `fields` are further settings of the endpoint."""
    path, asked = folder / "judge.json", endpoint(server, **(fields or {}))
    path.write_text(asked.model_dump_json())
    opened = load(program.entry)(program.settings(endpoint=asked.identity(), **settings), {"endpoint": path})
    return as_compute(opened)


QUESTIONS = ["Name three rivers.", "Why is the sky blue?", "Write a line about rain.", "Count to four.", "Say hello."]


class Judge(JudgeServer):
    """Prefers the longer answer in either order, and gives 7 to first and 4 to second turns.

    With the published prompts it prefers the first answer and gives 6.
    """

    def answer(self, handler: BaseHTTPRequestHandler, question: str) -> None:
        if question.startswith("You compare"):
            answers = [question.partition(f"= Answer {name}\n")[2].partition("\n\n====")[0] for name in "AB"]
            better = "tie" if len(answers[0]) == len(answers[1]) else "AB"[len(answers[1]) > len(answers[0])]
            return send(handler, 200, completion(f"One is longer.\nBetter: {better}"))
        if question.startswith("I require a leaderboard"):
            return send(handler, 200, completion("m", "length", {"m": -0.1, "M": -2.4}))
        return send(handler, 200, completion(f"Good: [[6]].\nScore: {4 if 'second of two answers' in question else 7}"))


def judged(judge: Judge, folder: Path) -> dict[str, Any]:
    """Return sections of a configuration with AlpacaEval and MT-Bench."""
    (folder / "outputs.jsonl").write_text(
        "".join(json.dumps({"instruction": question, "output": ""}) + "\n" for question in QUESTIONS)
    )
    dialogues = [
        {"question_id": number, "category": category, "turns": [f"Tell me about {number}.", "And then?"]}
        for number, category in ((1, "writing"), (2, "math"))
    ]
    references = [{"question_id": 2, "choices": [{"turns": ["It is even.", "It is prime."]}]}]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dialogues))
    (folder / "references.jsonl").write_text("".join(json.dumps(row) + "\n" for row in references))
    benchmarks = {
        "alpaca_eval": str(folder / "outputs.jsonl"),
        "mt_bench": str(folder / "questions.jsonl"),
        "mt_bench_references": str(folder / "references.jsonl"),
        "answers": {"max_tokens": 12, "presence_penalty": 0.0},
    }
    return {"benchmarks": benchmarks, "judge": {"model": "judge", "base_url": judge.url}}
