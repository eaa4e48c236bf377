"""The thinking of reasoning models, which write it before the answer, e.g. <think>...</think>."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator

from montessori_core.data.sources import Task

_MARKS = {
    "<think>": "</think>",  # DeepSeek R1, Qwen 3, GLM 4.5, SmolLM3
    "[THINK]": "[/THINK]",  # Magistral
    "<seed:think>": "</seed:think>",  # Seed-OSS
    "<|START_THINKING|>": "<|END_THINKING|>",  # Command A Reasoning
    "<|inner_prefix|>": "<|inner_suffix|>",  # Apertus
    "◁think▷": "◁/think▷",  # Kimi-VL
    "<|channel|>": "<|channel|>final<|message|>",  # gpt-oss: channels other than the final one
}
"""Beginning and end of thinking. Some are control tokens, which a decoded text does not have."""
OPENINGS = tuple(_MARKS)
NAMES = tuple(sorted({mark for pair in _MARKS.items() for mark in pair}, key=len, reverse=True))
"""All these marks, the longest first."""


def split_thinking(text: str, prompt: str = "") -> tuple[str | None, str]:
    """Return the thinking (None if there is none) and the answer; of unfinished thinking the answer is empty.

    Args:
        text: what a model wrote.
        prompt: the rendered prompt; templates of some models open the thinking there.
    """
    body, asked = text.lstrip(), prompt.rstrip()
    for opening, closing in _MARKS.items():
        if body.startswith(closing):
            return "", body.removeprefix(closing).lstrip()
        if body.startswith(opening) or asked.endswith(opening):
            thinking, closed, answer = body.removeprefix(opening).partition(closing)
            return thinking.strip(), answer.lstrip() if closed else ""
    return None, text


def split_answer(text: str) -> tuple[str | None, str]:
    """Split an answer of an API, whose prompt is unknown: it may have the end of the thinking alone."""
    opened = (opening for opening, closing in _MARKS.items() if closing in text and opening not in text)
    return split_thinking(text, next(opened, ""))


def without_thinking(text: str) -> str:
    """Return the answer of a text that begins with its thinking."""
    return split_thinking(text)[1]


Answered = Annotated[str, AfterValidator(without_thinking)]
"""An answer in a file: thinking is cut off, as it is of answers that a run generates."""


def is_cut_thinking(row: Mapping[str, Any]) -> bool:
    """Return whether a generated row has thinking but no answer."""
    return row["thinking"] is not None and not row["raw_output"].strip()


def thinking_warning(field: str, tasks: Iterable[Task]) -> list[str]:
    """Return a warning if responses of a human-written set begin with thinking; `field` names the set."""
    thinking = [
        task.example_id for task in tasks if any(split_thinking(text)[0] is not None for text in _answers(task))
    ]
    if not thinking:
        return []
    return [
        f"{field}: {len(thinking)} responses begin with thinking, e.g. that of {thinking[0]}. It counts as part of the "
        "response, while generated responses have none; remove it, unless the student is to write such thinking"
    ]


def _answers(task: Task) -> list[str]:
    return [task.response, *(turn["content"] for turn in task.before if turn["weight"])]
