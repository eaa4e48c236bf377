"""A control of a choice: other rows with the same lengths."""

import random

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
    free, matched = ~is_selected, []
    for length in np.sort(tokens[is_selected])[::-1]:
        if not free.any():
            free = is_selected.copy()
        candidates = np.flatnonzero(free)
        nearest = candidates[np.argmin(np.abs(tokens[candidates] - length))]
        free[nearest] = False
        matched.append(order[nearest])
    return matched
