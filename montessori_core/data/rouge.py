"""ROUGE-L F, exactly as the `rouge-score` package computes it (without stemmer), fast enough for all pairs.

`rouge-score` ignores all but ASCII letters and digits, so that it finds nothing in common between two Russian texts; here
words are those of any script (`data.words`).

Each text becomes a string with one character per word. The longest common subsequence of words is then that of characters,
which rapidfuzz computes bit-parallel and in batches.

Prefix filtering (Bayardo, Ma and Srikant, "Scaling up all pairs similarity search", WWW 2007) avoids most of these
computations. Texts of m and n words have F > t only if they share c words with 2c / (m + n) > t. Since c <= n, this
implies c > t m / (2 - t), for any n. Sort the words of all texts in one fixed order, rare words first. The first shared
word is followed by c - 1 more shared words in both texts, so it is not among the last c - 1 words of either. Only the
words before those, the *prefix*, are indexed and looked up; the number of matches gives a second bound on the shared words.
"""

import math
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cdist

from montessori_core.data.words import words
from montessori_core.errors import DataError

_SURROGATES = range(0xD800, 0xE000)  # code points that are not characters
_LAST = sys.maxunicode  # the character of unknown words if no other is left, and of no word of an accepted text
_SLACK = 1 - 1e-12  # tolerance of the bounds: F and the limit are rounded numbers


def f_measure(first: str, second: str) -> float:
    """Return ROUGE-L F of two texts, in [0, 1]: `RougeScorer(['rougeL']).score(a, b)['rougeL'].fmeasure` in English."""
    a, vocabulary = _encode(first, {})
    b, _ = _encode(second, vocabulary)
    common = np.array([LCSseq.similarity(a, b)])
    return float(_f(common, np.array([len(a)]), np.array([len(b)]))[0])


class RougeIndex:
    """A growing list of texts that rejects a text too similar to an earlier one."""

    def __init__(self, texts: Iterable[str] = (), max_rouge_l: float = 0.7) -> None:
        """Start with `texts`, unchecked. Later texts are accepted if their F with each text is at most `max_rouge_l`."""
        self._max = max_rouge_l
        self._vocabulary: dict[str, str] = {}
        self._codes: list[str] = []
        self._postings: dict[int, array[int]] = {}  # word -> texts with the word in their prefix
        # Per text: its length, the last word of its prefix, and the number of words after the prefix.
        self._lengths, self._ends, self._suffixes = array("i"), array("q"), array("i")
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return len(self._codes)

    def add(self, text: str) -> None:
        """Add a text, unchecked.

        Raises:
            DataError: the texts have too many different words.
        """
        code, new = _encode(text, self._vocabulary)
        if chr(_LAST) in code:
            raise DataError(
                f"the texts that are kept have more than {len(self._vocabulary):,} different words, too many for ROUGE-L; "
                "leave out its limit, or give fewer texts"
            )
        self._vocabulary |= new
        prefix = self._prefix(code)
        for word in prefix:
            self._postings.setdefault(word, array("i")).append(len(self._codes))
        self._codes.append(code)
        self._lengths.append(len(code))
        self._ends.append(prefix[-1] if prefix else 0)
        self._suffixes.append(len(code) - len(prefix))

    def nearest(self, text: str) -> int | None:
        """Return the index of the most similar accepted text above the limit (the first, if tied), or None."""
        code, _ = _encode(text, self._vocabulary)
        prefix = self._prefix(code)
        postings = [self._postings[word] for word in prefix if word in self._postings]
        if not postings:
            return None
        matches = np.sort(np.concatenate([np.frombuffer(texts, np.intc) for texts in postings]))
        starts = np.flatnonzero(np.diff(matches, prepend=-1))
        texts, shared = matches[starts], np.diff(starts, append=len(matches))
        # All shared words up to the earlier of the two prefix ends are counted in `shared`; the rest is bounded.
        earlier = np.frombuffer(self._ends, np.longlong)[texts] > prefix[-1]
        suffixes = np.where(earlier, np.frombuffer(self._suffixes, np.intc)[texts], len(code) - len(prefix))
        lengths = np.frombuffer(self._lengths, np.intc)[texts]
        bounds = np.minimum(shared + suffixes, np.minimum(lengths, len(code)))
        near = 2 * bounds >= self._max * (lengths + len(code)) * _SLACK
        texts, lengths = texts[near], lengths[near]
        if not len(texts):
            return None
        choices = [self._codes[index] for index in texts.tolist()]
        scores = _f(cdist([code], choices, scorer=LCSseq.similarity, dtype=np.int32)[0], np.array([len(code)]), lengths)
        best = scores.argmax()  # the first if tied: texts are in order of acceptance
        return int(texts[best]) if scores[best] > self._max else None

    def _prefix(self, code: str) -> list[int]:
        """Return the sorted words of a text without the last c - 1; c is the minimum shared with a text above the limit.

        Words are sorted by first appearance, latest first, since words that appear late are rare. The order of indexed
        words never changes. The second, third, ... occurrence of a word counts as another word, after all first ones.
        """
        ordered = sorted(
            (ord(word) - (n << 21) for word, count in Counter(code).items() for n in range(count)), reverse=True
        )
        minimum = max(1, math.ceil(self._max * len(code) / (2 - self._max) * _SLACK))
        return ordered[: len(code) - minimum + 1]


def _encode(text: str, vocabulary: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Return a text with one character per word, and the characters of the words that the vocabulary lacks."""
    codes = []
    new: dict[str, str] = {}
    for word in words(text):
        code = vocabulary.get(word) or new.get(word)
        if code is None:
            number = len(vocabulary) + len(new) + 1
            if number >= _SURROGATES.start:
                number += len(_SURROGATES)
            code = new[word] = chr(min(number, _LAST))
        codes.append(code)
    return "".join(codes), new


def _f(
    common: npt.NDArray[np.int32], first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Compute F from the common length with the operations of the `rouge-score` package, in its order."""
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = common / second, common / first
        f = 2 * precision * recall / (precision + recall)
    return np.where(common > 0, f, 0.0)
