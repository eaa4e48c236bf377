"""Contamination check: word n-grams that an evaluation set shares with training data."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from montessori_core.data.words import words

TRAINING_SET = "training set"
"""What the rows `contamination` of `metrics.json` call the updated teacher's training set in `data`."""

_FIXED_ITEMS = 3  # at least, in a small task


def overlapping(items: Sequence[str], data: Iterable[str], n: int, tasks: Sequence[str] | None = None) -> list[bool]:
    """Find the items that share n consecutive words with a text of the data.

    Words are those of `data.words`: characters, in scripts without spaces. An item of fewer than n words overlaps if a text
    has all of them in a row; an item without words never does. N-grams of more than half of a task's items, and of at least
    three, do not count: they are fixed text of its prompts, such as "What is the correct answer to this question". Only an
    item that has no other n-grams overlaps by them. Memory holds the 64-bit hashes of the items' n-grams, not the data.

    Args:
        items: the evaluation set.
        data: texts, read once.
        n: number of words in an n-gram, at least one.
        tasks: [items] the task of each item; None: all are of one.

    Returns:
        [items] whether each overlaps.
    """
    items_words = [words(item) for item in items]
    lengths = [min(n, len(item_words)) for item_words in items_words]
    item_ngrams = _without_fixed_text(list(map(_ngrams, items_words, lengths)), tasks or [""] * len(items))
    by_length: defaultdict[int, set[int]] = defaultdict(set)
    for length, hashes in zip(lengths, item_ngrams, strict=True):
        by_length[length] |= hashes
    shared: set[int] = set()
    for text in data:
        text_words = words(text)
        for length, hashes in by_length.items():
            shared |= hashes & _ngrams(text_words, length)
    return [not shared.isdisjoint(hashes) for hashes in item_ngrams]


def _without_fixed_text(item_ngrams: Sequence[set[int]], tasks: Sequence[str]) -> list[set[int]]:
    """Return the n-grams of each item without those of most items of its task; all of them if it has no others."""
    sizes, counts = Counter(tasks), defaultdict[str, Counter[int]](Counter)
    for ngrams, task in zip(item_ngrams, tasks, strict=True):
        counts[task].update(ngrams)
    fixed = {
        task: {ngram for ngram, count in of_task.items() if count >= _FIXED_ITEMS and count > sizes[task] / 2}
        for task, of_task in counts.items()
    }
    return [ngrams - fixed[task] or ngrams for ngrams, task in zip(item_ngrams, tasks, strict=True)]


def _ngrams(text_words: list[str], length: int) -> set[int]:
    """Return the hashes of all runs of `length` words; an empty set for length 0."""
    if not length:
        return set()
    return {hash(" ".join(text_words[start : start + length])) for start in range(len(text_words) - length + 1)}
