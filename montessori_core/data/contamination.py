"""Contamination check: word n-grams that an evaluation set shares with training data."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from montessori_core.data.words import words


def overlapping(items: Sequence[str], data: Iterable[str], n: int) -> list[bool]:
    """Find the items that share n consecutive words with a text of the data.

    Words are those of `data.words`: characters, in scripts without spaces. An item of fewer than n words overlaps if a text
    has all of them in a row; an item without words never does. Memory holds the 64-bit hashes of the items' n-grams, not
    the data.

    Args:
        items: the evaluation set.
        data: texts, read once.
        n: number of words in an n-gram, at least one.

    Returns:
        [items] whether each overlaps.
    """
    item_ngrams: list[set[int]] = []
    by_length: defaultdict[int, set[int]] = defaultdict(set)
    for item in items:
        item_words = words(item)
        length = min(n, len(item_words))
        item_ngrams.append(_ngrams(item_words, length))
        if item_words:
            by_length[length] |= item_ngrams[-1]
    shared: set[int] = set()
    for text in data:
        text_words = words(text)
        for length, hashes in by_length.items():
            shared |= hashes & _ngrams(text_words, length)
    return [not shared.isdisjoint(hashes) for hashes in item_ngrams]


def _ngrams(text_words: list[str], length: int) -> set[int]:
    """Return the hashes of all runs of `length` words; an empty set for length 0."""
    if not length:
        return set()
    return {hash(" ".join(text_words[start : start + length])) for start in range(len(text_words) - length + 1)}
