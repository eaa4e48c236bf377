"""Check the turns of a row, and read them as an example, by stated rules: no turn is left out silently."""

from collections.abc import Sequence

from montessori_core.config import DataSource
from montessori_core.data.bad_rows import RowError
from montessori_core.data.formats import Turn
from montessori_core.data.rows import EarlierTurn


def read_turns(
    turns: Sequence[Turn], source: DataSource, where: str, with_response: bool, field: str
) -> tuple[str, str, tuple[EarlierTurn, ...]]:
    """Return instruction and response, the last of a conversation, and the turns before them.

    Args:
        turns: of the row.
        source: rules for several user turns (`turns`), for system turns (`system_turn`) and for the loss (`train_on`).
        where: place of the row, for errors.
        with_response: whether a response is needed; without it, a single instruction is read, and the response is empty.
        field: name of the data set's section, for errors.

    Raises:
        RowError: the row has turns that no rule covers, or lacks one.
    """
    systems = [turn for turn in turns if turn.role == "system"]
    _check_systems(systems, turns, source, where, with_response, field)
    spoken = [turn for turn in turns if turn.role != "system"]
    _check_order(spoken, where)
    starts = range(0, len(spoken), 2)
    if len(starts) > 1 and (source.turns == "refuse" or (source.turns == "all" and not with_response)):
        raise RowError(
            where,
            f"{len(starts)} user turns, where one is read; set {field}.turns to first or last, or split the conversation",
            "several user turns",
        )
    start = starts[0] if source.turns == "first" else starts[-1]
    if with_response and start + 1 == len(spoken):
        problem = "no answer of the assistant after the user's turn; add it or remove the row"
        raise RowError(where, problem, "no answer of the assistant")
    if with_response and not spoken[start + 1].trained:
        answer = f"field {spoken[start + 1].field!r}"
        if source.turns == "first":
            problem = f"{answer}: the first answer carries no loss (weight 0, or in the column prompt)"
            raise RowError(where, f"{problem}; set {field}.turns to all or last", "an untrained first answer")
        problem = f"{answer}: the last answer has weight 0, so that it carries no loss"
        raise RowError(where, f"{problem}; remove the turns after the last trained answer", "an untrained last answer")
    read = spoken[0 if source.turns == "all" else start : start + 1 + with_response]
    texts = [turn.text if turn.role == "assistant" else turn.text.strip() for turn in read]
    if systems and source.system_turn == "prepend":
        texts[0] = "\n\n".join([*(turn.text for turn in systems), texts[0]]).strip()
    before = [EarlierTurn(role="system", content=systems[0].text.strip(), weight=0)] if _keeps(systems, source) else []
    for turn, text in zip(read[: -1 - with_response], texts, strict=False):
        trained = turn.role == "assistant" and turn.trained and source.train_on == "all"
        before.append(EarlierTurn(role=turn.role, content=text, weight=int(trained)))
    instruction, *response = texts[-1 - with_response :]
    return instruction, "".join(response), tuple(before)


def _keeps(systems: Sequence[Turn], source: DataSource) -> bool:
    return bool(systems) and source.system_turn == "keep"


def _check_systems(
    systems: Sequence[Turn], turns: Sequence[Turn], source: DataSource, where: str, with_response: bool, field: str
) -> None:
    """Check that system turns may be there: a kept one is the first turn of an example with a response."""
    kept = _keeps(systems, source)
    if (systems and source.system_turn == "refuse") or (kept and not with_response):
        raise RowError(
            where,
            f"a system turn; set {field}.system_turn to prepend (its text comes before the instruction) or drop",
            "a system turn",
        )
    if kept and (len(systems) > 1 or turns[0].role != "system"):
        raise RowError(
            where,
            f"field {systems[-1].field!r}: a system turn after the first turn; set {field}.system_turn to prepend (its text "
            "comes before the instruction) or drop, or remove the row",
            "a system turn after the first turn",
        )


def _check_order(spoken: Sequence[Turn], where: str) -> None:
    """Check that turns of user and assistant alternate, the user's first."""
    for number, turn in enumerate(spoken):
        if turn.role != ("user", "assistant")[number % 2]:
            problem = (
                f"field {turn.field!r}: a turn of the {turn.role}, where turns of user and assistant must alternate"
            )
            raise RowError(where, f"{problem}, the user's first; correct or remove the row", "turns do not alternate")
    if not spoken:
        raise RowError(where, "no user turn; correct or remove the row", "no user turn")
