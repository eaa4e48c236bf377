"""BM25 relevance of documents to queries (Robertson and Zaragoza, "The Probabilistic Relevance Framework", 2009)."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from montessori_core.data.words import words

_SATURATION, _LENGTH = 1.2, 0.75  # k1 and b


def bm25(documents: Sequence[str], queries: Sequence[str]) -> npt.NDArray[np.float64]:
    """Return [documents] the mean relevance of each document to the queries.

    The weight of a word is ln(1 + (N - n + 0.5) / (n + 0.5)), for n of N documents with the word; it is never negative.
    A word that occurs twice in a query counts twice.
    """
    counts = [Counter(words(document)) for document in documents]
    lengths = [count.total() for count in counts]
    mean_length = sum(lengths) / len(documents) or 1.0
    containing = Counter(word for count in counts for word in count)
    asked = Counter(word for query in queries for word in words(query))
    weights = {
        word: times / len(queries) * math.log(1 + (len(documents) - containing[word] + 0.5) / (containing[word] + 0.5))
        for word, times in asked.items()
    }

    def relevance(count: Counter[str], length: int) -> float:
        penalty = _SATURATION * (1 - _LENGTH + _LENGTH * length / mean_length)
        return math.fsum(
            weights[word] * n * (_SATURATION + 1) / (n + penalty) for word, n in count.items() if word in weights
        )

    return np.array([relevance(count, length) for count, length in zip(counts, lengths, strict=True)])
