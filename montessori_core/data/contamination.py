"""Contamination check: word n-grams that an evaluation set shares with training data."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from montessori_core.data.words import words

_FIXED_SHARE = 0.01  # of the items; a prompt's fixed text is in all items of a task, and MMLU has 57 tasks
_FIXED_ITEMS = 3  # at least, in a small set


def overlapping(items: Sequence[str], data: Iterable[str], n: int) -> list[bool]:
    """Find the items that share n consecutive words with a text of the data.

    Words are those of `data.words`: characters, in scripts without spaces. An item of fewer than n words overlaps if a text
    has all of them in a row; an item without words never does. N-grams of more than 1 % of the items, and at least three, do
    not count: they are fixed text of the prompts, as "What is the correct answer to this question". Only an item that has no
    other n-grams overlaps by them. Memory holds the 64-bit hashes of the items' n-grams, not
    the data.

    Args:
        items: the evaluation set.
        data: texts, read once.
        n: number of words in an n-gram, at least one.

    Returns:
        [items] whether each overlaps.
    """
    items_words = [words(item) for item in items]
    lengths = [min(n, len(item_words)) for item_words in items_words]
    item_ngrams = _without_fixed_text(list(map(_ngrams, items_words, lengths)))
    by_length: defaultdict[int, set[int]] = defaultdict(set)
    for length, hashes in zip(lengths, item_ngrams, strict=True):
        by_length[length] |= hashes
    shared: set[int] = set()
    for text in data:
        text_words = words(text)
        for length, hashes in by_length.items():
            shared |= hashes & _ngrams(text_words, length)
    return [not shared.isdisjoint(hashes) for hashes in item_ngrams]


def _without_fixed_text(item_ngrams: list[set[int]]) -> list[set[int]]:
    """Return the n-grams of each item without those of many items; all of them if it has no others."""
    counts = Counter(ngram for ngrams in item_ngrams for ngram in ngrams)
    share = _FIXED_SHARE * len(item_ngrams)
    fixed = {ngram for ngram, count in counts.items() if count >= _FIXED_ITEMS and count > share}
    return [ngrams - fixed or ngrams for ngrams in item_ngrams]


def _ngrams(text_words: list[str], length: int) -> set[int]:
    """Return the hashes of all runs of `length` words; an empty set for length 0."""
    if not length:
        return set()
    return {hash(" ".join(text_words[start : start + length])) for start in range(len(text_words) - length + 1)}
