"""Tokenize an instruction and a response, with the loss on the response only (Appendix A), or a conversation.

The loss mask comes from character offsets in the rendered chat template. Searching the response in the text would fail,
since templates trim and repeat their inputs. Only the template can write control tokens: the text `<|im_end|>` in an
instruction does not end a turn.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from montessori_core.data.rows import EarlierTurn
from montessori_core.errors import UserError
from montessori_core.files import hash_json
from montessori_core.models.earlier_answers import Answer, find_answer, tokens_of
from montessori_core.models.thinking import NAMES, OPENINGS, split_thinking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger(__name__)

_MARK = "\u2060"
# Templates with today's date (Llama 3.2, SmolLM3) get this one: a run that lasts over midnight must not mix two prompts.
_TODAY = datetime(2024, 7, 26)
_DIRECTIVES = [f"%{modifier}{letter}" for modifier in ("-", "") for letter in "aAbBdeFHIjmMpSuUVwWyY"]
_DATE_MACRO = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{directive}', '{_TODAY.strftime(directive)}')" for directive in _DIRECTIVES)
    + " }}{% endmacro %}\n"
)
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


def dated_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the tokenizer's chat template, with a fixed date in place of today's."""
    template: str = tokenizer.get_chat_template()
    return _DATE_MACRO + template if "strftime_now" in template else template


def text_beginning(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the beginning-of-sequence token, or an empty string if the tokenizer adds none."""
    adds_bos = list(tokenizer("")["input_ids"])[:1] == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if adds_bos else ""


def render_prompt(tokenizer: "PreTrainedTokenizerBase", request: str) -> str:
    """Render the prompt for an answer to `request`; tokenize it with `encode_rendered`."""
    return _render(tokenizer, [{"role": "user", "content": request}], add_generation_prompt=True)


def render_user_beginning(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Render the beginning of a conversation up to the text of the user's turn, which a model then writes.

    Raises:
        UserError: the template ends a user's turn with something other than a token that ends a generation.
    """
    request = "What is asked?"
    beginning, _, ending = render_prompt(tokenizer, request).partition(request)
    ids, _ = encode_rendered(tokenizer, ending)
    end = next((token for token in ids if token in _end_tokens(tokenizer)), None)
    if end not in end_tokens(tokenizer):
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} ends a user's turn with {ending[:40]!r}, at which no generation "
            "ends; for synthesis.strategy: magpie set teacher.prompt_style: completion, or another chat template"
        )
    return beginning


def render_conversation(tokenizer: "PreTrainedTokenizerBase", instruction: str, response: str, follow_up: str) -> str:
    """Render the prompt for an answer to `follow_up`, after `instruction` and `response`."""
    turns = [*_turns(instruction, response), {"role": "user", "content": follow_up}]
    return _render(tokenizer, turns, add_generation_prompt=True)


def mark_control_tokens(tokenizer: "PreTrainedTokenizerBase", content: str) -> str:
    """Mark names of control tokens in the content of a turn, so that `encode_rendered` tokenizes them as characters.

    The mark is a word joiner, which is invisible, after the first character of each name. Names of thinking (`<think>`) are
    marked as well, unless the content begins with thinking: templates take what precedes a `</think>` for it.
    """
    patterns = _patterns(tokenizer)
    names = patterns.named if split_thinking(content)[0] is not None else patterns.with_thinking
    return names.sub(lambda match: _marked(match[0]), content)


def _marked(name: str) -> str:
    return f"{name[0]}{_MARK}{name[1:]}"


