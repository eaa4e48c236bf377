"""Reduce a conversation to an instruction and its response, by a stated rule: no turn is left out silently."""

from collections.abc import Sequence

from montessori_core.config import DataSource
from montessori_core.data.bad_rows import RowError
from montessori_core.data.formats import Turn


def instruction_and_response(
    turns: Sequence[Turn], source: DataSource, where: str, with_response: bool, field: str
) -> tuple[str, str]:
    """Return the instruction and the response of a conversation.

    Args:
        turns: of the row.
        source: rules for several user turns (`turns`) and for system turns (`system_turn`).
        where: place of the row, for errors.
        with_response: whether a response is needed; without it, the response is empty.
        field: name of the data set's section, for errors.

    Raises:
        RowError: the row has turns that no rule covers, or lacks one.
    """
    systems = [turn.text for turn in turns if turn.role == "system"]
    if systems and source.system_turn == "refuse":
        raise RowError(
            where,
            f"a system turn; set {field}.system_turn to prepend (its text comes before the instruction) or drop",
            "a system turn",
        )
    spoken = [turn for turn in turns if turn.role != "system"]
    for number, turn in enumerate(spoken):
        if turn.role != ("user", "assistant")[number % 2]:
            problem = (
                f"field {turn.field!r}: a turn of the {turn.role}, where turns of user and assistant must alternate"
            )
            raise RowError(where, f"{problem}, the user's first; correct or remove the row", "turns do not alternate")
    starts = range(0, len(spoken), 2)
    if not starts:
        raise RowError(where, "no user turn; correct or remove the row", "no user turn")
    if len(starts) > 1 and source.turns == "refuse":
        raise RowError(
            where,
            f"{len(starts)} user turns, where one is read; set {field}.turns to first or last, or split the conversation",
            "several user turns",
        )
    start = starts[0] if source.turns == "first" else starts[-1]
    if with_response and start + 1 == len(spoken):
        problem = "no answer of the assistant after the user's turn; add it or remove the row"
        raise RowError(where, problem, "no answer of the assistant")
    before = systems if source.system_turn == "prepend" else []
    instruction = "\n\n".join([*before, spoken[start].text]).strip()
    return instruction, spoken[start + 1].text if with_response else ""
