"""A Rich console that spells out control characters in untrusted text."""

import sys

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment

_STEERING = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
"""Control characters, which could move the cursor, rewrite what stands above or rename the window, and what they show as."""


class _Shown:
    """What is printed, its control characters spelled out; a few, such as the bell, Rich has left out before."""

    def __init__(self, content: ConsoleRenderable) -> None:
        self._content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._content, options):
            yield segment if segment.control else Segment(segment.text.translate(_STEERING), segment.style)


class _ShowAll(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Shown(content) for content in renderables]


def open_console() -> Console:
    """A console that prints ids of examples, names of tasks and paths as they are: no markup, no control sequences."""
    console = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 140)
    console.push_render_hook(_ShowAll())
    return console


console = open_console()
