"""Pools of scored rows in memory."""

from typing import Any


class ListPool:
    """Rows in memory, whose passes are counted."""

    name, schema = "list", None

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows, self.passes = rows, 0

    def rows(self, columns: Any = None) -> Any:
        self.passes += 1
        return iter(self._rows)

    def take(self, positions: Any, columns: Any = None) -> Any:
        return ((position, self._rows[position]) for position in sorted(positions))
