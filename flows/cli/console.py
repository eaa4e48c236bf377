"""A Rich console that escapes control characters in untrusted text."""

import sys

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment

_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
"""Escapes of control characters, which could move the cursor, overwrite earlier lines or rename the window."""


class _Escaped:
    """Renderable with escaped control characters; Rich itself removes a few, such as the bell."""

    def __init__(self, content: ConsoleRenderable) -> None:
        self._content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._content, options):
            yield segment if segment.control else Segment(segment.text.translate(_ESCAPES), segment.style)


class _EscapeHook(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Escaped(content) for content in renderables]


def open_console() -> Console:
    """Open a console that prints ids, names and paths literally: no markup, no control sequences."""
    console = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 140)
    console.push_render_hook(_EscapeHook())
    return console


console = open_console()
