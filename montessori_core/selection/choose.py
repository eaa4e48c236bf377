"""The best rows of a pool: by count or token budget, in turn of sources and targets, without near-duplicates; and controls.

Rules. The higher score is better; of equal scores, the earlier row. Rows without a score are never chosen. A token budget
ends at the first row that does not fit. With sources, each in turn, in the order of their names, gives its best row that is
left; with several scores, one per target, each in turn, in their order. A row that is too similar to a chosen one is skipped,
and its turn gives the next one.

A pass over the pool keeps the best rows of each turn in a heap: (score, position, size, turn), no texts. As many as are asked
for are enough: those that another target has chosen count, too. Near-duplicates are looked for among more candidates; if too
few remain, further passes take more.
"""

import heapq
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from montessori_core.data.cosine import CosineIndex
from montessori_core.data.rouge import RougeIndex
from montessori_core.errors import DataError
from montessori_core.program import Row
from montessori_core.selection.embeddings import Vectors
from montessori_core.selection.lengths import match_lengths
from montessori_core.selection.pools import Pool
from montessori_core.selection.texts import texts_of

Control = Literal["random", "length_matched"]
Turn = tuple[str, int]
"""What takes turns: a source, or '', and the number of a target."""
_SIZED = np.dtype([("position", np.int64), ("size", np.int64)])
_SLACK = 4  # candidates for each row that is asked for, where near-duplicates are skipped


@dataclass(frozen=True)
class Choice:
    """The rules of a choice.

    Attributes:
        by: columns of scores, one per target; each takes turns.
        rows: number of rows; None: `tokens` decides.
        tokens: token budget.
        per: column whose values take turns; None: no turns.
        max_rouge_l: limit of ROUGE-L F between the texts of chosen rows; None: any.
        max_similarity: limit of the cosine between their embeddings; None: any.
        token_column: tokens of a row, for a budget and for equal lengths.
    """

    by: tuple[str, ...]
    rows: int | None = None
    tokens: int | None = None
    per: str | None = None
    max_rouge_l: float | None = None
    max_similarity: float | None = None
    token_column: str = "response_tokens"

    @property
    def limit(self) -> int:
        """Rows, or tokens."""
        limit = self.tokens if self.rows is None else self.rows
        if limit is None or limit < 1:
            raise ValueError("a choice needs a positive number of rows or tokens")
        return limit


class Scored(NamedTuple):
    """A row of a pool with one of its scores. Tuples compare as rows do: the greater one is better."""

    score: float
    order: int
    size: int
    turn: Turn

    @property
    def position(self) -> int:
        """Position in the pool, from 0."""
        return -self.order


def scored_positions(pool: Pool, by: Sequence[str]) -> np.ndarray:
    """Return the [rows] positions of the rows that have a score in one of the columns `by`, in ascending order."""
    rows = enumerate(pool.rows(by))
    return np.fromiter((position for position, row in rows if _scores(pool, position, row, by)), np.int64)


def choose(
    pool: Pool, choice: Choice, control: Control | None = None, seed: int = 0, vectors: Vectors | None = None
) -> list[int]:
    """Return the positions of the chosen rows, best first.

    Args:
        pool: the rows.
        choice: the rules.
        control: 'random' chooses by a random score instead, with all other rules. 'length_matched' returns as many other
            rows, with tokens as near as possible to those of the chosen ones; chosen ones only if no others remain.
        seed: of a control.
        vectors: the rows' embeddings, for `max_similarity`.

    Raises:
        DataError: the pool cannot be read, a column is missing, or a value is not a number.
    """
    if control == "random":
        return _best(pool, choice, vectors, lambda: _randomised(_scored(pool, choice), seed))
    chosen = _best(pool, choice, vectors, lambda: _scored(pool, choice))
    if control is None:
        return chosen
    rows = np.unique(
        np.fromiter(((row.position, row.size) for row in _scored(pool, choice, sized=True)), _SIZED)
    )  # a row has a score per target
    matched = match_lengths(rows["size"], np.isin(rows["position"], chosen), seed)
    return [int(position) for position in rows["position"][matched]]


def _best(pool: Pool, choice: Choice, vectors: Vectors | None, read: Callable[[], Iterator[Scored]]) -> list[int]:
    slack = 1 if choice.max_rouge_l is choice.max_similarity is None else _SLACK
    limits: defaultdict[Turn, int] = defaultdict(lambda: slack * choice.limit)
    while True:
        heaps: dict[Turn, _Heap] = {}
        for row in read():
            if row.turn not in heaps:
                heaps[row.turn] = _Heap(limits[row.turn])
            heaps[row.turn].add(row)
        ranked = {turn: heaps[turn].ranked() for turn in sorted(heaps)}
        chosen, exhausted = _take(ranked, choice.limit, _accept(pool, choice, vectors, ranked))
        dropped = [turn for turn in exhausted if heaps[turn].dropped]
        if not dropped:
            return chosen
        for turn in dropped:
            limits[turn] *= _SLACK


