"""A cached client of OpenAI-compatible APIs with parallel requests and a spending cap.

Answers are cached on disk by the content of the question, so that a repeated or interrupted stage pays for each only once.
The cache also records what was spent; the cap is checked before a request is sent.
"""

import hashlib
import json
import math
import os
import re
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from montessori_core import programs
from montessori_core.config import Endpoint
from montessori_core.errors import UserError
from montessori_core.files import cache_root

_MILLION = 1e6
_NO_ANSWER = ("content_filter", "context_length_exceeded")  # errors that concern a single question


@dataclass(frozen=True)
class Answer:
    """A model's answer, why it ended ('stop', 'length', or why it has no text), and the tokens that were charged.

    `first_token` has the log-probabilities of the likeliest first tokens, if requested and supported by the server.
    """

    text: str
    finish_reason: str
    input_tokens: int
    output_tokens: int
    first_token: dict[str, float] | None = None


@dataclass(frozen=True)
class Question:
    """A user message and how its answer is sampled; `max_tokens` applies if it is below the endpoint's own limit.

    Questions that differ only in `draw` are asked separately. `likeliest` is the number of first tokens whose
    log-probabilities are requested.
    """

    text: str
    temperature: float = 0.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    max_tokens: int | None = None
    draw: int = 0
    system: str = ""
    likeliest: int = 0


