"""The interface of generation engines: vLLM on GPUs, transformers on CPUs.

Every continuation has its seed. Its tokens depend on that seed and on the model's probabilities, not on other
continuations. (The last bits of the probabilities depend on the batch.)
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from montessori_core.config import Sampling


@dataclass(frozen=True)
class Request:
    """A text to continue.

    Attributes:
        prompt: the rendered text. A prompt, or a beginning, that several requests share is read once.
        seed: seed of the random numbers; the n-th token takes the n-th number.
        drawn: first token ids of the continuation, drawn by an earlier job.
    """

    prompt: str
    seed: int
    drawn: tuple[int, ...] = ()


@dataclass(frozen=True)
class Generated:
    """One continuation.

    Attributes:
        text: the text, including the stop string.
        tokens: number of tokens written.
        finish_reason: 'stop' or 'length'.
        token_ids: tokens drawn, including the end token. The last token may contain more than the end of the stop string.
            None from an API.
    """

    text: str
    tokens: int
    finish_reason: str
    token_ids: list[int] | None = None


@dataclass(frozen=True)
class Step:
    """The result of one step of an engine.

    Attributes:
        finished: continuations that ended in this step, by the index of their request.
        drafts: returns the token ids of unfinished continuations, by the index of their request. Valid until the next step.
        done: requests done so far, with fractions for unfinished ones. It never decreases.
    """

    finished: Mapping[int, Generated]
    drafts: Callable[[], dict[int, list[int]]]
    done: float


class Engine(Protocol):
    """A loaded model that continues texts.

    Attributes:
        positions: number of the model's positions; None if it has no limit.
    """

    positions: int | None

    def generate(self, requests: Sequence[Request], sampling: Sampling, stop: str | None) -> Iterator[Step]:
        """Continue every request, in any order.

        Args:
            requests: the texts to continue; each leaves a position of the model for its continuation.
            sampling: decoding parameters.
            stop: a string that ends a continuation and is included in it; the model's end token always ends it.
        """
        ...


class Progress:
    """Estimate how many requests are done; an unfinished request counts by its tokens read and written.

    The expected length of a continuation is the mean of those that ended, or the limit before the first one ends.
    """

    def __init__(self, read_costs: Sequence[float], limit: int) -> None:
        """`read_costs`: [requests] cost of reading each prompt, in written tokens; `limit`: most tokens written."""
        self._read_costs, self._limit = read_costs, limit
        self._finished = self._tokens = 0
        self._done = 0.0

    def end(self, tokens: int) -> None:
        """Count a continuation that ended."""
        self._finished += 1
        self._tokens += tokens

    def done(self, written: Iterable[tuple[int, int]]) -> float:
        """Return the requests done, given the index and the tokens written of each unfinished request that was read."""
        expected = max(1.0, self._tokens / self._finished) if self._finished else float(self._limit)
        shares = (
            (self._read_costs[index] + min(tokens, expected)) / (self._read_costs[index] + expected)
            for index, tokens in written
        )
        self._done = max(self._done, self._finished + sum(shares))
        return self._done
