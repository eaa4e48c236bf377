"""ROUGE-L F, exactly as the `rouge-score` package computes it (no stemmer), and fast enough for every pair.

Instructions become strings with one character per word, so that the longest common subsequence of words is that of
characters, which rapidfuzz computes bit-parallel and many at a time. F lies above a threshold t only if the lengths m, n
satisfy 2 min(m, n) / (m + n) > t, so that most lengths need no comparison at all.
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cdist

_NOT_WORD = re.compile(r"[^a-z0-9]+")
_SURROGATES = range(0xD800, 0xE000)  # code points that no string may hold
_BLOCK = 256


def words(text: str) -> list[str]:
    """Tokens as `rouge_score.tokenize` makes them: lower case, runs of ASCII letters and digits."""
    return _NOT_WORD.sub(" ", text.lower()).split()


def f_measure(first: str, second: str) -> float:
    """ROUGE-L F of two texts, in [0, 1]; equal to `RougeScorer(['rougeL']).score(a, b)['rougeL'].fmeasure`."""
    vocabulary: dict[str, str] = {}
    a, b = _encode(first, vocabulary), _encode(second, vocabulary)
    common = np.array([LCSseq.similarity(a, b)])
    return float(_f(common, np.array([len(a)]), np.array([len(b)]))[0])


class Accepted:
    """A growing list of texts, none of which is too similar to an earlier one."""

    def __init__(self, texts: Iterable[str] = (), max_rouge_l: float = 0.7) -> None:
        """Start with `texts`, unchecked; later ones must stay at or below `max_rouge_l` with every one."""
        self._max = max_rouge_l
        self._vocabulary: dict[str, str] = {}
        self._by_length: dict[int, list[str]] = {}
        self._indices: dict[int, list[int]] = {}
        self._count = 0
        for text in texts:
            self._add(_encode(text, self._vocabulary))

    def __len__(self) -> int:
        return self._count

    def nearest(self, text: str) -> int | None:
        """Index of the first accepted text of the most similar that are above the limit, or None."""
        return self._matches([_encode(text, self._vocabulary)])[0]

    def add_all(self, texts: Sequence[str]) -> list[bool]:
        """Go through `texts` in order, accept each that is not too similar to any accepted before, and say which."""
        verdicts: list[bool] = []
        for start in range(0, len(texts), _BLOCK):
            block = [_encode(text, self._vocabulary) for text in texts[start : start + _BLOCK]]
            known = self._matches(block)
            lengths = np.array([len(code) for code in block])
            within = _f(_common(block, block), lengths[:, None], lengths[None, :]) > self._max
            kept: list[int] = []
            for index, code in enumerate(block):
                accept = known[index] is None and not within[index, kept].any()
                if accept:
                    kept.append(index)
                    self._add(code)
                verdicts.append(accept)
        return verdicts

    def _add(self, code: str) -> None:
        self._by_length.setdefault(len(code), []).append(code)
        self._indices.setdefault(len(code), []).append(self._count)
        self._count += 1

    def _matches(self, block: list[str]) -> list[int | None]:
        found: list[int | None] = [None] * len(block)
        by_length: dict[int, list[int]] = {}
        for index, code in enumerate(block):
            by_length.setdefault(len(code), []).append(index)
        for length, members in by_length.items():
            lengths = [n for n in self._by_length if 2 * min(n, length) > self._max * (n + length)]
            if not lengths:
                continue
            choices = [code for n in lengths for code in self._by_length[n]]
            indices = np.array([index for n in lengths for index in self._indices[n]])
            sizes = np.array([len(code) for code in choices])
            scores = _f(_common([block[i] for i in members], choices), np.array([length]), sizes[None, :])
            for member, row in zip(members, scores, strict=True):
                best = row.max()
                if best > self._max:
                    found[member] = int(indices[row == best].min())
        return found


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


def _common(first: list[str], second: list[str]) -> npt.NDArray[np.int32]:
    """Lengths of the longest common subsequences, [first, second]."""
    return cdist(first, second, scorer=LCSseq.similarity, dtype=np.int32)


def _f(
    common: npt.NDArray[np.int32], first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """F from the common length, in the operations and order of the `rouge-score` package."""
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = common / second, common / first
        f = 2 * precision * recall / (precision + recall)
    return np.where(common > 0, f, 0.0)
