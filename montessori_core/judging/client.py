"""Client of models behind an OpenAI-compatible API: concurrent requests, each paid for once.

A cache on disk keeps answers by the content of the question, so a repeated or interrupted stage pays for nothing twice. It
also records the price of every answer. The spending cap is checked before a request is sent.
"""

import hashlib
import json
import logging
import math
import os
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from montessori_core import programs
from montessori_core.config import Endpoint
from montessori_core.errors import UserError
from montessori_core.files import cache_root, read_json, write_json
from montessori_core.judging.answer_cache import AnswerCache
from montessori_core.judging.responses import Answer, is_unknown_parameter, parse, refusal_of, refused_parameter

log = logging.getLogger(__name__)

_MILLION = 1e6
_OPTIONAL = ("response_format", "presence_penalty", "top_p", "temperature", "top_logprobs", "logprobs")
"""Parameters that a request can do without, the least important first."""
_REMEDIES = {
    **dict.fromkeys((400, 422), "; if it refuses a parameter, set that one to null in the section's parameters"),
    404: "; set model and base_url to what the server has",
    429: "; set requests_per_minute or lower concurrency, and resume: answers are kept",
}
"""By status of a response."""
_FIRST_PAUSE = 0.5  # seconds before the second attempt; doubled before each further one
_FEW = 5  # unanswered questions that are always allowed, unless they are all


@dataclass(frozen=True)
class Question:
    """A user message and the decoding of its answer.

    The answer has at most `max_tokens` tokens, or the endpoint's limit if that is lower. Questions that differ only in
    `draw` are asked separately. `likeliest` is the number of first tokens to return log-probabilities for.
    `schema` is the JSON schema of the answer, for endpoints with `structured_output`.
    """

    text: str
    temperature: float = 0.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    max_tokens: int | None = None
    draw: int = 0
    system: str = ""
    likeliest: int = 0
    schema: Mapping[str, Any] | None = None


