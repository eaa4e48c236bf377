"""Generation engines behind one interface: vLLM on GPUs, transformers on CPUs.

Every sample has a seed of its own: what is drawn for it depends on that seed and on the model's probabilities, not on
which samples were drawn before. (The probabilities themselves vary in the last bits with the batch a sample is in.)
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from montessori_core.config import Sampling

Form = Literal["tagged", "whole", "request", "reply"]
"""A tagged or whole text is continued as it stands, a tagged one up to the closing tag; a request is put by the template, and
so is what follows a request and its answer, to get a reply."""


@dataclass(frozen=True)
class Request:
    """A text to continue, once for each seed."""

    prompt: str
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Generated:
    """One continuation: its text (stop string included), token count, and why it ended ('stop' or 'length')."""

    text: str
    tokens: int
    finish_reason: str


class Engine(Protocol):
    """A loaded model that continues texts."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, stop: str | None, report: Callable[[int], None]
    ) -> list[list[Generated]]:
        """Continue every request.

        Args:
            requests: [requests].
            sampling: decoding parameters.
            stop: a string that ends a continuation and is kept at its end; the model's end token always ends it.
            report: called with the number of requests finished so far.

        Returns:
            [requests][seeds] continuations, in the order asked for.
        """
        ...


def open_engine(engine: str, model: str, tokenizer: Any) -> Engine:
    """Load `model` in the named engine; 'auto' is vLLM where it is installed, else transformers."""
    if engine == "auto":
        engine = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    if engine == "vllm":
        from montessori_core.synthesis.vllm_engine import VllmEngine

        return VllmEngine(model, tokenizer)
    from montessori_core.synthesis.transformers_engine import TransformersEngine

    return TransformersEngine(model, tokenizer)