class _Heap:
    """The best rows of a stream: the fewest whose sizes add up to a limit."""

    def __init__(self, limit: int) -> None:
        self._limit, self._size, self._heap = limit, 0, list[Scored]()
        self.dropped = False

    def add(self, row: Scored) -> None:
        heapq.heappush(self._heap, row)
        self._size += row.size
        while self._size - self._heap[0].size >= self._limit:
            self._size -= heapq.heappop(self._heap).size
            self.dropped = True

    def ranked(self) -> list[Scored]:
        """Return the rows, best first."""
        return sorted(self._heap, reverse=True)


def _take(
    ranked: Mapping[Turn, list[Scored]], limit: int, accept: Callable[[Scored], bool]
) -> tuple[list[int], list[Turn]]:
    """Take the best acceptable row of each turn; return their positions, and the turns that had too few."""
    queues = {turn: iter(rows) for turn, rows in ranked.items()}
    chosen: dict[int, None] = {}  # in their order
    exhausted: list[Turn] = []
    size = 0
    while queues:
        for turn, queue in list(queues.items()):
            row = next((row for row in queue if row.position not in chosen and accept(row)), None)
            if row is None:
                del queues[turn]
                exhausted.append(turn)
                continue
            if size + row.size > limit:
                return list(chosen), exhausted
            chosen[row.position] = None
            size += row.size
            if size == limit:
                return list(chosen), exhausted
    return list(chosen), exhausted


def _accept(
    pool: Pool, choice: Choice, vectors: Vectors | None, ranked: Mapping[Turn, list[Scored]]
) -> Callable[[Scored], bool]:
    """Return whether a row is unlike those accepted before."""
    candidates = {row.position for rows in ranked.values() for row in rows}
    accepted: list[tuple[RougeIndex | CosineIndex, Callable[[int], Any]]] = []
    if choice.max_similarity is not None and vectors is not None:
        vectors.add(candidates)
        accepted.append((CosineIndex(choice.max_similarity), vectors.of))
    if choice.max_rouge_l is not None:
        accepted.append((RougeIndex(max_rouge_l=choice.max_rouge_l), dict(texts_of(pool, candidates)).__getitem__))

    def accept(row: Scored) -> bool:
        compared = [(index, value_of(row.position)) for index, value_of in accepted]
        if any(index.nearest(value) is not None for index, value in compared):
            return False
        for index, value in compared:
            index.add(value)
        return True

    return accept


def _scored(pool: Pool, choice: Choice, sized: bool = False) -> Iterator[Scored]:
    """Yield the rows with a score, once for each; their size is 1, or their tokens if they count."""
    tokens = choice.token_column if sized or choice.rows is None else None
    columns = list(dict.fromkeys(filter(None, [*choice.by, tokens, choice.per])))
    for position, row in enumerate(pool.rows(columns)):
        scores = _scores(pool, position, row, choice.by)
        if not scores:
            continue
        size = _tokens(pool, position, row[tokens]) if tokens else 1
        source = str(row[choice.per]) if choice.per else ""
        for target, score in scores:
            yield Scored(score, -position, size, (source, target))


def _randomised(rows: Iterator[Scored], seed: int) -> Iterator[Scored]:
    draw = random.Random(seed)
    for row in rows:
        yield row._replace(score=draw.random())


def _scores(pool: Pool, position: int, row: Row, by: Sequence[str]) -> list[tuple[int, float]]:
    """Return (number of the target, score) pairs of the scores that a row has."""
    scores = ((target, _score(pool, position, row, name)) for target, name in enumerate(by))
    return [(target, score) for target, score in scores if score is not None]


def _score(pool: Pool, position: int, row: Row, by: str) -> float | None:
    """Return a row's score; None if it has none: null, NaN or infinite."""
    value = row[by]
    if value is None or value == "":
        return None
    score = number_in(value)
    if score is None:
        raise DataError(f"{pool.name}, row {position + 1}: {by!r} is {value!r:.50}; a score is a number")
    return score if math.isfinite(score) else None


def _tokens(pool: Pool, position: int, value: object) -> int:
    number = number_in(value)
    if number is None or number < 1 or not number.is_integer():
        raise DataError(
            f"{pool.name}, row {position + 1}: {value!r} is no number of tokens; name a column of whole numbers above 0 with "
            "--token-column"
        )
    return int(number)


def number_in(value: object) -> float | None:
    """Return a number, also one in a text, as a cell of CSV is; None for other values."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
