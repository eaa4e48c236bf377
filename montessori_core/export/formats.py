"""The formats that other trainers read: how each writes an example, and its columns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from montessori_core.data.rows import EarlierTurn
from montessori_core.export.sets import INSTRUCTION, OUTPUT, SetName
from montessori_core.program import Row


@dataclass(frozen=True)
class Format:
    """A format of examples.

    Attributes:
        name: its name on the command line.
        suffix: of the data file.
        texts: columns that replace `instruction` and `output`.
        write: returns these columns of an instruction and a response.
        sets: the sets that it can hold.
    """

    name: str
    suffix: str
    texts: pa.Schema
    write: Callable[[str, str], Row]
    sets: tuple[SetName, ...] = ("training", "scored")

    def schema(self, columns: pa.Schema) -> pa.Schema:
        """Return the columns of an exported set: those of a run's set, with its texts in this format."""
        if INSTRUCTION not in columns.names:
            return columns
        return pa.schema([*self.texts, *(field for field in columns if field.name not in (INSTRUCTION, OUTPUT))])

    def rows(self, table: pa.Table) -> list[Row]:
        """Return the rows of a table of a run's set in this format."""
        rows: list[Row] = table.to_pylist()
        if INSTRUCTION not in table.column_names:
            return rows
        return [self.write(row.pop(INSTRUCTION), row.pop(OUTPUT)) | row for row in rows]


def _turns(role: str, content: str) -> pa.DataType:
    return pa.list_(pa.struct([(role, pa.string()), (content, pa.string())]))


def _texts(kinds: Mapping[str, tuple[pa.DataType, str]]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, metadata={"description": text}) for name, (kind, text) in kinds.items()])


def _message(role: str, content: str) -> Row:
    return {"role": role, "content": content}


_MESSAGES = _turns("role", "content")


@dataclass(frozen=True)
class ConversationFormat:
    """A format of whole conversations.

    Attributes:
        field: the column of turns.
        names: keys of role and text in a turn.
        roles: name of each role.
    """

    field: pa.Field
    names: tuple[str, str]
    roles: Mapping[str, str]

    def turns(self, before: Sequence[EarlierTurn], instruction: str, output: str) -> list[Row]:
        """Return the turns of an example; the weight of each says whether it carries loss, as in OpenAI's format."""
        last = (
            EarlierTurn(role="user", content=instruction, weight=0),
            EarlierTurn(role="assistant", content=output, weight=1),
        )
        role, text = self.names
        return [
            {role: self.roles.get(turn["role"], turn["role"]), text: turn["content"], "weight": turn["weight"]}
            for turn in (*before, *last)
        ]


def _conversation_format(column: str, names: tuple[str, str], roles: Mapping[str, str]) -> ConversationFormat:
    kind = pa.list_(pa.struct([*((name, pa.string()) for name in names), ("weight", pa.int64())]))
    description = "the turns; an answer of weight 0 carries no loss, as in OpenAI's format"
    return ConversationFormat(pa.field(column, kind, metadata={"description": description}), names, roles)


CONVERSATION_FORMATS = {
    "messages": _conversation_format("messages", ("role", "content"), {}),
    "sharegpt": _conversation_format("conversations", ("from", "value"), {"user": "human", "assistant": "gpt"}),
}
"""The formats of examples with earlier turns, by name."""

_FORMATS = (
    Format(
        "messages",
        ".jsonl",
        _texts({"messages": (_MESSAGES, "the turns: instruction of the user, response of the assistant")}),
        lambda instruction, output: {"messages": [_message("user", instruction), _message("assistant", output)]},
    ),
    Format(
        "sharegpt",
        ".jsonl",
        _texts({"conversations": (_turns("from", "value"), "the turns: instruction from human, response from gpt")}),
        lambda instruction, output: {
            "conversations": [{"from": "human", "value": instruction}, {"from": "gpt", "value": output}]
        },
    ),
    Format(
        "alpaca",
        ".jsonl",
        _texts(
            {
                INSTRUCTION: (pa.string(), "instruction"),
                "input": (pa.string(), "always empty: the instruction is complete"),
                OUTPUT: (pa.string(), "response"),
            }
        ),
        lambda instruction, output: {INSTRUCTION: instruction, "input": "", OUTPUT: output},
    ),
    Format(
        "trl",
        ".jsonl",
        _texts(
            {
                "prompt": (_MESSAGES, "the user's turn, without loss"),
                "completion": (_MESSAGES, "the assistant's turn, with loss"),
            }
        ),
        lambda instruction, output: {
            "prompt": [_message("user", instruction)],
            "completion": [_message("assistant", output)],
        },
        ("training", "scored", "preferences"),
    ),
    Format(
        "parquet",
        ".parquet",
        _texts({INSTRUCTION: (pa.string(), "instruction"), OUTPUT: (pa.string(), "response")}),
        lambda instruction, output: {INSTRUCTION: instruction, OUTPUT: output},
        ("training", "scored", "preferences"),
    ),
)
FORMATS = {form.name: form for form in _FORMATS}
"""The formats, by name."""
