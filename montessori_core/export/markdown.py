"""Markdown from untrusted text: names of models and files, settings, and what a model wrote."""

import html
import re
from collections.abc import Sequence

_SPECIAL = re.compile(r"([\\`*_\[\]|~])")


def escape(value: object) -> str:
    """Return a text as it is read on a page: on one line, without HTML, links, emphasis or control characters."""
    text = "".join(character if character.isprintable() else " " for character in str(value))
    return _SPECIAL.sub(r"\\\1", html.escape(" ".join(text.split()), quote=False))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table of escaped cells; an empty text without rows."""
    if not rows:
        return ""
    lines = [list(header), ["---"] * len(header), *([escape(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def fenced(text: str, language: str) -> str:
    """Return a text as a block of code; nothing in it ends the block."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"
