"""A growing list of vectors of norm 1 that finds one too similar to a new one, as `RougeIndex` does for texts."""

import numpy as np


class CosineIndex:
    """Accepted vectors.

    Args:
        max_cosine: limit of the cosine with any of them.
    """

    def __init__(self, max_cosine: float) -> None:
        self._max = max_cosine
        self._vectors, self._count = np.zeros((0, 0), np.float32), 0  # [capacity, features]

    def __len__(self) -> int:
        return self._count

    def add(self, vector: np.ndarray) -> None:
        """Add a [features] vector, unchecked."""
        if self._count == len(self._vectors):
            grown = np.zeros((max(64, 2 * self._count), len(vector)), np.float32)
            grown[: self._count] = self._vectors if self._count else 0.0
            self._vectors = grown
        self._vectors[self._count] = vector
        self._count += 1

    def nearest(self, vector: np.ndarray) -> int | None:
        """Return the index of the most similar accepted vector above the limit (the first, if tied), or None."""
        if not self._count:
            return None
        cosines = self._vectors[: self._count] @ vector
        best = int(cosines.argmax())
        return best if cosines[best] > self._max else None
