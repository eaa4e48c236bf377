"""A control of a choice: other rows with the same lengths."""

import random
from bisect import bisect_left
from collections import deque

import numpy as np
import numpy.typing as npt


def match_lengths(lengths: npt.NDArray[np.int64], selected: npt.NDArray[np.bool_], seed: int) -> list[int]:
    """Return the positions of as many other rows as are selected, with lengths as near to theirs as possible.

    From the longest to the shortest, a selected row is replaced by the nearest in length that is not taken yet; among
    equally near ones `seed` decides. The selected rows themselves are taken only when no others remain.

    Args:
        lengths: [rows] tokens.
        selected: [rows] whether a row is selected.
        seed: of the draw.
    """
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    tokens, is_selected = lengths[order], selected[order]
    free = _Lengths(tokens, np.flatnonzero(~is_selected))
    matched = []
    for length in np.sort(tokens[is_selected])[::-1].tolist():
        if not free:
            free = _Lengths(tokens, np.flatnonzero(is_selected))
        matched.append(order[free.take_nearest(length)])
    return matched


class _Lengths:
    """Rows by their length, so that the nearest is found without a scan of all rows."""

    def __init__(self, tokens: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> None:
        by_length = rows[np.argsort(tokens[rows], kind="stable")]
        lengths, starts = np.unique(tokens[by_length], return_index=True)
        self._lengths: list[int] = lengths.tolist()
        self._rows: list[deque[int]] = (
            [deque(part.tolist()) for part in np.split(by_length, starts[1:])] if len(rows) else []
        )

    def __bool__(self) -> bool:
        return bool(self._lengths)

    def take_nearest(self, length: int) -> int:
        """Remove the first row of those nearest in length, and return it."""
        place = bisect_left(self._lengths, length)
        near = [index for index in (place - 1, place) if 0 <= index < len(self._lengths)]
        best = min(near, key=lambda index: (abs(self._lengths[index] - length), self._rows[index][0]))
        row = self._rows[best].popleft()
        if not self._rows[best]:
            del self._lengths[best], self._rows[best]
        return row
