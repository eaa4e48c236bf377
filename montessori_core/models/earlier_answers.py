"""Find the earlier answers of a conversation in its rendered text.

A chat template may write an earlier answer differently from the last one: that of Qwen 3 leaves out its thinking. An answer
is what the text of the whole conversation has between the prompt for the answer and the user's next turn. Its own text is not
searched for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from montessori_core.models.prefix import common_prefix

Message = dict[str, str]
Render = Callable[[Sequence[Message], bool], str]
"""Renders turns, with or without the beginning of an answer."""

_PROBES = ("\ue000", "\ue001")  # private characters, which no template trims


@dataclass(frozen=True)
class Answer:
    """An earlier answer, in characters of the rendered text.

    Attributes:
        begin, end: of the answer.
        limit: beginning of the user's next text.
    """

    begin: int
    end: int
    limit: int


def find_answer(
    text: str, turns: Sequence[Message], position: int, between: str | None, render: Render
) -> Answer | None:
    """Return the place of an answer that a user's turn follows.

    None if the template changes the prompt or the end of the answer when more turns follow.

    Args:
        text: the rendered conversation.
        turns: its turns.
        position: of the answer among them.
        between: what the template writes between an answer and the user's next text; None if it takes no further turn.
        render: renders turns.
    """
    prompt = render(turns[:position], True)
    probe = next(probe for probe in _PROBES if not turns[position + 1]["content"].lstrip().startswith(probe))
    limit = common_prefix(text, render([*turns[: position + 1], {"role": "user", "content": probe}], False))
    end = limit - len(between or "")
    if between is None or not text.startswith(prompt) or not text.endswith(between, end, limit) or end < len(prompt):
        return None
    return Answer(len(prompt), end, limit)


def tokens_of(answer: Answer, ids: Sequence[int], offsets: Sequence[tuple[int, int]], end_of_turn: int) -> slice:
    """Return the places of an answer's tokens, with the token that ends its turn if the template writes one.

    Args:
        answer: in characters of the text that was tokenized.
        ids: [tokens].
        offsets: [tokens] begin and end in the text.
        end_of_turn: the token that ends a turn.
    """
    # A token across a border belongs to the answer.
    first = next(place for place, (_, end) in enumerate(offsets) if end > answer.begin)
    after = next(place for place, (begin, _) in enumerate(offsets) if begin >= answer.end)
    ending = (place for place in range(after, len(ids)) if offsets[place][1] <= answer.limit)
    stop = next((place + 1 for place in ending if ids[place] == end_of_turn), after)
    return slice(first, stop)
