"""Shards that take much longer than others."""

import statistics


class Stopwatch:
    """How long shards take, by this driver's own clock: those of nodes may be off."""

    def __init__(self) -> None:
        self._begun: dict[int, float] = {}
        self._took: dict[int, float] = {}

    def look(self, at_work: set[int], done: set[int], now: float) -> None:
        """Note which shards are computed now and which are done."""
        for index in at_work:
            self._begun.setdefault(index, now)
        for index in list(self._begun):
            if index in done:
                self._took[index] = now - self._begun.pop(index)
            elif index not in at_work:
                del self._begun[index]  # its job was lost

    def slower_than(self, factor: float, now: float) -> set[int]:
        """Shards at work for so many times as long as the median shard took."""
        if not self._took:
            return set()
        limit = factor * statistics.median(self._took.values())
        return {index for index, begun in self._begun.items() if now - begun > limit}
