"""Rows of the field's formats as turns of a conversation: Alpaca, messages, ShareGPT, TRL's prompt and completion."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from montessori_core.config import DataFormat, DataSource
from montessori_core.data.bad_rows import RowError
from montessori_core.data.jsonl import parse_json

Role = Literal["system", "user", "assistant"]
_ABSENT = object()
_ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "model"), "assistant"),
}
_KEYS = {"messages": ("role", "content"), "sharegpt": ("from", "value")}
CONVERSATIONS = ("messages", "conversations", "conversation")
"""Columns with a list of turns, in the order in which they are looked for."""
_DEFAULT_FIELDS = ("instruction", "input", "output")


@dataclass(frozen=True)
class Turn:
    """A turn of a conversation.

    Attributes:
        role: who speaks.
        text: what is said.
        field: the field that holds the text, for errors.
        trained: whether an assistant's turn may carry loss.
    """

    role: Role
    text: str
    field: str
    trained: bool = True


def recognise(row: Mapping[str, Any], source: DataSource) -> DataFormat:
    """Return the format of a row: the one that is set, else by its columns.

    Set names of columns mean Alpaca; so does a column `instruction`. A list of turns is messages or ShareGPT, by the keys
    of its turns. Any other row counts as Alpaca, so that the error names its fields.
    """
    if source.format != "auto":
        return source.format
    if source.conversation_field is None:
        renamed = (source.instruction_field, source.input_field, source.output_field) != _DEFAULT_FIELDS
        if renamed or source.instruction_field in row:
            return "alpaca"
    name = _conversation_field(row, source)
    if name is not None:
        turns = _decoded(_look_up(row, name))
        first = turns[0] if isinstance(turns, list) and turns else None
        if isinstance(first, dict) and ("from" in first or "role" in first):
            return "sharegpt" if "from" in first else "messages"
        return "messages" if name == "messages" else "sharegpt"
    if source.conversation_field is not None:
        return "messages"  # whose error names the missing field
    return "prompt_completion" if "prompt" in row else "alpaca"


def turns_of(
    row: Mapping[str, Any], source: DataSource, format: DataFormat, where: str, with_response: bool, section: str
) -> list[Turn]:
    """Return the turns of a row.

    Args:
        row: its columns.
        source: names of its columns.
        format: of the row.
        where: place of the row, for errors.
        with_response: whether a response is read.
        section: name of the data set's section, for errors.

    Raises:
        RowError: a field is missing, null or no text.
    """
    if format == "alpaca":
        return _alpaca_turns(row, source, where, with_response, section)
    before = _system_turn(row)
    if format == "prompt_completion":
        # As in TRL, only the completion carries loss.
        turns = [replace(turn, trained=False) for turn in _text_or_turns(row, "prompt", "user", where, section)]
        return (
            before + turns + (_text_or_turns(row, "completion", "assistant", where, section) if with_response else [])
        )
    field = _conversation_field(row, source)
    if field is None:
        name = source.conversation_field or CONVERSATIONS[format == "sharegpt"]
        raise _missing(row, name, where, f"{section}.conversation_field")
    turns = _turn_list(_decoded(_look_up(row, field)), field, format, where, section)
    given = any(turn.role == "system" for turn in turns)
    return turns if given else before + turns


def _alpaca_turns(
    row: Mapping[str, Any], source: DataSource, where: str, with_response: bool, section: str
) -> list[Turn]:
    names = (source.instruction_field, source.input_field, source.output_field)
    instruction = _text(_field(row, names[0], where, f"{section}.instruction_field"), names[0], where)
    value = _look_up(row, names[1])
    addition = "" if value is _ABSENT or value is None else _check_text(value, names[1], where)
    turns = [Turn("user", f"{instruction} {addition}".strip(), names[0])]
    if with_response:
        response = _field(row, names[2], where, f"{section}.output_field")
        turns.append(Turn("assistant", _text(response, names[2], where), names[2]))
    if names != _DEFAULT_FIELDS:
        return turns  # columns of another name have another meaning
    return _system_turn(row) + _history(row, where) + turns


def _history(row: Mapping[str, Any], where: str) -> list[Turn]:
    """Return the earlier turns that LLaMA-Factory's Alpaca format has, a list of pairs."""
    history = row.get("history")
    if not isinstance(history, list):
        return []  # a column with another meaning
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        problem = "field 'history' has entries that are no pairs of an instruction and a response; correct or remove it"
        raise RowError(where, problem, "a history that has no pairs")
    roles: tuple[Role, Role] = ("user", "assistant")
    names = [(role, f"history.{number}.{place}") for number in range(len(history)) for place, role in enumerate(roles)]
    texts = [text for pair in history for text in pair]
    return [Turn(role, _text(text, name, where), name) for (role, name), text in zip(names, texts, strict=True)]


def _system_turn(row: Mapping[str, Any]) -> list[Turn]:
    """Return the turn in the column `system`, which a row may have."""
    text = row.get("system")
    return [Turn("system", text, "system")] if isinstance(text, str) and text.strip() else []


def _text_or_turns(row: Mapping[str, Any], name: str, role: Role, where: str, section: str) -> list[Turn]:
    options = f"{section}.instruction_field or {section}.output_field, or set {section}.format"
    value = _decoded(_field(row, name, where, options))
    return (
        _turn_list(value, name, "messages", where, section)
        if isinstance(value, list)
        else [Turn(role, _text(value, name, where), name)]
    )


