"""Read the responses of OpenAI-compatible servers: answers, refused questions and refused parameters.

Servers differ: in names of finish reasons, in the form of the content, and in the errors for a question they do not answer.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from montessori_core.models.thinking import split_answer

Refusal = Literal["content_filter", "context_length_exceeded"]
REFUSALS: tuple[Refusal, ...] = ("content_filter", "context_length_exceeded")
"""Finish reasons of questions that a server does not answer: by moderation, or because they are too long."""

_FINISH_REASONS = {
    "stop": ("end_turn", "stop_sequence", "eos", "eos_token", "end_of_text", "complete", "completed", "finished"),
    "length": ("max_tokens", "max_length", "model_length", "max_output_tokens"),
    "content_filter": ("safety", "refusal", "sensitive", "prohibited_content", "content_filtered", "blocklist", "spii"),
}
_FAILURES = ("error", "insufficient_system_resource", "abort", "aborted", "cancelled", "timeout", "overloaded")
"""Finish reasons of texts that the server did not finish, in responses without an error: OpenRouter's, DeepSeek's, vLLM's."""
_NORMALIZED = {name: reason for reason, names in _FINISH_REASONS.items() for name in (reason, *names)}
_BYTES_PER_TOKEN = 3  # few enough for text in any language, so that spending is seldom underestimated
_MODERATION = re.compile(
    r"content[ _]?(filter|policy|management|exists risk)|data_inspection_failed|requires moderation|invalid_prompt"
    r"|violat\w+ (of )?(\w+ ){0,3}(policy|policies|guidelines)|(input|prompt|content|request)\w* (\w+ ){0,2}flagged",
    re.IGNORECASE,
)
_TOO_LONG = re.compile(
    r"context[ _](length|window|size)|exceed_context_size|(prompt|input|request)( is)? too (long|large)"
    r"|maximum (allowed )?(input|prompt|sequence) length|too many (input )?tokens|input token count"
    r"|`inputs` tokens|string_above_max_length|too large for model",
    re.IGNORECASE,
)
_UNKNOWN = re.compile(
    r"unsupported|not (be )?support|unrecogni[sz]ed|unknown|unexpected|not permitted|not allowed|deprecated"
    r"|extra_forbidden|max_completion_tokens",
    re.IGNORECASE,
)
_NAMES = {"response_format": r"(?i)\bresponse_format\b|json_schema|structured[ _]outputs?"}
"""Words for parameters that servers call by other names."""


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

    @property
    def refused(self) -> bool:
        """Whether the server did not answer: see `REFUSALS`."""
        return self.finish_reason in REFUSALS and not self.text


def parse(completion: Any, prompt: str) -> tuple[Answer, bool]:
    """Parse a response; one that does not follow the API raises ValueError, TypeError, AttributeError or LookupError.

    The API allows null instead of text: for a refusal, or for a limit reached before the first word.

    Args:
        completion: the response.
        prompt: the text of the question, to estimate its tokens if the server does not report them.

    Returns:
        The answer, and whether its tokens are estimated.
    """
    choice = completion.choices[0]
    if choice.finish_reason and choice.finish_reason.lower() in _FAILURES:
        raise ValueError(f"the server did not finish the answer: finish_reason is {choice.finish_reason!r}")
    text, thinking = _texts(choice.message.content)
    for field in ("reasoning_content", "reasoning"):  # of servers that separate it
        separate = getattr(choice.message, field, None)
        thinking = separate if isinstance(separate, str) and separate else thinking
    reason = choice.finish_reason or ("stop" if text else "length")
    written, answer = split_answer(_without_surrogates(text))
    thinking = written if thinking is None else _without_surrogates(thinking)
    reported = [getattr(completion.usage, field, None) for field in ("prompt_tokens", "completion_tokens")]
    tokens = [
        estimate_tokens(source) if count is None else count
        for count, source in zip(reported, (prompt, text + (thinking or "")), strict=True)
    ]
    if not all(0 <= count < math.inf for count in tokens):
        raise ValueError(f"no numbers of tokens: {tokens}")
    counts = int(tokens[0]), int(tokens[1])
    reason = _NORMALIZED.get(reason.lower(), reason)
    return Answer(answer, reason, *counts, _first_token(choice), thinking), None in reported


def estimate_tokens(text: str) -> int:
    """Estimate the number of tokens of a text."""
    return math.ceil(len(text.encode(errors="replace")) / _BYTES_PER_TOKEN)


def _texts(content: Any) -> tuple[str, str | None]:
    """Return the text and the thinking of a message whose content is a text, null, or a list of parts."""
    if content is None or isinstance(content, str):
        return content or "", None
    if not isinstance(content, list):
        raise ValueError(f"content is neither text nor a list of parts: {type(content).__name__}")
    texts: list[str] = []
    thoughts: list[str] = []
    for part in content:
        kind = "text" if isinstance(part, str) else part["type"]
        if kind in ("text", "output_text"):
            texts.append(part if isinstance(part, str) else part["text"])
        elif kind in ("thinking", "reasoning"):
            thought = part.get(kind, part.get("text"))
            thoughts.append(_texts(thought)[0])
    return "".join(texts), "".join(thoughts) if thoughts else None


def _without_surrogates(text: str) -> str:
    """Replace lone surrogates, such as half of a cut emoji, which cannot be written to a file."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def _first_token(choice: Any) -> dict[str, float] | None:
    tokens = choice.logprobs.content if choice.logprobs else None
    if not tokens:
        return None
    likeliest = {token.token: float(token.logprob) for token in tokens[0].top_logprobs}
    if not all(map(math.isfinite, likeliest.values())):
        raise ValueError(f"no log-probabilities: {likeliest}")
    return likeliest


def refusal_of(error: Any) -> Refusal | None:
    """Return why a server refuses a question, from an `openai.APIStatusError`; None if the error is not about the question.

    A refused key (401, and 403 without a word about the content) is not about the question.
    """
    text = error_text(error)
    if error.status_code in (400, 413, 422) and _TOO_LONG.search(text):
        return "context_length_exceeded"
    if error.status_code in (400, 403, 422, 451) and _MODERATION.search(text):
        return "content_filter"
    return "context_length_exceeded" if error.status_code == 413 else None


def refused_parameter(error: Any, candidates: Iterable[str]) -> str | None:
    """Return the first of the candidates that an `openai.APIStatusError` names."""
    if error.status_code not in (400, 422):
        return None
    text, candidates = error_text(error), list(candidates)
    if error.param in candidates:
        return str(error.param)
    return next((name for name in candidates if re.search(_NAMES.get(name, rf"\b{name}\b"), text)), None)


def is_unknown_parameter(error: Any) -> bool:
    """Return whether an error says that a parameter is unknown or not supported, and not that its value is wrong."""
    return _UNKNOWN.search(error_text(error)) is not None


def error_text(error: Any) -> str:
    """Return what the server says about an error, without the texts that it repeats from the question."""
    body = error.body
    if not isinstance(body, Mapping):
        return str(body or error.message)
    return " ".join(
        value if isinstance(value, str) else json.dumps(value)
        for field in ("code", "type", "message", "detail")
        if (value := body.get(field)) is not None
    )
