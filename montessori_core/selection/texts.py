"""The texts of a pool's rows by which they are compared: instructions, or conversations before their last answer."""

from collections.abc import Iterator, Set

from montessori_core.data.formats import CONVERSATIONS
from montessori_core.errors import DataError
from montessori_core.export.sets import INSTRUCTION
from montessori_core.selection.pools import Pool, column_names

_PROMPT = "prompt"  # of TRL's prompt and completion


def texts_of(pool: Pool, positions: Set[int]) -> Iterator[tuple[int, str]]:
    """Yield (position, text) pairs of some rows, in order.

    Raises:
        DataError: the pool cannot be read, or a row has no text.
    """
    names = column_names(pool)
    column = next((name for name in (INSTRUCTION, *CONVERSATIONS, _PROMPT) if name in names), INSTRUCTION)
    for position, row in pool.take(positions, [column]):
        if row[column] is None:
            raise DataError(f"{pool.name}, row {position + 1}: no {column!r}, by which rows are compared")
        yield position, _text(row[column], column != _PROMPT)


def _text(value: object, has_answer: bool) -> str:
    if not isinstance(value, list):
        return str(value)
    texts = [turn.get("content", turn.get("value")) if isinstance(turn, dict) else turn for turn in value]
    return "\n\n".join(map(str, texts[: max(1, len(texts) - has_answer)]))