class AnswerCache:
    """Answers and spending, in an SQLite file that several processes may use."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        with self._open() as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT)")
            connection.execute("CREATE TABLE IF NOT EXISTS spending (account TEXT, dollars REAL)")

    def get(self, key: str) -> Answer | None:
        """Return a cached answer; None if there is none."""
        with self._open() as connection:
            row = connection.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return Answer(**json.loads(row[0])) if row else None

    def put(self, key: str, answer: Answer, account: str, dollars: float) -> None:
        """Save an answer and its cost."""
        with self._open() as connection:
            connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, json.dumps(asdict(answer))))
            connection.execute("INSERT INTO spending VALUES (?, ?)", (account, dollars))

    def spent(self, account: str) -> float:
        """Return the dollars spent on an account."""
        with self._open() as connection:
            row = connection.execute("SELECT SUM(dollars) FROM spending WHERE account = ?", (account,)).fetchone()
        return float(row[0] or 0.0)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self._path, timeout=60.0)) as connection, connection:
            yield connection


class CachedClient:
    """A client of an endpoint."""

    def __init__(self, endpoint: Endpoint, account: str, cache: AnswerCache | None = None) -> None:
        """Open the client.

        Args:
            endpoint: URL, model, limits and prices.
            account: name that spending counts for, against the cap.
            cache: by default the user's, see `montessori_core.files.cache_root`.
        """
        import openai

        self._endpoint, self._account = endpoint, account
        self._cache = cache or AnswerCache(cache_root() / "api" / "answers.sqlite")
        key = os.environ.get(endpoint.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):  # the HTTP client's error would quote the key
            raise UserError(f"the environment variable {endpoint.key_variable} holds what cannot be a key; set it anew")
        self._client = openai.OpenAI(
            api_key=key or "none",
            base_url=endpoint.base_url,
            timeout=endpoint.timeout_seconds,
            max_retries=endpoint.retries,
        )
        self._turn, self._next_turn = threading.Lock(), 0.0

    def ask(
        self,
        questions: Sequence[Question],
        report: Callable[[int], None] = lambda done: None,
        receive: Callable[[int, Answer], None] = lambda number, answer: None,
    ) -> list[Answer]:
        """Ask questions, each in a request of its own; earlier answers come from the cache.

        Args:
            questions: equal questions are asked once.
            report: called with the number of answered questions.
            receive: called before `report` with each answer and the position of its question.

        Returns:
            [questions] answers, in their order.

        Raises:
            UserError: the key is refused, the cap is reached, or a question has no answer after all retries; earlier answers
                are kept.
        """
        keys = [self._key(question) for question in questions]
        places: defaultdict[str, list[int]] = defaultdict(list)
        for number, key in enumerate(keys):
            places[key].append(number)
        answers: dict[str, Answer] = {}
        answered = 0

        def take(key: str, answer: Answer) -> None:
            nonlocal answered
            answers[key] = answer
            answered += len(places[key])
            for number in places[key]:
                receive(number, answer)

        for key in places:
            if (answer := self._cache.get(key)) is not None:
                take(key, answer)
        waiting = {key: question for key, question in zip(keys, questions, strict=True) if key not in answers}
        report(answered)
        self._fetch_all(waiting, take, lambda: report(answered))
        return [answers[key] for key in keys]

    def _fetch_all(
        self, waiting: Mapping[str, Question], receive: Callable[[str, Answer], None], report: Callable[[], None]
    ) -> None:
        """Ask questions in parallel, up to the endpoint's concurrency and the spending cap.

        Args:
            waiting: questions by key.
            receive: called with each key and answer.
            report: called after answers were received.
        """
        spent = self._cache.spent(self._account)
        reserved: dict[Future[Answer], tuple[str, float]] = {}
        left = list(waiting.items())
        with ThreadPoolExecutor(self._endpoint.concurrency) as pool:
            try:
                while left or reserved:
                    while left and len(reserved) < self._endpoint.concurrency:
                        key, question = left[0]
                        most = self._most(question)
                        if not self._affordable(spent + sum(cost for _, cost in reserved.values()) + most):
                            break
                        left.pop(0)
                        reserved[pool.submit(self._fetch, question)] = key, most
                    if not reserved:
                        raise UserError(
                            f"{self._endpoint.model}: {len(left)} questions are left, and the next could pass "
                            f"spending_cap_dollars={self._endpoint.spending_cap_dollars:g} ({spent:.4f} spent); raise it and "
                            "go on: answers are kept"
                        )
                    done, _ = wait(reserved, return_when=FIRST_COMPLETED)
                    for future in done:
                        key, _ = reserved.pop(future)
                        answer = future.result()
                        spent += self._keep(key, answer)
                        receive(key, answer)
                    report()
            except BaseException:
                for future, (key, _) in reserved.items():
                    if not future.cancel():  # already sent, and charged
                        with suppress(UserError):
                            self._keep(key, future.result())
                raise

    def _keep(self, key: str, answer: Answer) -> float:
        """Cache an answer; return its cost in dollars."""
        dollars = self._price(answer.input_tokens, answer.output_tokens)
        self._cache.put(key, answer, self._account, dollars)
        return dollars

    def _key(self, question: Question) -> str:
        asked = [self._endpoint.identity(), asdict(question)]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def _fetch(self, question: Question) -> Answer:
        import openai

        logprobs: dict[str, Any] = {"logprobs": True, "top_logprobs": question.likeliest} if question.likeliest else {}
        for attempt in range(self._endpoint.retries + 1):
            self._wait_for_turn()
            try:
                completion = self._client.chat.completions.create(
                    model=self._endpoint.model,
                    messages=_messages(question),
                    temperature=question.temperature,
                    top_p=question.top_p,
                    presence_penalty=question.presence_penalty,
                    max_tokens=self._limit(question),
                    **logprobs,
                )
                return _read(completion)
            except openai.APIStatusError as error:
                if error.code in _NO_ANSWER:
                    return Answer("", str(error.code), 0, 0)
                raise UserError(self._refusal(error)) from error
            except openai.APIConnectionError as error:  # after the client's own retries
                raise UserError(
                    f"{self._endpoint.base_url} does not answer ({error}); check base_url and the network of the node"
                ) from error
            except (ValueError, TypeError, AttributeError, LookupError, RecursionError, openai.APIError) as error:
                # Not of the protocol: cut off on the way, or a proxy's page.
                if attempt == self._endpoint.retries:
                    raise UserError(
                        f"{self._endpoint.base_url}: {attempt + 1} answers were not of the protocol (the last: {error!r})"
                    ) from error
                time.sleep(min(8.0, 0.5 * 2.0**attempt))
        raise AssertionError

    def _refusal(self, error: Any) -> str:
        if error.status_code in (401, 403):
            known = "is set but refused" if os.environ.get(self._endpoint.key_variable) else "is not set"
            return (
                f"{self._endpoint.base_url}: {error.status_code}: the environment variable {self._endpoint.key_variable} "
                f"{known} where the job runs"
            )
        return f"{self._endpoint.base_url}: {error.status_code} for model {self._endpoint.model!r}: {error.message}"

    def _wait_for_turn(self) -> None:
        if self._endpoint.requests_per_minute is None:
            return
        with self._turn:
            turn = max(time.monotonic(), self._next_turn)
            self._next_turn = turn + 60.0 / self._endpoint.requests_per_minute
        time.sleep(max(0.0, turn - time.monotonic()))

    def _most(self, question: Question) -> float:
        """Dollars a question can cost at most: no token is shorter than a byte, and templates add a few."""
        return self._price(len((question.system + question.text).encode()) + 64, self._limit(question))

    def _limit(self, question: Question) -> int:
        return min(self._endpoint.max_tokens, question.max_tokens or self._endpoint.max_tokens)

    def _price(self, input_tokens: int, output_tokens: int) -> float:
        prices = self._endpoint.dollars_per_million_input_tokens, self._endpoint.dollars_per_million_output_tokens
        return (input_tokens * prices[0] + output_tokens * prices[1]) / _MILLION

    def _affordable(self, dollars: float) -> bool:
        cap = self._endpoint.spending_cap_dollars
        return dollars <= (math.inf if cap is None else cap)


def open_client(settings: programs.ApiRequest, inputs: Mapping[str, Path]) -> CachedClient:
    """The endpoint of a stage.

    Inputs: `endpoint` (its whole configuration, whose path is the account
    that spending is counted for).
    """
    endpoint = Endpoint.model_validate_json(inputs["endpoint"].read_bytes())
    assert endpoint.identity() == settings.endpoint
    return CachedClient(endpoint, str(inputs["endpoint"]))


def _messages(question: Question) -> list[Any]:
    system = [{"role": "system", "content": question.system}] if question.system else []
    return [*system, {"role": "user", "content": question.text}]


def _read(completion: Any) -> Answer:
    """An answer of the protocol; anything else raises ValueError, TypeError, AttributeError or LookupError.

    Null in place of text is of the protocol: a refusal, or a limit reached before the first word.
    """
    choice, usage = completion.choices[0], completion.usage
    text = choice.message.content
    reason = choice.finish_reason or ("stop" if text else "length")
    if not all(0 <= tokens < math.inf for tokens in (usage.prompt_tokens, usage.completion_tokens)):
        raise ValueError(f"no numbers of tokens: {usage.prompt_tokens}, {usage.completion_tokens}")
    # Half of a surrogate pair, as of an emoji that was cut in two, can be written to no file.
    text = re.sub("[\ud800-\udfff]", "\ufffd", text or "")
    return Answer(text, reason, int(usage.prompt_tokens), int(usage.completion_tokens), _first_token(choice))


def _first_token(choice: Any) -> dict[str, float] | None:
    tokens = choice.logprobs.content if choice.logprobs else None
    if not tokens:
        return None
    likeliest = {one.token: float(one.logprob) for one in tokens[0].top_logprobs}
    if not all(map(math.isfinite, likeliest.values())):
        raise ValueError(f"no log-probabilities: {likeliest}")
    return likeliest