def encode_rendered(tokenizer: "PreTrainedTokenizerBase", text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokenize a rendered text: control tokens of the template are tokens, marked names are characters.

    Returns:
        [tokens] ids, and [tokens] (begin, end) offsets in the text without marks.
    """
    patterns = _patterns(tokenizer)
    if not patterns.marked.search(text):
        batch = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(batch["input_ids"]), list(batch["offset_mapping"])
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    start = 0
    # Split the text only at marks: some tokenizers add a space at the beginning of each text they tokenize.
    for marked, parts in groupby(patterns.named.split(text), lambda part: bool(patterns.marked.search(part))):
        plain = patterns.unmark("".join(parts))
        batch = tokenizer(plain, add_special_tokens=False, split_special_tokens=marked, return_offsets_mapping=True)
        ids += batch["input_ids"]
        offsets += [(start + first, start + last) for first, last in batch["offset_mapping"]]
        start += len(plain)
    return ids, offsets


def encode_plain(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Tokenize a text as plain characters, without control tokens; return [tokens] ids."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


@lru_cache(maxsize=8)
def hash_vocabulary(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the SHA-256 of a tokenizer's tokens and their ids."""
    return hash_json(tokenizer.get_vocab())


@dataclass(frozen=True)
class _Patterns:
    """A tokenizer's control tokens.

    Attributes:
        named: pattern of their names, as a group.
        with_thinking: pattern of their names and of those of thinking.
        marked: pattern of all these names, marked.
        ids: their ids.
    """

    named: re.Pattern[str]
    with_thinking: re.Pattern[str]
    marked: re.Pattern[str]
    ids: frozenset[int]

    def unmark(self, text: str) -> str:
        """Return a text without marks."""
        return self.marked.sub(lambda match: match[0].replace(_MARK, "", 1), text)


@lru_cache(maxsize=8)
def _patterns(tokenizer: "PreTrainedTokenizerBase") -> _Patterns:
    special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    names = set(special.values())
    patterns = (_any_of(names), _any_of(names | set(NAMES)), _any_of({_marked(name) for name in names | set(NAMES)}))
    return _Patterns(*patterns, frozenset(special) - {tokenizer.bos_token_id})


def _any_of(texts: set[str]) -> re.Pattern[str]:
    """Return the pattern of any of the texts, as a group; the longest that matches counts."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(texts, key=len, reverse=True))) or '(?!)'})")


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
    patterns = _patterns(tokenizer)
    if not any(map(patterns.named.fullmatch, OPENINGS)):
        return split_thinking(text, prompt)
    written = tokenizer.decode(token_ids, skip_special_tokens=False)
    thinking, answer = split_thinking(written, prompt)
    if thinking is None:
        return None, text
    thinking, before = (patterns.named.sub("", part) for part in (thinking, written.removesuffix(answer)))
    if answer and text.startswith(before):  # the text may end before the last token, at a stop string
        return thinking, text.removeprefix(before)
    return thinking, patterns.named.sub("", answer)


@dataclass(frozen=True)
class _Form:
    """How a chat template writes turns.

    Attributes:
        parts: whether it takes the content of a turn as a list of parts, as templates of multimodal models do.
        ending: text after an assistant's last turn.
        between: text between an assistant's turn and the user's next; None if it takes no further turn.
        system: whether it takes a system turn.
    """

    parts: bool
    ending: str
    between: str | None
    system: bool


def _form(tokenizer: "PreTrainedTokenizerBase") -> _Form:
    return _probe_template(tokenizer, tokenizer.get_chat_template())


@lru_cache(maxsize=8)
def _probe_template(tokenizer: "PreTrainedTokenizerBase", template: str) -> _Form:
    """Render a conversation, to see how `template`, the tokenizer's template, writes turns.

    Raises:
        UserError: it does not write the text of both turns.
    """
    request, response = "What is asked?", "What is answered."
    failure = "it does not write the text of both turns, whether as text or as a list of parts"
    for parts in (False, True):
        try:
            text = _apply(tokenizer, _turns(request, response), parts, add_generation_prompt=False)
        except (TemplateError, TypeError, ValueError, AttributeError, LookupError) as error:
            failure = str(error)
            continue
        if request in text and response in text:
            ending = text.rpartition(response)[2]
            return _Form(parts, ending, *_probe_conversation(tokenizer, _turns(request, response), parts))
    raise UserError(
        f"the chat template of {tokenizer.name_or_path} cannot render a user's and an assistant's turn: {failure}; use "
        "another chat_template.jinja"
    )


def _probe_conversation(
    tokenizer: "PreTrainedTokenizerBase", turns: list[dict[str, str]], parts: bool
) -> tuple[str | None, bool]:
    """Return the text that a template writes between `turns` and a further user turn, and whether it takes a system turn."""
    further, system = {"role": "user", "content": "What follows?"}, {"role": "system", "content": "What holds."}
    written: list[str] = []
    for conversation in ([*turns, further], [system, *turns]):
        try:
            written.append(_apply(tokenizer, conversation, parts, add_generation_prompt=False))
        except (TemplateError, TypeError, ValueError, AttributeError, LookupError):
            written.append("")
    between, follows, _ = written[0].partition(turns[-1]["content"])[2].partition(further["content"])
    return between if follows else None, system["content"] in written[1]


def takes_system_turn(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether the chat template takes a system turn; else its text is put before the first user turn."""
    return _form(tokenizer).system


def turn_content(tokenizer: "PreTrainedTokenizerBase", content: str) -> Any:
    """Return the content of a turn in the form that the tokenizer's chat template takes."""
    return _content(content, _form(tokenizer).parts)


def _content(content: str, parts: bool) -> Any:
    return [{"type": "text", "text": content}] if parts else content


def _apply(
    tokenizer: "PreTrainedTokenizerBase", turns: Sequence[dict[str, str]], parts: bool, add_generation_prompt: bool
) -> str:
    marked = [turn | {"content": _content(mark_control_tokens(tokenizer, turn["content"]), parts)} for turn in turns]
    return str(
        tokenizer.apply_chat_template(
            marked, chat_template=dated_template(tokenizer), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    )


def _render(
    tokenizer: "PreTrainedTokenizerBase",
    turns: Sequence[dict[str, str]],
    add_generation_prompt: bool,
    name: str = "a conversation",
) -> str:
    """Render turns; errors call them by `name`.

    Raises:
        UserError: the chat template refuses them.
    """
    try:
        return _apply(tokenizer, turns, _form(tokenizer).parts, add_generation_prompt)
    except TemplateError as error:
        raise UserError(
            f"{name}: the chat template of {tokenizer.name_or_path} refuses its turns "
            f"({', '.join(turn['role'] for turn in turns)}): {error}; correct or remove it, or set another chat template"
        ) from error


def end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the token that ends an assistant's turn: the first control token of the template after it.

    It may differ from the tokenizer's end token, which is the end of a text in base models (Qwen, Gemma). Templates without
    such a token get the tokenizer's.
    """
    ids, _ = encode_rendered(tokenizer, _form(tokenizer).ending)
    return next((token for token in ids if token in _end_tokens(tokenizer)), int(tokenizer.eos_token_id))


def _end_tokens(tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Return the tokens that may end a turn: control tokens, except that of the beginning."""
    return _patterns(tokenizer).ids | {tokenizer.eos_token_id}


def end_tokens(tokenizer: "PreTrainedTokenizerBase", generation_config: Any = None) -> set[int]:
    """Return the tokens that end a generation: the end of a turn, of a text, and those that the model's settings name."""
    named = generation_config.eos_token_id if generation_config is not None else None
    return {end_of_turn(tokenizer), tokenizer.eos_token_id, *([named] if isinstance(named, int) else named or [])}


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
    turns = _without_system(tokenizer, [*earlier, *_turns(instruction, response)])
    prompt = _render(tokenizer, turns[:-1], add_generation_prompt=True, name=name)
    text = _render(tokenizer, turns, add_generation_prompt=False, name=name)
    template = f"{name}: the chat template of {tokenizer.name_or_path}"
    if not text.startswith(prompt):
        raise UserError(
            f"{template} changes the prompt when the answer is added, so that the response cannot be separated from it; use "
            "a template whose generation prompt is a prefix of the conversation"
        )
    unmark = _patterns(tokenizer).unmark
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
    unmark, ending, ends = _patterns(tokenizer).unmark, _form(tokenizer).ending, _end_tokens(tokenizer)
    response_end = len(unmark(text.removesuffix(ending))) if text.endswith(ending) else border
    written = sum(end <= response_end for _, end in offsets)
    return written, next((place for place in range(written, len(ids)) if ids[place] in ends), len(ids)) + 1


def _without_system(tokenizer: "PreTrainedTokenizerBase", turns: list[dict[str, str]]) -> list[dict[str, str]]:
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
    unmark, between = _patterns(tokenizer).unmark, _form(tokenizer).between

    def render(messages: Sequence[dict[str, str]], prompt: bool) -> str:
        return _render(tokenizer, messages, add_generation_prompt=prompt)

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


def _turns(instruction: str, response: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": instruction}, {"role": "assistant", "content": response}]
