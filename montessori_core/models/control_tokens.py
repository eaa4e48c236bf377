"""Control tokens of a tokenizer: only a chat template can write them.

The text `<|im_end|>` in an instruction does not end a turn: its name is marked before the template is applied, and
tokenized as characters.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING

from montessori_core.files import hash_json
from montessori_core.models.thinking import NAMES, OPENINGS, split_thinking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "\u2060"


@dataclass(frozen=True)
class ControlTokens:
    """A tokenizer's control tokens.

    Attributes:
        named: pattern of their names, as a group.
        with_thinking: pattern of their names and of those of thinking.
        marked: pattern of all these names, marked.
        ids: their ids.
        trimming: ids of the added tokens that take the blanks after them, such as Phi 3's.
    """

    named: re.Pattern[str]
    with_thinking: re.Pattern[str]
    marked: re.Pattern[str]
    ids: frozenset[int]
    trimming: frozenset[int]

    def unmark(self, text: str) -> str:
        """Return a text without marks."""
        return self.marked.sub(lambda match: match[0].replace(_MARK, "", 1), text)


@lru_cache(maxsize=8)
def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> ControlTokens:
    """Return the tokenizer's control tokens."""
    added = tokenizer.added_tokens_decoder
    special = {number: token.content for number, token in added.items() if token.special}
    trimming = frozenset(number for number, token in added.items() if token.rstrip)
    names = set(special.values())
    patterns = (_any_of(names), _any_of(names | set(NAMES)), _any_of({_marked(name) for name in names | set(NAMES)}))
    return ControlTokens(*patterns, frozenset(special) - {tokenizer.bos_token_id}, trimming)


def _any_of(texts: set[str]) -> re.Pattern[str]:
    """Return the pattern of any of the texts, as a group; the longest that matches counts."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(texts, key=len, reverse=True))) or '(?!)'})")


def _marked(name: str) -> str:
    return f"{name[0]}{_MARK}{name[1:]}"


def mark_control_tokens(tokenizer: "PreTrainedTokenizerBase", content: str) -> str:
    """Mark names of control tokens in the content of a turn, so that `encode_rendered` tokenizes them as characters.

    The mark is a word joiner, which is invisible, after the first character of each name. Names of thinking (`<think>`) are
    marked as well, unless the content begins with thinking: templates take what precedes a `</think>` for it.
    """
    control = control_tokens(tokenizer)
    names = control.named if split_thinking(content)[0] is not None else control.with_thinking
    return names.sub(lambda match: _marked(match[0]), content)


def encode_rendered(tokenizer: "PreTrainedTokenizerBase", text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokenize a rendered text: control tokens of the template are tokens, marked names are characters.

    Returns:
        [tokens] ids, and [tokens] (begin, end) offsets in the text without marks. Blanks that an added token takes are in no
        offsets: they may be the first of an answer.
    """
    control = control_tokens(tokenizer)
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    start = 0
    # Split the text only at marks: some tokenizers add a space at the beginning of each text they tokenize.
    for marked, parts in groupby(control.named.split(text), lambda part: bool(control.marked.search(part))):
        plain = control.unmark("".join(parts))
        batch = tokenizer(plain, add_special_tokens=False, split_special_tokens=marked, return_offsets_mapping=True)
        ids += batch["input_ids"]
        for token, (first, last) in zip(batch["input_ids"], batch["offset_mapping"], strict=True):
            kept = len(plain[first:last].rstrip()) if token in control.trimming else last - first
            offsets.append((start + first, start + first + kept))
        start += len(plain)
    return ids, offsets


def encode_plain(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Tokenize a text as plain characters, without control tokens; return [tokens] ids."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


@lru_cache(maxsize=8)
def hash_vocabulary(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the SHA-256 of a tokenizer's tokens and their ids."""
    return hash_json(tokenizer.get_vocab())


def split_generated(
    tokenizer: "PreTrainedTokenizerBase", text: str, token_ids: Sequence[int], prompt: str
) -> tuple[str | None, str]:
    """Split what a local model wrote into thinking (None if there is none) and answer, as `split_thinking` does.

    Args:
        tokenizer: of the model; its marks of thinking may be control tokens.
        text: the decoded text, without control tokens.
        token_ids: the tokens drawn.
        prompt: the rendered prompt.
    """
    control = control_tokens(tokenizer)
    if not any(map(control.named.fullmatch, OPENINGS)):
        return split_thinking(text, prompt)
    written = tokenizer.decode(token_ids, skip_special_tokens=False)
    thinking, answer = split_thinking(written, prompt)
    if thinking is None:
        return None, text
    thinking, before = (control.named.sub("", part) for part in (thinking, written.removesuffix(answer)))
    if answer and text.startswith(before):  # the text may end before the last token, at a stop string
        return thinking, text.removeprefix(before)
    return thinking, control.named.sub("", answer)