class CachedClient:
    """A client of one endpoint, with a cache of its answers."""

    def __init__(
        self,
        endpoint: Endpoint,
        account: str,
        cache: AnswerCache | None = None,
        warn: Callable[[str], None] = log.warning,
    ) -> None:
        """Open the endpoint.

        Args:
            endpoint: address, model, limits and prices.
            account: name under which spending is counted against the cap.
            cache: by default the user's, see `montessori_core.files.cache_root`.
            warn: called once with each warning: a parameter that the server refuses, estimated tokens, unanswered questions.

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
        self._warn, self._warned, self._warning = warn, set[str](), threading.Lock()
        self._adapting = threading.Lock()
        self._omitted, self._limit = set[str](), endpoint.token_limit

    def ask(
        self,
        questions: Sequence[Question],
        report: Callable[[int], None] = lambda done: None,
        receive: Callable[[int, Answer], None] = lambda number, answer: None,
        answered_before: int = 0,
    ) -> list[Answer]:
        """Ask questions, each in a separate request; cached questions are not asked again.

        Args:
            questions: the questions; equal ones are asked once.
            report: called with the number of questions answered so far.
            receive: called before `report` with each new answer and the position of its question; at the end for unanswered
                questions, which a stage that fails asks again.
            answered_before: questions of the stage that an earlier job asked; they count for the share of unanswered ones.

        Returns:
            [questions] answers, in order; see `Answer.refused` for unanswered ones.

        Raises:
            UserError: the key is refused, the cap is reached, too many questions are unanswered, or a request failed after
                all retries; earlier answers are kept.
        """
        keys = [self._key(question) for question in questions]
        positions: defaultdict[str, list[int]] = defaultdict(list)
        for position, key in enumerate(keys):
            positions[key].append(position)
        answers: dict[str, Answer] = {}
        unanswered: list[str] = []
        answered, total = 0, len(positions) + answered_before

        def add(key: str, answer: Answer) -> None:
            nonlocal answered
            answers[key] = answer
            answered += len(positions[key])
            if answer.refused:
                unanswered.append(key)
                self._check_unanswered([answers[key] for key in unanswered], total)
                return
            for position in positions[key]:
                receive(position, answer)

        for key in positions:
            if (answer := self._cache.get(key)) is not None:
                add(key, answer)
        pending = {key: question for key, question in zip(keys, questions, strict=True) if key not in answers}
        report(answered)
        self._fetch_all(pending, add, lambda: report(answered))
        for key in unanswered:
            for position in positions[key]:
                receive(position, answers[key])
        if unanswered:
            self._warn_once(
                f"{_describe_unanswered([answers[key] for key in unanswered], total)}; they count as unanswered"
            )
            report(answered)
        return [answers[key] for key in keys]

    def _check_unanswered(self, refused: Sequence[Answer], total: int) -> None:
        share = self._endpoint.unanswered_limit
        if len(refused) > max(share * total, min(_FEW, total - 1)):
            filtered = all(answer.finish_reason == "content_filter" for answer in refused)
            remedy = "a model that answers them" if filtered else "a model with a longer context, lower max_tokens"
            raise UserError(
                f"{self._endpoint.base_url}: {_describe_unanswered(refused, total)}, more than unanswered_limit={share:g}; "
                f"use {remedy} or raise the limit, and resume: answers are kept"
            )

    def _fetch_all(
        self, questions: Mapping[str, Question], receive: Callable[[str, Answer], None], report: Callable[[], None]
    ) -> None:
        """Send concurrent requests, as long as the cap allows the next one.

        Args:
            questions: questions by key.
            receive: called with each key and answer.
            report: called after answers were received.
        """
        spent, cap = self._cache.spent(self._account), self._endpoint.spending_cap_dollars or math.inf
        reserved: dict[Future[Answer], tuple[str, float]] = {}
        pending = deque(questions.items())
        with ThreadPoolExecutor(self._endpoint.concurrency) as pool:
            try:
                while pending or reserved:
                    while pending and len(reserved) < self._endpoint.concurrency:
                        key, question = pending[0]
                        price = self._max_price(question)
                        if spent + sum(cost for _, cost in reserved.values()) + price > cap:
                            break
                        pending.popleft()
                        reserved[pool.submit(self._fetch, question)] = key, price
                    if not reserved:
                        raise UserError(
                            f"{self._endpoint.model}: {len(pending)} questions are pending, and the next could exceed "
                            f"spending_cap_dollars={cap:g} ({spent:.4f} spent); raise it and resume: answers are kept"
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
        """Cache an answer; return its price, dollars. A refused question that was not billed may be asked again."""
        if answer.refused and not answer.input_tokens:
            return 0.0
        dollars = self._price(answer.input_tokens, answer.output_tokens)
        self._cache.put(key, answer, self._account, dollars)
        return dollars

    def _key(self, question: Question) -> str:
        asked = asdict(question)
        if not self._endpoint.structured_output or question.schema is None:
            del asked["schema"]
        content = [self._endpoint.identity(), asked]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _fetch(self, question: Question) -> Answer:
        import openai

        for attempt in range(self._endpoint.retries + 1):
            try:
                answer, estimated = parse(self._request(question), question.system + question.text)
                if estimated:
                    self._warn_once(
                        "the server does not report tokens; they are estimated from the length of the texts"
                    )
                return answer
            except openai.APIStatusError as error:
                if reason := refusal_of(error):
                    return Answer("", reason, 0, 0)
                raise UserError(self._describe_status(error)) from error
            except openai.APITimeoutError as error:  # after the client's own retries
                raise UserError(
                    f"{self._endpoint.base_url}: no answer within timeout_seconds={self._endpoint.timeout_seconds:g}, after "
                    f"{self._endpoint.retries} retries; raise timeout_seconds, or lower max_tokens or concurrency"
                ) from error
            except openai.APIConnectionError as error:  # after the client's own retries
                raise UserError(
                    f"{self._endpoint.base_url} does not answer ({error}); check base_url and the network of the node"
                ) from error
            except (ValueError, TypeError, AttributeError, LookupError, RecursionError, openai.APIError) as error:
                # A truncated response, or a proxy's page.
                if attempt == self._endpoint.retries:
                    raise UserError(
                        f"{self._endpoint.base_url}: {attempt + 1} responses did not follow the OpenAI API (last: {error!r})"
                        "; check that base_url names an API, not a web page (it often ends in /v1)"
                    ) from error
                time.sleep(min(8.0, _FIRST_PAUSE * 2.0**attempt))
        raise AssertionError

    def _request(self, question: Question) -> Any:
        """Send a request, again without each optional parameter that the server refuses."""
        import openai

        while True:
            self._wait_for_turn()
            parameters = self._parameters(question)
            try:
                return self._client.chat.completions.create(
                    model=self._endpoint.model, messages=_messages(question), extra_body=parameters
                )
            except openai.APIStatusError as error:
                if refusal_of(error) or not self._adapt(error, parameters):
                    raise

    def _parameters(self, question: Question) -> dict[str, Any]:
        """Return the parameters of a request: the question's, the endpoint's, without those that the server refuses."""
        parameters: dict[str, Any] = {
            "temperature": question.temperature,
            "top_p": question.top_p,
            "presence_penalty": question.presence_penalty,
        }
        if question.likeliest:
            parameters |= {"logprobs": True, "top_logprobs": question.likeliest}
        if self._endpoint.structured_output and question.schema is not None:
            verdict = {"name": "verdict", "strict": True, "schema": question.schema}
            parameters["response_format"] = {"type": "json_schema", "json_schema": verdict}
        if self._endpoint.chat_template_kwargs:
            parameters["chat_template_kwargs"] = self._endpoint.chat_template_kwargs
        parameters = {name: value for name, value in parameters.items() if name not in self._omitted}
        parameters |= self._endpoint.parameters
        if self._limit != "none":
            parameters[self._limit] = self._max_tokens(question)
        return {name: value for name, value in parameters.items() if value is not None}

    def _adapt(self, error: Any, sent: Mapping[str, Any]) -> bool:
        """Leave out, or rename, the parameter that the server refuses; return False if none can be."""
        ours = [name for name in _OPTIONAL if name in sent and name not in self._endpoint.parameters]
        name = refused_parameter(error, ours)
        with self._adapting:
            if name is not None:
                self._omitted |= {"logprobs", "top_logprobs"} if "logprobs" in name else {name}
                value = "" if name == "response_format" else f"={sent[name]}"
                self._warn_once(f"the server refuses {name}{value}; requests are sent without it")
                return True
            if "max_tokens" in sent and refused_parameter(error, ["max_tokens"]) and is_unknown_parameter(error):
                self._limit = "max_completion_tokens"
                self._warn_once("the server refuses max_tokens; requests have max_completion_tokens instead")
                return True
        return False

    def _warn_once(self, warning: str) -> None:
        with self._warning:  # requests run in threads, and `warn` may rewrite a file
            if warning not in self._warned:
                self._warned.add(warning)
                self._warn(f"{self._endpoint.model}: {warning}")

    def _describe_status(self, error: Any) -> str:
        if error.status_code in (401, 403):
            problem = "is set but refused" if os.environ.get(self._endpoint.key_variable) else "is not set"
            return (
                f"{self._endpoint.base_url}: {error.status_code}: the environment variable {self._endpoint.key_variable} "
                f"{problem} where the job runs"
            )
        remedy = _REMEDIES.get(error.status_code, "")
        return f"{self._endpoint.base_url}: {error.status_code} for model {self._endpoint.model!r}: {error.message}{remedy}"

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


def open_client(settings: programs.ApiRequest, inputs: Mapping[str, Path]) -> CachedClient:
    """Open the endpoint of a stage.

    Inputs: `endpoint`, a file with its configuration. The path of the file is the account for spending.
    """
    endpoint = Endpoint.model_validate_json(inputs["endpoint"].read_bytes())
    assert endpoint.identity() == settings.endpoint

    def warn(warning: str) -> None:
        log.warning(warning)
        file = warnings_file(inputs["endpoint"])
        write_json(sorted({*(read_json(file) or []), warning}), file)

    return CachedClient(endpoint, str(inputs["endpoint"]), warn=warn)


def warnings_file(endpoint: Path) -> Path:
    """Return the file with the warnings about an endpoint, a list of texts, beside the file with its configuration."""
    return endpoint.with_name(f"{endpoint.stem}-warnings.json")


def _describe_unanswered(refused: Sequence[Answer], total: int) -> str:
    counts = Counter(answer.finish_reason for answer in refused)
    reasons = [
        f"{counts[reason]} {text}"
        for reason, text in (("context_length_exceeded", "too long"), ("content_filter", "refused by moderation"))
        if counts[reason]
    ]
    return f"the server does not answer {len(refused)} of {total} questions ({', '.join(reasons)})"


def _messages(question: Question) -> list[Any]:
    system = [{"role": "system", "content": question.system}] if question.system else []
    return [*system, {"role": "user", "content": question.text}]
