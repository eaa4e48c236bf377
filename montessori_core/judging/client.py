"""Client of models behind an OpenAI-compatible API: concurrent requests, each paid for once.

A cache on disk keeps answers by the content of the question, so a repeated or interrupted stage pays for nothing twice. It
also records the price of every answer. The spending cap is checked before a request is sent.
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
from montessori_core.models.thinking import split_answer

_MILLION = 1e6
_REFUSALS = ("content_filter", "context_length_exceeded")  # error codes that concern a single question


@dataclass(frozen=True)
class Answer:
    """A model's answer, with its billed tokens.

    `finish_reason` is 'stop', 'length', or the reason why there is no text. `first_token` has the log-probabilities of the
    likeliest first tokens, if requested and supported by the server. `thinking` is what a reasoning model wrote before.
    """

    text: str
    finish_reason: str
    input_tokens: int
    output_tokens: int
    first_token: dict[str, float] | None = None
    thinking: str | None = None


@dataclass(frozen=True)
class Question:
    """A user message and the decoding of its answer.

    The answer has at most `max_tokens` tokens, or the endpoint's limit if that is lower. Questions that differ only in
    `draw` are asked separately. `likeliest` is the number of first tokens to return log-probabilities for.
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
    """Answers and spending, in one SQLite file that several processes may use."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        with self._open() as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT)")
            connection.execute("CREATE TABLE IF NOT EXISTS spending (account TEXT, dollars REAL)")

    def get(self, key: str) -> Answer | None:
        """Return the cached answer, or None."""
        with self._open() as connection:
            row = connection.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return Answer(**json.loads(row[0])) if row else None

    def put(self, key: str, answer: Answer, account: str, dollars: float) -> None:
        """Store an answer and its price."""
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
    """A client of one endpoint, with a cache of its answers."""

    def __init__(self, endpoint: Endpoint, account: str, cache: AnswerCache | None = None) -> None:
        """Open the endpoint.

        Args:
            endpoint: address, model, limits and prices.
            account: name under which spending is counted against the cap.
            cache: by default the user's, see `montessori_core.files.cache_root`.

        Raises:
            UserError: the key is not valid.
        """
        import openai

        self._endpoint, self._account = endpoint, account
        self._cache = cache or AnswerCache(cache_root() / "api" / "answers.sqlite")
        key = os.environ.get(endpoint.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):  # a client's error would quote it
            raise UserError(f"the environment variable {endpoint.key_variable} is not a valid API key; set it again")
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
        """Ask questions, each in a separate request; cached questions are not asked again.

        Args:
            questions: the questions; equal ones are asked once.
            report: called with the number of questions answered so far.
            receive: called before `report` with each new answer and the position of its question.

        Returns:
            [questions] answers, in order.

        Raises:
            UserError: the key is refused, the cap is reached, or a request failed after all retries; earlier answers are
                kept.
        """
        keys = [self._key(question) for question in questions]
        positions: defaultdict[str, list[int]] = defaultdict(list)
        for position, key in enumerate(keys):
            positions[key].append(position)
        answers: dict[str, Answer] = {}
        answered = 0

        def add(key: str, answer: Answer) -> None:
            nonlocal answered
            answers[key] = answer
            answered += len(positions[key])
            for position in positions[key]:
                receive(position, answer)

        for key in positions:
            if (answer := self._cache.get(key)) is not None:
                add(key, answer)
        pending = {key: question for key, question in zip(keys, questions, strict=True) if key not in answers}
        report(answered)
        self._fetch_all(pending, add, lambda: report(answered))
        return [answers[key] for key in keys]

    def _fetch_all(
        self, questions: Mapping[str, Question], receive: Callable[[str, Answer], None], report: Callable[[], None]
    ) -> None:
        """Send concurrent requests, as long as the cap allows the next one.

        Args:
            questions: questions by key.
            receive: called with each key and answer.
            report: called after answers were received.
        """
        spent = self._cache.spent(self._account)
        reserved: dict[Future[Answer], tuple[str, float]] = {}
        pending = list(questions.items())
        with ThreadPoolExecutor(self._endpoint.concurrency) as pool:
            try:
                while pending or reserved:
                    while pending and len(reserved) < self._endpoint.concurrency:
                        key, question = pending[0]
                        price = self._max_price(question)
                        if not self._affordable(spent + sum(cost for _, cost in reserved.values()) + price):
                            break
                        pending.pop(0)
                        reserved[pool.submit(self._fetch, question)] = key, price
                    if not reserved:
                        raise UserError(
                            f"{self._endpoint.model}: {len(pending)} questions are pending, and the next could exceed "
                            f"spending_cap_dollars={self._endpoint.spending_cap_dollars:g} ({spent:.4f} spent); raise it and "
                            "resume: answers are kept"
                        )
                    done, _ = wait(reserved, return_when=FIRST_COMPLETED)
                    for future in done:
                        key, _ = reserved.pop(future)
                        answer = future.result()
                        spent += self._store(key, answer)
                        receive(key, answer)
                    report()
            except BaseException:
                for future, (key, _) in reserved.items():
                    if not future.cancel():  # sent, and billed
                        with suppress(UserError):
                            self._store(key, future.result())
                raise

    def _store(self, key: str, answer: Answer) -> float:
        """Cache an answer; return its price, dollars."""
        dollars = self._price(answer.input_tokens, answer.output_tokens)
        self._cache.put(key, answer, self._account, dollars)
        return dollars

    def _key(self, question: Question) -> str:
        content = [self._endpoint.identity(), asdict(question)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _fetch(self, question: Question) -> Answer:
        import openai

        options: dict[str, Any] = {"logprobs": True, "top_logprobs": question.likeliest} if question.likeliest else {}
        if self._endpoint.chat_template_kwargs:
            options["extra_body"] = {"chat_template_kwargs": self._endpoint.chat_template_kwargs}
        for attempt in range(self._endpoint.retries + 1):
            self._wait_for_turn()
            try:
                completion = self._client.chat.completions.create(
                    model=self._endpoint.model,
                    messages=_messages(question),
                    temperature=question.temperature,
                    top_p=question.top_p,
                    presence_penalty=question.presence_penalty,
                    max_tokens=self._max_tokens(question),
                    **options,
                )
                return _parse(completion)
            except openai.APIStatusError as error:
                if error.code in _REFUSALS:
                    return Answer("", str(error.code), 0, 0)
                raise UserError(self._describe_status(error)) from error
            except openai.APIConnectionError as error:  # after the client's own retries
                raise UserError(
                    f"{self._endpoint.base_url} does not answer ({error}); check base_url and the network of the node"
                ) from error
            except (ValueError, TypeError, AttributeError, LookupError, RecursionError, openai.APIError) as error:
                # A truncated response, or a proxy's page.
                if attempt == self._endpoint.retries:
                    raise UserError(
                        f"{self._endpoint.base_url}: {attempt + 1} responses did not follow the OpenAI API (last: {error!r})"
                    ) from error
                time.sleep(min(8.0, 0.5 * 2.0**attempt))
        raise AssertionError

    def _describe_status(self, error: Any) -> str:
        if error.status_code in (401, 403):
            problem = "is set but refused" if os.environ.get(self._endpoint.key_variable) else "is not set"
            return (
                f"{self._endpoint.base_url}: {error.status_code}: the environment variable {self._endpoint.key_variable} "
                f"{problem} where the job runs"
            )
        return f"{self._endpoint.base_url}: {error.status_code} for model {self._endpoint.model!r}: {error.message}"

    def _wait_for_turn(self) -> None:
        if self._endpoint.requests_per_minute is None:
            return
        with self._turn:
            turn = max(time.monotonic(), self._next_turn)
            self._next_turn = turn + 60.0 / self._endpoint.requests_per_minute
        time.sleep(max(0.0, turn - time.monotonic()))

    def _max_price(self, question: Question) -> float:
        """Return the maximum price of a question, dollars: a token has at least one byte, and templates add a few."""
        return self._price(len((question.system + question.text).encode()) + 64, self._max_tokens(question))

    def _max_tokens(self, question: Question) -> int:
        return min(self._endpoint.max_tokens, question.max_tokens or self._endpoint.max_tokens)

    def _price(self, input_tokens: int, output_tokens: int) -> float:
        prices = self._endpoint.dollars_per_million_input_tokens, self._endpoint.dollars_per_million_output_tokens
        return (input_tokens * prices[0] + output_tokens * prices[1]) / _MILLION

    def _affordable(self, dollars: float) -> bool:
        cap = self._endpoint.spending_cap_dollars
        return dollars <= (math.inf if cap is None else cap)


def open_client(settings: programs.ApiRequest, inputs: Mapping[str, Path]) -> CachedClient:
    """Open the endpoint of a stage.

    Inputs: `endpoint`, a file with its configuration. The path of the file is the account for spending.
    """
    endpoint = Endpoint.model_validate_json(inputs["endpoint"].read_bytes())
    assert endpoint.identity() == settings.endpoint
    return CachedClient(endpoint, str(inputs["endpoint"]))


def _messages(question: Question) -> list[Any]:
    system = [{"role": "system", "content": question.system}] if question.system else []
    return [*system, {"role": "user", "content": question.text}]


def _parse(completion: Any) -> Answer:
    """Parse a response; one that does not follow the API raises ValueError, TypeError, AttributeError or LookupError.

    The API allows null instead of text: for a refusal, or for a limit reached before the first word.
    """
    choice, usage = completion.choices[0], completion.usage
    text = choice.message.content
    reason = choice.finish_reason or ("stop" if text else "length")
    if not all(0 <= tokens < math.inf for tokens in (usage.prompt_tokens, usage.completion_tokens)):
        raise ValueError(f"no numbers of tokens: {usage.prompt_tokens}, {usage.completion_tokens}")
    # A lone surrogate, such as half of a cut emoji, cannot be written to a file.
    thinking, text = split_answer(re.sub("[\ud800-\udfff]", "\ufffd", text or ""))
    for field in ("reasoning_content", "reasoning"):  # of servers that separate it
        separate = getattr(choice.message, field, None)
        thinking = re.sub("[\ud800-\udfff]", "\ufffd", separate) if isinstance(separate, str) else thinking
    tokens = int(usage.prompt_tokens), int(usage.completion_tokens)
    return Answer(text, reason, *tokens, _first_token(choice), thinking)


def _first_token(choice: Any) -> dict[str, float] | None:
    tokens = choice.logprobs.content if choice.logprobs else None
    if not tokens:
        return None
    likeliest = {token.token: float(token.logprob) for token in tokens[0].top_logprobs}
    if not all(map(math.isfinite, likeliest.values())):
        raise ValueError(f"no log-probabilities: {likeliest}")
    return likeliest
