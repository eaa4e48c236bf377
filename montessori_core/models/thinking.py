"""The thinking of reasoning models, which write it before the answer: <think>...</think>."""

_OPEN, CLOSE = "<think>", "</think>"


def split_thinking(text: str, prompt: str = "") -> tuple[str | None, str]:
    """Return the thinking (None if there is none) and the answer; of unfinished thinking the answer is empty.

    Args:
        text: what a model wrote.
        prompt: the rendered prompt; templates of some models open the thinking there.
    """
    body = text.lstrip()
    if not body.startswith(_OPEN) and not prompt.rstrip().endswith(_OPEN):
        return None, text
    thinking, closed, answer = body.removeprefix(_OPEN).partition(CLOSE)
    return thinking.strip(), answer.lstrip() if closed else ""


def split_answer(text: str) -> tuple[str | None, str]:
    """Split an answer of an API, whose prompt is unknown: it may have the end of the thinking alone."""
    return split_thinking(text, _OPEN if CLOSE in text and _OPEN not in text else "")
