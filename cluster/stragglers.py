"""Find shards that take much longer than others."""

import statistics


class Stopwatch:
    """Time shards by the driver's clock: the clocks of nodes may differ.

    How long shards took that ran before the first update, under an earlier driver, is not known.
    """

    def __init__(self) -> None:
        self._started: dict[int, float] = {}
        self._took: dict[int, float] = {}
        self._earlier: set[int] | None = None

    def update(self, running: set[int], done: set[int], now: float) -> None:
        """Record which shards are running and which are done."""
        if self._earlier is None:
            self._earlier = set(running)
        for index in running:
            self._started.setdefault(index, now)
        for index in list(self._started):
            if index not in done and index in running:
                continue
            started = self._started.pop(index)
            if index in done and index not in self._earlier:
                self._took[index] = now - started
            self._earlier.discard(index)  # it ended, or its job was lost

    def slower_than(self, factor: float, now: float) -> set[int]:
        """Return the shards that have run for `factor` times the median duration of finished shards."""
        if not self._took:
            return set()
        limit = factor * statistics.median(self._took.values())
        return {index for index, started in self._started.items() if now - started > limit}
