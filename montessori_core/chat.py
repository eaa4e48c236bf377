"""From an instruction and a response to token ids, with the loss on the response alone (Appendix A).

The mask comes from character offsets in the rendered chat template, never from searching the response in the text:
templates trim and repeat what they are given.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from montessori_core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a token that carries no loss, as torch's cross-entropy has it


@dataclass(frozen=True)
class Encoded:
    """One example as the student sees it.

    Attributes:
        input_ids: [tokens], prompt and response.
        labels: [tokens], the token itself where it belongs to the response, else IGNORED. A label stands at the
            token's own position; the loss shifts it.
        truncated: the example was longer than the limit, and its end was cut.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool

    @property
    def response_tokens(self) -> int:
        """Tokens that carry loss. The first token of a sequence has nothing before it that could predict it."""
        return sum(label != IGNORED for label in self.labels[1:])


def text_beginning(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the token that a text begins with, as the model was trained; empty where its tokenizer puts none."""
    begins = list(tokenizer("")["input_ids"])[:1] == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if begins else ""


def render_prompt(tokenizer: "PreTrainedTokenizerBase", request: str) -> str:
    """The text a model continues to answer `request`, up to where its answer begins."""
    return str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": request}], tokenize=False, add_generation_prompt=True
        )
    )


def render_conversation(tokenizer: "PreTrainedTokenizerBase", instruction: str, response: str, follow_up: str) -> str:
    """The text a model continues to answer `follow_up`, after it answered `instruction` with `response`."""
    turns = [*_turns(instruction, response), {"role": "user", "content": follow_up}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def encode_example(
    tokenizer: "PreTrainedTokenizerBase",
    instruction: str,
    response: str,
    max_length: int,
    finished: bool = True,
    demonstration: tuple[str, str] | None = None,
) -> Encoded:
    """Tokenize an example for training or evaluation.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        instruction: the user's turn.
        response: the assistant's turn.
        max_length: tokens kept; the end is cut.
        finished: the response is whole, so its end token is trained too; a response that was cut at a token limit
            must not teach the student to stop there.
        demonstration: an instruction and a response that come before, as part of the prompt.

    Raises:
        UserError: the chat template does not keep the prompt as a prefix of the conversation.
    """
    before = _turns(*demonstration) if demonstration else []
    turns = [*before, *_turns(instruction, response)]
    prompt = str(tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True))
    text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    if not text.startswith(prompt):
        raise UserError(
            "the chat template changes the prompt once the answer is known, so that the response cannot be told from "
            "it; give the tokenizer a template whose generation prompt is a prefix of the conversation"
        )
    batch = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = list(batch["input_ids"])
    # A token on the border, such as a blank of the prompt joined to the first word, is the response's.
    labels = [
        token if end > len(prompt) else IGNORED for token, (_, end) in zip(ids, batch["offset_mapping"], strict=True)
    ]
    ids, labels = _end_at_end_token(ids, labels, tokenizer.eos_token_id, finished)
    return Encoded(ids[:max_length], labels[:max_length], truncated=len(ids) > max_length)


def _turns(instruction: str, response: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": instruction}, {"role": "assistant", "content": response}]


def _end_at_end_token(ids: list[int], labels: list[int], end: int, finished: bool) -> tuple[list[int], list[int]]:
    """Drop what the template writes after the assistant's end token; add that token where the template has none."""
    last = max((position for position, label in enumerate(labels) if label == end), default=None)
    if last is None:
        ids, labels = [*ids, end], [*labels, end]
    else:
        ids, labels = ids[: last + 1], labels[: last + 1]
    if not finished:
        labels[-1] = IGNORED
    return ids, labels
