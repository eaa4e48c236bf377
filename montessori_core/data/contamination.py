"""Whether synthetic data holds what a model is evaluated on: n-grams of words that an evaluation set shares with it."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

_WORD = re.compile(r"[^\W_]+")


def overlapping(items: Sequence[str], data: Iterable[str], n: int) -> list[bool]:
    """Which items share n words in a row with a text of the data.

    Words are runs of letters and digits, in lower case (phrases, in scripts without blanks). An item of fewer than n words
    overlaps if all of them stand in a row in a text; one without any never does. Memory is taken by the items alone
    (64-bit hashes of their n-grams), not by the data.

    Args:
        items: the evaluation set.
        data: texts, read once.
        n: words of an n-gram.

    Returns:
        [items] whether each overlaps.
    """
    if n < 1:
        raise ValueError(f"n = {n}: an n-gram has at least one word")
    of_items: list[set[int]] = []
    wanted: defaultdict[int, set[int]] = defaultdict(set)
    for item in items:
        words = _words(item)
        length = min(n, len(words))
        of_items.append(_ngrams(words, length))
        if words:
            wanted[length] |= of_items[-1]
    shared: set[int] = set()
    for text in data:
        words = _words(text)
        for length, hashes in wanted.items():
            shared |= hashes & _ngrams(words, length)
    return [not shared.isdisjoint(hashes) for hashes in of_items]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _ngrams(words: list[str], length: int) -> set[int]:
    """Hashes of all runs of `length` words; none of length 0."""
    if not length:
        return set()
    return {hash(" ".join(words[start : start + length])) for start in range(len(words) - length + 1)}