def _turn_list(value: Any, field: str, format: DataFormat, where: str, section: str) -> list[Turn]:
    if value is None:
        raise _null(field, where)
    if not isinstance(value, list):
        as_json = "; write it as JSON, with role and content of each turn" if isinstance(value, str) else ""
        raise RowError(
            where, f"field {field!r} is {type(value).__name__}, expected a list of turns{as_json}", "no list of turns"
        )
    if not value:
        raise RowError(
            where, f"field {field!r} is an empty list; fill it or remove the row", f"field {field!r} is empty"
        )
    return [_turn(turn, f"{field}.{number}", format, where, section) for number, turn in enumerate(value)]


def _turn(turn: Any, field: str, format: DataFormat, where: str, section: str) -> Turn:
    role_key, text_key = _KEYS[format]
    if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
        content = ", ".join(map(str, turn)) if isinstance(turn, dict) else type(turn).__name__
        raise RowError(
            where,
            f"field {field!r}: a turn of the format {format} has {role_key} and {text_key} (found: {content}); set "
            f"{section}.format",
            f"a turn without {role_key} or {text_key}",
        )
    role = _ROLES.get(turn[role_key]) if isinstance(turn[role_key], str) else None
    if role is None:
        raise RowError(
            where,
            f"field {field}.{role_key!s} is {turn[role_key]!r}, expected one of {', '.join(_ROLES)}; turns of tools are not "
            "read, remove the row",
            "a turn of another role",
        )
    for calls in ("tool_calls", "function_call"):
        if turn.get(calls):  # without the call, the student would learn to announce it and end its turn
            problem = f"field '{field}.{calls}': the assistant calls tools, which is not read; remove the row"
            raise RowError(where, problem, f"a turn with {calls}")
    name = f"{field}.{text_key}"
    text = _text(_joined_parts(turn[text_key], name, where), name, where)
    return Turn(role, text, name, role != "assistant" or _carries_loss(turn.get("weight"), f"{field}.weight", where))


def _carries_loss(weight: Any, field: str, where: str) -> bool:
    """Return whether an answer carries loss, by its weight in OpenAI's format; without a weight it does."""
    if weight not in (None, 0, 1):
        problem = f"field {field!r} is {weight!r}, expected 0 (no loss) or 1; correct or remove it"
        raise RowError(where, problem, "a weight other than 0 and 1")
    return bool(weight != 0)


def _decoded(value: Any) -> Any:
    """Return the list of turns that a text holds as JSON, as a cell of a CSV file does; any other value unchanged."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        turns = parse_json(value, "")
    except (json.JSONDecodeError, RowError):
        return value
    if turns and all(
        isinstance(turn, dict) and any(turn.keys() >= set(keys) for keys in _KEYS.values()) for turn in turns
    ):
        return turns
    return value


def _joined_parts(content: Any, field: str, where: str) -> Any:
    """Return the content of a turn as one text, if it is a list of texts as multimodal models have it."""
    if not isinstance(content, list):
        return content
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        raise RowError(where, f"field {field!r} has parts that are no text; remove the row", "parts that are no text")
    return "".join(part["text"] for part in content)


def _conversation_field(row: Mapping[str, Any], source: DataSource) -> str | None:
    """Return the column that holds the turns; None if the row has none."""
    names = CONVERSATIONS if source.conversation_field is None else (source.conversation_field,)
    return next((name for name in names if _look_up(row, name) is not _ABSENT), None)


def _look_up(row: Mapping[str, Any], path: str) -> Any:
    """Return the value at a dotted path, through objects and lists; a column with dots in its name comes first."""
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and re.fullmatch("[0-9]{1,9}", part) and int(part) < len(value):
            value = value[int(part)]
        else:
            return _ABSENT
    return value


def _field(row: Mapping[str, Any], name: str, where: str, option: str) -> Any:
    value = _look_up(row, name)
    if value is _ABSENT:
        raise _missing(row, name, where, option)
    return value


def _missing(row: Mapping[str, Any], name: str, where: str, option: str) -> RowError:
    columns = ", ".join(map(str, row))
    problem = f"field {name!r} is missing (found: {columns}); name the column that holds it with {option}"
    return RowError(where, problem, f"field {name!r} is missing")


def _null(name: str, where: str) -> RowError:
    return RowError(where, f"field {name!r} is null; fill it or remove the row", f"field {_general(name)!r} is null")


def _check_text(value: Any, name: str, where: str) -> str:
    if value is None:
        raise _null(name, where)
    if not isinstance(value, str):
        kind = type(value).__name__
        raise RowError(where, f"field {name!r} is {kind}, expected text", f"field {_general(name)!r} is no text")
    return value


def _text(value: Any, name: str, where: str) -> str:
    """Return a text that is not blank."""
    text = _check_text(value, name, where)
    if not text.strip():
        problem = f"field {name!r} is empty; fill it or remove the row"
        raise RowError(where, problem, f"field {_general(name)!r} is empty")
    return text


def _general(name: str) -> str:
    """Return a field without the numbers of turns, to count rows by it."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
