"""Tokenize an instruction and a response, with the loss on the response only (Appendix A), or a conversation.

The loss mask comes from character offsets in the rendered chat template. Searching the response in the text would fail,
since templates trim and repeat their inputs.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from montessori_core.data.rows import EarlierTurn
from montessori_core.errors import UserError
from montessori_core.models.control_tokens import control_tokens, encode_rendered
from montessori_core.models.earlier_answers import Answer, find_answer, tokens_of
from montessori_core.models.rendering import (
    end_of_turn,
    render_turns,
    takes_system_turn,
    turn_ends,
    turn_form,
    turns_of,
)
from montessori_core.models.thinking import split_thinking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

IGNORED = -100  # label of a token without loss, as in torch's cross-entropy


@dataclass(frozen=True)
class Encoded:
    """A tokenized example.

    Attributes:
        input_ids: [tokens], prompt and response.
        labels: [tokens], the token id for response tokens, else IGNORED. Not shifted; the loss shifts them.
        truncated: whether the example was longer than the limit and its end was cut.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool

    @property
    def response_tokens(self) -> int:
        """Number of tokens with loss. The first token of a sequence has none, since nothing precedes it."""
        return sum(label != IGNORED for label in self.labels[1:])


def encode_example(
    tokenizer: "PreTrainedTokenizerBase",
    instruction: str,
    response: str,
    max_length: int,
    finished: bool = True,
    before: Sequence[EarlierTurn] = (),
    name: str = "an example",
) -> Encoded:
    """Tokenize an example for training or evaluation.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        instruction: the user's turn.
        response: the assistant's turn.
        max_length: tokens kept; the end is cut.
        finished: whether the response is complete, so that the end of its turn is trained too; a response that was cut at a
            token limit must not teach the student to stop there.
        before: earlier turns of a conversation. Answers of weight 1 carry loss, with the end of their turn, except those
            whose thinking the chat template leaves out: the student would not see what it is to write. A system turn that
            the template does not take is put before the first user turn.
        name: what errors call the example.

    Raises:
        UserError: the chat template refuses the turns, does not keep the prompt of an answer as a prefix of the
            conversation, or leaves out the thinking of the response.
    """
    earlier = [{"role": turn["role"], "content": turn["content"]} for turn in before]
    turns = without_system(tokenizer, [*earlier, *turns_of(instruction, response)])
    prompt = render_turns(tokenizer, turns[:-1], add_generation_prompt=True, name=name)
    text = render_turns(tokenizer, turns, add_generation_prompt=False, name=name)
    template = f"{name}: the chat template of {tokenizer.name_or_path}"
    if not text.startswith(prompt):
        raise UserError(
            f"{template} changes the prompt when the answer is added, so that the response cannot be separated from it; use "
            "a template whose generation prompt is a prefix of the conversation"
        )
    unmark = control_tokens(tokenizer).unmark
    if (thinking := split_thinking(response)[0]) and thinking not in unmark(text):
        raise UserError(
            f"{template} leaves out the thinking of the response ({thinking[:80]!r}); remove it from the set, or set a chat "
            "template that keeps it"
        )
    ids, offsets = encode_rendered(tokenizer, text)
    # A token across the border, such as a space of the prompt joined to the first word, belongs to the response.
    border = len(unmark(prompt))
    labels = [token if end > border else IGNORED for token, (_, end) in zip(ids, offsets, strict=True)]
    for answer in _earlier_answers(tokenizer, text, turns, before, template):
        places = tokens_of(answer, ids, offsets, end_of_turn(tokenizer))
        if places.start >= max_length:
            break  # it is cut, with those after it
        labels[places] = ids[places]
    written, length = _response_end(tokenizer, text, border, ids, offsets)
    if length > len(ids):
        ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
    ids, labels = ids[:length], labels[:length]
    if not finished:
        labels[written:] = [IGNORED] * (len(labels) - written)
    return Encoded(ids[:max_length], labels[:max_length], truncated=len(ids) > max_length)


def _response_end(
    tokenizer: "PreTrainedTokenizerBase", text: str, border: int, ids: list[int], offsets: list[tuple[int, int]]
) -> tuple[int, int]:
    """Return the number of tokens of prompt and response, and that with the end of the turn, without the text after it.

    If no token ends the turn, one is to be added.
    """
    unmark, ending, ends = control_tokens(tokenizer).unmark, turn_form(tokenizer).ending, turn_ends(tokenizer)
    response_end = len(unmark(text.removesuffix(ending))) if text.endswith(ending) else border
    written = sum(end <= response_end for _, end in offsets)
    return written, next((place for place in range(written, len(ids)) if ids[place] in ends), len(ids)) + 1


def without_system(tokenizer: "PreTrainedTokenizerBase", turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return turns with the text of a system turn before that of the first user turn, if the chat template takes none."""
    if turns[0]["role"] != "system" or takes_system_turn(tokenizer):
        return turns
    _report_system_turn(tokenizer.name_or_path)
    system, first, *others = turns
    return [first | {"content": f"{system['content']}\n\n{first['content']}"}, *others]


@lru_cache(maxsize=8)
def _report_system_turn(name: str) -> None:
    """Say once that a chat template takes no system turn."""
    log.warning("the chat template of %s takes no system turn: its text is put before the first user turn", name)


def _earlier_answers(
    tokenizer: "PreTrainedTokenizerBase",
    text: str,
    turns: list[dict[str, str]],
    before: Sequence[EarlierTurn],
    template: str,
) -> Iterator[Answer]:
    """Yield the earlier answers with loss, in characters of the rendered text without marks.

    Raises:
        UserError: the template, as an error names it, writes one differently when more turns follow.
    """
    unmark, between = control_tokens(tokenizer).unmark, turn_form(tokenizer).between

    def render(messages: Sequence[dict[str, str]], prompt: bool) -> str:
        return render_turns(tokenizer, messages, add_generation_prompt=prompt)

    moved = len(before) + 2 - len(turns)  # the system turn
    for position, turn in enumerate(before):
        if turn["weight"]:
            answer = find_answer(text, turns, position - moved, between, render)
            if answer is None:
                raise UserError(
                    f"{template} writes an earlier turn differently when more turns follow, so that its answer cannot be "
                    "trained as it would be written; set train_on: last for this data, or another chat template"
                )
            written = unmark(text[answer.begin : answer.end])
            if (split_thinking(turn["content"])[0] or "") in written:
                yield Answer(*(len(unmark(text[:place])) for place in (answer.begin, answer.end, answer.limit)))
