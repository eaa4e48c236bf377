"""Generation engines behind one interface: vLLM on GPUs, transformers on CPUs.

Every continuation has a seed of its own: what is drawn for it depends on that seed and on the model's probabilities, not
on what else is generated. (The probabilities themselves vary in the last bits with the batch a continuation is in.)
"""

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from montessori_core.config import Sampling


@dataclass(frozen=True)
class Request:
    """A text to continue.

    Attributes:
        prompt: the text, rendered. Requests with the same prompt, or the same beginning, share the reading of it.
        seed: what the draws depend on; the n-th token takes the n-th draw.
        drawn: token ids with which the continuation begins, drawn by an earlier job.
    """

    prompt: str
    seed: int
    drawn: tuple[int, ...] = ()


@dataclass(frozen=True)
class Generated:
    """One continuation.

    Attributes:
        text: stop string included.
        tokens: how many were written.
        finish_reason: why it ended, 'stop' or 'length'.
        token_ids: what was drawn: the end token included, and a last token whole that goes on behind the stop string; None
            from an API.
    """

    text: str
    tokens: int
    finish_reason: str
    token_ids: list[int] | None = None


@dataclass(frozen=True)
class Step:
    """What a step of an engine brought.

    Attributes:
        finished: continuations that ended, by the index of their request.
        drafts: returns the token ids of unfinished continuations, by the index of their request. Valid until the next step.
        done: requests done so far; a fraction counts those at work. It never decreases.
    """

    finished: Mapping[int, Generated]
    drafts: Callable[[], dict[int, list[int]]]
    done: float


class Engine(Protocol):
    """A loaded model that continues texts."""

    def generate(self, requests: Sequence[Request], sampling: Sampling, stop: str | None) -> Iterator[Step]:
        """Continue every request, in an order of the engine's choice.

        Args:
            requests: what to continue.
            sampling: decoding parameters.
            stop: a string that ends a continuation and is kept at its end; the model's end token always ends it.
        """
        ...


class Progress:
    """Requests done, where a request at work counts by what is read and written of it.

    A continuation is expected to need as many tokens as those that ended needed on average, the limit while none has.
    """

    def __init__(self, reading: Sequence[float], limit: int) -> None:
        """`reading`: [requests] what reading each prompt costs, in written tokens; `limit`: most tokens written."""
        self._reading, self._limit = reading, limit
        self._ended = self._tokens = 0
        self._done = 0.0

    def end(self, tokens: int) -> None:
        """Count a continuation that ended."""
        self._ended += 1
        self._tokens += tokens

    def done(self, written: Iterable[tuple[int, int]]) -> float:
        """Return the requests done, given index and tokens so far of those whose prompts are read."""
        expected = max(1.0, self._tokens / self._ended) if self._ended else float(self._limit)
        shares = (
            (self._reading[index] + min(tokens, expected)) / (self._reading[index] + expected)
            for index, tokens in written
        )
        self._done = max(self._done, self._ended + sum(shares))
        return self._done


def continuations(steps: Iterable[Step]) -> list[Generated]:
    """Run an engine to its end; return [requests] continuations."""
    finished: dict[int, Generated] = {}
    for step in steps:
        finished |= step.finished
    return [finished[index] for index in range(len(finished))]


def open_engine(engine: str, model: str, tokenizer: Any) -> Engine:
    """Load `model` in the named engine; 'auto' is vLLM where it is installed, else transformers."""
    if engine == "auto":
        engine = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    if engine == "vllm":
        from montessori_core.synthesis.vllm_engine import VllmEngine

        return VllmEngine(model, tokenizer)
    from montessori_core.synthesis.transformers_engine import TransformersEngine

    return TransformersEngine(model, tokenizer)
