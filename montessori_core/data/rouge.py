"""ROUGE-L F, exactly as the `rouge-score` package computes it (no stemmer), and fast enough for every pair.

Instructions become strings with one character per word, so that the longest common subsequence of words is that of
characters, which rapidfuzz computes bit-parallel and many at a time. Few pairs need it. Texts of m and n words have F above
a limit t only if they have c words in common with 2c / (m + n) > t; as c <= n, that is c > t m / (2 - t), whatever n is.
Put the words of every text in one fixed order, rarer ones first: the first common word is followed by c - 1 more in both
texts, so it is not among the last c - 1 of either. Only the words before those, a text's *prefix*, are indexed and looked
up (prefix filtering: Bayardo, Ma and Srikant, "Scaling up all pairs similarity search", WWW 2007), and the number of those
found bounds what is common once more.
"""

import math
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cdist

_NOT_WORD = re.compile(r"[^a-z0-9]+")
_SURROGATES = range(0xD800, 0xE000)  # code points that no string may hold
_SLACK = 1 - 1e-12  # on bounds of the common length: F itself is rounded, and the limit a rounded number


def words(text: str) -> list[str]:
    """Tokens as `rouge_score.tokenize` makes them: lower case, runs of ASCII letters and digits."""
    return _NOT_WORD.sub(" ", text.lower()).split()


def f_measure(first: str, second: str) -> float:
    """ROUGE-L F of two texts, in [0, 1]; equal to `RougeScorer(['rougeL']).score(a, b)['rougeL'].fmeasure`."""
    vocabulary: dict[str, str] = {}
    a, b = _encode(first, vocabulary), _encode(second, vocabulary)
    common = np.array([LCSseq.similarity(a, b)])
    return float(_f(common, np.array([len(a)]), np.array([len(b)]))[0])


class RougeIndex:
    """A growing list of texts, none of which is too similar to an earlier one."""

    def __init__(self, texts: Iterable[str] = (), max_rouge_l: float = 0.7) -> None:
        """Start with `texts`, unchecked; later ones must stay at or below `max_rouge_l` with every one."""
        self._max = max_rouge_l
        self._vocabulary: dict[str, str] = {}
        self._codes: list[str] = []
        self._postings: dict[int, array[int]] = {}  # from a word to the texts that have it in their prefix
        # Of each text: its length, the last word of its prefix, and how many words come after the prefix.
        self._lengths, self._ends, self._rests = array("i"), array("q"), array("i")
        for text in texts:
            code = _encode(text, self._vocabulary)
            self._add(code, self._prefix(code))

    def __len__(self) -> int:
        return len(self._codes)

    def nearest(self, text: str) -> int | None:
        """Index of the first accepted text of the most similar that are above the limit, or None."""
        code = _encode(text, self._vocabulary)
        return self._nearest(code, self._prefix(code))

    def add_all(self, texts: Sequence[str]) -> list[bool]:
        """Go through `texts` in order, accept each that is not too similar to any accepted before, and say which."""
        verdicts: list[bool] = []
        for text in texts:
            code = _encode(text, self._vocabulary)
            prefix = self._prefix(code)
            verdicts.append(self._nearest(code, prefix) is None)
            if verdicts[-1]:
                self._add(code, prefix)
        return verdicts

    def _prefix(self, code: str) -> list[int]:
        """The words of a text without the last c - 1, c the fewest that it has in common with any text above the limit.

        The order is that of first appearance, latest first, since words that appear late are rare. It never changes
        for words that are indexed. A word's second, third, ... occurrence counts as another word, after all first ones.
        """
        ordered = sorted(
            (ord(word) - (n << 21) for word, count in Counter(code).items() for n in range(count)), reverse=True
        )
        fewest = max(1, math.ceil(self._max * len(code) / (2 - self._max) * _SLACK))
        return ordered[: len(code) - fewest + 1]

    def _add(self, code: str, prefix: list[int]) -> None:
        for word in prefix:
            self._postings.setdefault(word, array("i")).append(len(self._codes))
        self._codes.append(code)
        self._lengths.append(len(code))
        self._ends.append(prefix[-1] if prefix else 0)
        self._rests.append(len(code) - len(prefix))

    def _nearest(self, code: str, prefix: list[int]) -> int | None:
        postings = [self._postings[word] for word in prefix if word in self._postings]
        if not postings:
            return None
        found = np.sort(np.concatenate([np.frombuffer(texts, np.intc) for texts in postings]))
        starts = np.flatnonzero(np.diff(found, prepend=-1))
        texts, shared = found[starts], np.diff(starts, append=len(found))
        # Whichever prefix ends first in the order, all common words up to there are shared by both.
        earlier = np.frombuffer(self._ends, np.longlong)[texts] > prefix[-1]
        rests = np.where(earlier, np.frombuffer(self._rests, np.intc)[texts], len(code) - len(prefix))
        lengths = np.frombuffer(self._lengths, np.intc)[texts]
        most = np.minimum(shared + rests, np.minimum(lengths, len(code)))
        near = 2 * most >= self._max * (lengths + len(code)) * _SLACK
        texts, lengths = texts[near], lengths[near]
        if not len(texts):
            return None
        choices = [self._codes[index] for index in texts.tolist()]
        scores = _f(cdist([code], choices, scorer=LCSseq.similarity, dtype=np.int32)[0], np.array([len(code)]), lengths)
        best = scores.argmax()  # the first of the most similar: texts are in the order of acceptance
        return int(texts[best]) if scores[best] > self._max else None


def _encode(text: str, vocabulary: dict[str, str]) -> str:
    codes = []
    for word in words(text):
        code = vocabulary.get(word)
        if code is None:
            number = len(vocabulary) + 1
            if number >= _SURROGATES.start:
                number += len(_SURROGATES)
            code = vocabulary[word] = chr(number)
        codes.append(code)
    return "".join(codes)


def _f(
    common: npt.NDArray[np.int32], first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """F from the common length, in the operations and order of the `rouge-score` package."""
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = common / second, common / first
        f = 2 * precision * recall / (precision + recall)
    return np.where(common > 0, f, 0.0)
