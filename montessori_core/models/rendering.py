"""Render turns by a tokenizer's chat template, and find out how the template writes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from montessori_core.errors import UserError
from montessori_core.models.control_tokens import control_tokens, encode_rendered, mark_control_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Templates with today's date (Llama 3.2, SmolLM3) get this one: a run that lasts over midnight must not mix two prompts.
_TODAY = datetime(2024, 7, 26)
_DIRECTIVES = [f"%{modifier}{letter}" for modifier in ("-", "") for letter in "aAbBdeFHIjmMpSuUVwWyY"]
_DATE_MACRO = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{directive}', '{_TODAY.strftime(directive)}')" for directive in _DIRECTIVES)
    + " }}{% endmacro %}\n"
)


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
    return render_turns(tokenizer, [{"role": "user", "content": request}], add_generation_prompt=True)


def render_user_beginning(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Render the beginning of a conversation up to the text of the user's turn, which a model then writes.

    Raises:
        UserError: the template ends a user's turn with something other than a token that ends a generation.
    """
    request = "What is asked?"
    beginning, _, ending = render_prompt(tokenizer, request).partition(request)
    ids, _ = encode_rendered(tokenizer, ending)
    end = next((token for token in ids if token in turn_ends(tokenizer)), None)
    if end not in end_tokens(tokenizer):
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} ends a user's turn with {ending[:40]!r}, at which no generation "
            "ends; for synthesis.strategy: magpie set teacher.prompt_style: completion, or another chat template"
        )
    return beginning


def render_conversation(tokenizer: "PreTrainedTokenizerBase", instruction: str, response: str, follow_up: str) -> str:
    """Render the prompt for an answer to `follow_up`, after `instruction` and `response`."""
    turns = [*turns_of(instruction, response), {"role": "user", "content": follow_up}]
    return render_turns(tokenizer, turns, add_generation_prompt=True)


def turns_of(instruction: str, response: str) -> list[dict[str, str]]:
    """Return the two turns of an instruction and its response."""
    return [{"role": "user", "content": instruction}, {"role": "assistant", "content": response}]


def render_turns(
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
        return _apply(tokenizer, turns, turn_form(tokenizer).parts, add_generation_prompt)
    except TemplateError as error:
        raise UserError(
            f"{name}: the chat template of {tokenizer.name_or_path} refuses its turns "
            f"({', '.join(turn['role'] for turn in turns)}): {error}; correct or remove it, or set another chat template"
        ) from error


def _apply(
    tokenizer: "PreTrainedTokenizerBase", turns: Sequence[dict[str, str]], parts: bool, add_generation_prompt: bool
) -> str:
    marked = [turn | {"content": _content(mark_control_tokens(tokenizer, turn["content"]), parts)} for turn in turns]
    return str(
        tokenizer.apply_chat_template(
            marked, chat_template=dated_template(tokenizer), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    )


def turn_content(tokenizer: "PreTrainedTokenizerBase", content: str) -> Any:
    """Return the content of a turn in the form that the tokenizer's chat template takes."""
    return _content(content, turn_form(tokenizer).parts)


def _content(content: str, parts: bool) -> Any:
    return [{"type": "text", "text": content}] if parts else content


def takes_system_turn(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether the chat template takes a system turn; else its text is put before the first user turn."""
    return turn_form(tokenizer).system


@dataclass(frozen=True)
class TurnForm:
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


def turn_form(tokenizer: "PreTrainedTokenizerBase") -> TurnForm:
    """Return how the tokenizer's chat template writes turns."""
    return _probe_template(tokenizer, tokenizer.get_chat_template())


@lru_cache(maxsize=8)
def _probe_template(tokenizer: "PreTrainedTokenizerBase", template: str) -> TurnForm:
    """Render a conversation, to see how `template`, the tokenizer's template, writes turns.

    Raises:
        UserError: it does not write the text of both turns.
    """
    request, response = "What is asked?", "What is answered."
    failure = "it does not write the text of both turns, whether as text or as a list of parts"
    for parts in (False, True):
        try:
            text = _apply(tokenizer, turns_of(request, response), parts, add_generation_prompt=False)
        except (TemplateError, TypeError, ValueError, AttributeError, LookupError) as error:
            failure = str(error)
            continue
        if request in text and response in text:
            ending = text.rpartition(response)[2]
            return TurnForm(parts, ending, *_probe_conversation(tokenizer, turns_of(request, response), parts))
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


def end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the token that ends an assistant's turn: the first control token of the template after it.

    It may differ from the tokenizer's end token, which is the end of a text in base models (Qwen, Gemma). Templates without
    such a token get the tokenizer's.
    """
    ids, _ = encode_rendered(tokenizer, turn_form(tokenizer).ending)
    return next((token for token in ids if token in turn_ends(tokenizer)), int(tokenizer.eos_token_id))


def end_tokens(tokenizer: "PreTrainedTokenizerBase", generation_config: Any = None) -> set[int]:
    """Return the tokens that end a generation: the end of a turn, of a text, and those that the model's settings name."""
    named = generation_config.eos_token_id if generation_config is not None else None
    return {end_of_turn(tokenizer), tokenizer.eos_token_id, *([named] if isinstance(named, int) else named or [])}


def turn_ends(tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Return the tokens that may end a turn: control tokens, except that of the beginning."""
    return control_tokens(tokenizer).ids | {tokenizer.eos_token_id}
