"""Texts accepted one after the other by a `RougeIndex`."""

from collections.abc import Sequence

from montessori_core.data.rouge import RougeIndex


def accept_all(index: RougeIndex, texts: Sequence[str]) -> list[bool]:
    """Accept, in order, each text that is not too similar to an accepted one; return [texts] whether accepted."""
    verdicts: list[bool] = []
    for text in texts:
        verdicts.append(index.nearest(text) is None)
        if verdicts[-1]:
            index.add(text)
    return verdicts
