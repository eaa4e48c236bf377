"""Rows of the field's formats, and rules for several turns and system turns."""

import csv
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from montessori_core.config import DataSource
from montessori_core.data.bad_rows import BAD_ROWS, BadRow, count_reasons, write_bad_rows
from montessori_core.data.rows import EarlierTurn
from montessori_core.data.sources import Task, TaskReader, check_single_turns, read_tasks
from montessori_core.errors import DataError

PAIRS = [("Name a colour.", "Red."), ("Add: 1 and 2", " 3\n")]
ROLES = {"role": ("user", "assistant"), "from": ("human", "gpt")}


def turns(pair: tuple[str, str], role: str = "role", text: str = "content") -> list[dict[str, str]]:
    return [{role: name, text: content} for name, content in zip(ROLES[role], pair, strict=True)]


FORMATS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "alpaca": ("alpaca", [{"instruction": a, "input": "", "output": b} for a, b in PAIRS]),
    "alpaca with input": (
        "alpaca",
        [
            {"instruction": "Name", "input": "a colour.", "output": "Red."},
            {"instruction": "Add:", "input": "1 and 2", "output": " 3\n"},
        ],
    ),
    "messages": ("messages", [{"messages": turns(pair)} for pair in PAIRS]),
    "messages of parts": (
        "messages",
        [
            {"messages": [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns(pair)]}
            for pair in PAIRS
        ],
    ),
    "messages without tool calls": (
        "messages",
        [{"messages": [turn | {"tool_calls": [], "function_call": None} for turn in turns(pair)]} for pair in PAIRS],
    ),
    "sharegpt": ("sharegpt", [{"conversations": turns(pair, "from", "value")} for pair in PAIRS]),
    "conversations of roles": ("messages", [{"conversations": turns(pair)} for pair in PAIRS]),
    "messages as JSON in a cell": ("messages", [{"messages": json.dumps(turns(pair))} for pair in PAIRS]),
    "sharegpt as JSON in a cell": (
        "sharegpt",
        [{"conversations": json.dumps(turns(pair, "from", "value"))} for pair in PAIRS],
    ),
    "prompt and completion as JSON in cells": (
        "prompt_completion",
        [{"prompt": json.dumps(turns(p)[:1]), "completion": json.dumps(turns(p)[1:])} for p in PAIRS],
    ),
    "prompt and completion": ("prompt_completion", [{"prompt": a, "completion": b} for a, b in PAIRS]),
    "prompt and completion, lists": (
        "prompt_completion",
        [{"prompt": turns(pair)[:1], "completion": turns(pair)[1:]} for pair in PAIRS],
    ),
}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_tasks(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    format, rows = FORMATS[name]
    path = write(tmp_path / "rows.jsonl", rows)
    with caplog.at_level(logging.INFO, "montessori_core.data"):
        tasks = read_tasks(DataSource(path=path), "reference", with_response=True)
    assert tasks == [Task(f"reference-0000{number}", *pair) for number, pair in enumerate(PAIRS, 1)]
    assert caplog.messages == [f"reference: 2 rows, format: {format}"]
    seeds = read_tasks(DataSource(path=path), "seed_pool", with_response=False)
    assert [(task.instruction, task.response) for task in seeds] == [(instruction, "") for instruction, _ in PAIRS]


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        (
            {"task": {"q": "Name a colour."}, "answers": [{"text": "Red."}]},
            {"instruction_field": "task.q", "output_field": "answers.0.text"},
        ),
        ({"task.q": "Name a colour.", "a": "Red."}, {"instruction_field": "task.q", "output_field": "a"}),
        ({"chat": {"turns": turns(PAIRS[0])}}, {"conversation_field": "chat.turns"}),
        ({"chat": turns(PAIRS[0], "from", "value"), "instruction": "x"}, {"conversation_field": "chat"}),
        ({"instruction": "x", "output": "y", "messages": turns(PAIRS[0])}, {"format": "messages"}),
        ({"messages": turns(PAIRS[0]), "prompt": "x", "completion": "y"}, {}),
    ],
)
def test_fields_are_found_by_path(row: dict[str, Any], fields: dict[str, Any], tmp_path: Path) -> None:
    source = DataSource(path=write(tmp_path / "rows.jsonl", [row]), **fields)
    [task] = read_tasks(source, "reference", with_response=True)
    assert (task.instruction, task.response) == PAIRS[0]


SYSTEM = {"role": "system", "content": "Be short."}
TALK = [*turns(PAIRS[0]), *turns(PAIRS[1])]


@pytest.mark.parametrize(
    ("row", "fields", "expected"),
    [
        ({"messages": TALK}, {"turns": "first"}, PAIRS[0]),
        ({"messages": TALK}, {"turns": "last"}, PAIRS[1]),
        ({"messages": [SYSTEM, *TALK]}, {"turns": "first", "system_turn": "drop"}, PAIRS[0]),
        ({"messages": [SYSTEM, *TALK[:2]]}, {"system_turn": "prepend"}, ("Be short.\n\nName a colour.", "Red.")),
        ({"system": "Be short.", "conversations": turns(PAIRS[0], "from", "value")}, {"system_turn": "drop"}, PAIRS[0]),
        (
            {"instruction": "Name a colour.", "output": "Red.", "system": "Be short.", "history": [["Hi", "Hello"]]},
            {"system_turn": "prepend", "turns": "last"},
            ("Be short.\n\nName a colour.", "Red."),
        ),
        ({"instruction": "Name a colour.", "output": "Red.", "system": "", "history": []}, {}, PAIRS[0]),
    ],
)
def test_turns_follow_the_stated_rule(
    row: dict[str, Any], fields: dict[str, Any], expected: tuple[str, str], tmp_path: Path
) -> None:
    source = DataSource(path=write(tmp_path / "rows.jsonl", [row]), **fields)
    [task] = read_tasks(source, "reference", with_response=True)
    assert task == Task("reference-00001", *expected)


def earlier(*turns: tuple[str, str, int]) -> tuple[EarlierTurn, ...]:
    return tuple({"role": role, "content": content, "weight": weight} for role, content, weight in turns)  # type: ignore[typeddict-item]


BOTH = earlier(("user", "Name a colour.", 0), ("assistant", "Red.", 1))
UNTRAINED = earlier(("user", "Name a colour.", 0), ("assistant", "Red.", 0))
SHORT = earlier(("system", "Be short.", 0))


@pytest.mark.parametrize(
    ("row", "fields", "before"),
    [
        ({"messages": TALK}, {}, BOTH),
        ({"messages": TALK}, {"train_on": "last"}, UNTRAINED),
        ({"messages": [SYSTEM, *TALK]}, {}, SHORT + BOTH),
        ({"messages": [SYSTEM, *TALK]}, {"turns": "last"}, SHORT),
        ({"messages": [SYSTEM, *TALK]}, {"system_turn": "drop"}, BOTH),
        ({"messages": [TALK[0], TALK[1] | {"weight": 0}, *TALK[2:]]}, {}, UNTRAINED),
        ({"messages": [TALK[0], TALK[1] | {"weight": 1}, *TALK[2:]]}, {}, BOTH),
        ({"messages": [TALK[0] | {"weight": None}, *TALK[1:]]}, {}, BOTH),
        ({"conversations": [*turns(PAIRS[0], "from", "value"), *turns(PAIRS[1], "from", "value")]}, {}, BOTH),
        ({"prompt": TALK[:3], "completion": TALK[3:]}, {}, UNTRAINED),
        ({"prompt": TALK[:1], "completion": TALK[1:]}, {}, BOTH),
        ({"prompt": TALK[:3], "completion": " 3\n"}, {}, UNTRAINED),
        ({"instruction": "Add: 1 and 2", "output": " 3\n", "history": [["Name a colour.", "Red."]]}, {}, BOTH),
        (
            {
                "instruction": "Add:",
                "input": "1 and 2",
                "output": " 3\n",
                "system": "Be short.",
                "history": [list(PAIRS[0])],
            },
            {"train_on": "last"},
            SHORT + UNTRAINED,
        ),
    ],
)
def test_conversations_are_read_whole(
    row: dict[str, Any], fields: dict[str, Any], before: tuple[EarlierTurn, ...], tmp_path: Path
) -> None:
    source = DataSource(path=write(tmp_path / "rows.jsonl", [row]), **fields)
    reader = TaskReader(source, "reference", with_response=True)
    assert list(reader) == [Task("reference-00001", *PAIRS[1], before)]
    loss = "the last answer" if source.train_on == "last" else "every answer"
    assert f"1 rows, format: {reader.format}; 1 with earlier turns, loss on {loss}" in reader.summary()


def test_prepended_system_text_is_in_the_first_turn(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"messages": [TALK[0], TALK[1], SYSTEM, *TALK[2:]]}])
    [task] = read_tasks(DataSource(path=path, system_turn="prepend"), "reference", with_response=True)
    first = earlier(("user", "Be short.\n\nName a colour.", 0))
    assert task == Task("reference-00001", *PAIRS[1], first + BOTH[1:])
    assert task.request == "Be short.\n\nName a colour.\n\nRed.\n\nAdd: 1 and 2"


def test_seed_pool_takes_single_instructions(tmp_path: Path) -> None:
    for row, message in (
        ({"messages": TALK}, "2 user turns, where one is read; set seed_pool.turns to first or last"),
        ({"messages": [SYSTEM, *TALK[:2]]}, "a system turn; set seed_pool.system_turn to prepend"),
    ):
        path = write(tmp_path / "rows.jsonl", [row])
        with pytest.raises(DataError, match=message):
            read_tasks(DataSource(path=path), "seed_pool", with_response=False)
    with pytest.raises(
        DataError, match=r"reference: nomad takes single instructions, but example c1 is a conversation"
    ):
        check_single_turns([Task("s", "Hi"), Task("c1", *PAIRS[1], BOTH)], "nomad")


GOOD = {"messages": turns(PAIRS[0])}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (
        {"messages": [*TALK[:2], SYSTEM, *TALK[2:]]},
        "field 'messages.2.content': a system turn after the first turn; set reference.system_turn to prepend",
        "a system turn after the first turn",
    ),
    (
        {"messages": [SYSTEM, SYSTEM, *TALK]},
        "field 'messages.1.content': a system turn after the first turn",
        "a system turn after the first turn",
    ),
    (
        {"messages": [*TALK[:2], TALK[1], *TALK[2:]]},
        "field 'messages.2.content': a turn of the assistant, where turns of user and assistant must alternate",
        "turns do not alternate",
    ),
    ({"messages": TALK[:3]}, "no answer of the assistant after the user's turn", "no answer of the assistant"),
    (
        {"messages": [*TALK[:3], TALK[3] | {"weight": 0}]},
        "field 'messages.3.content': the last answer has weight 0",
        "an untrained last answer",
    ),
    (
        {"messages": [TALK[0], TALK[1] | {"weight": 0.5}, *TALK[2:]]},
        "field 'messages.1.weight' is 0.5, expected 0 (no loss) or 1",
        "a weight other than 0 and 1",
    ),
    ({"messages": None}, "field 'messages' is null; fill it or remove the row", "field 'messages' is null"),
    ({"messages": []}, "field 'messages' is an empty list", "field 'messages' is empty"),
    ({"messages": "Hi"}, "field 'messages' is str, expected a list of turns", "no list of turns"),
    ({"other": 1}, "field 'messages' is missing (found: other)", "field 'messages' is missing"),
    (
        {"messages": [{"role": "user"}]},
        "field 'messages.0': a turn of the format messages has role and content",
        "a turn without role or content",
    ),
    (
        {"messages": [TALK[0], {"role": "assistant", "content": None}]},
        "field 'messages.1.content' is null",
        "field 'messages.*.content' is null",
    ),
    (
        {"messages": [TALK[0], {"role": "assistant", "content": " "}]},
        "field 'messages.1.content' is empty",
        "field 'messages.*.content' is empty",
    ),
    (
        {"messages": [TALK[0], {"role": "tool", "content": "x"}]},
        "field messages.1.role is 'tool', expected one of",
        "a turn of another role",
    ),
    (
        {"messages": [TALK[0], TALK[1] | {"tool_calls": [{"function": {"name": "look_up", "arguments": "{}"}}]}]},
        "field 'messages.1.tool_calls': the assistant calls tools, which is not read; remove the row",
        "a turn with tool_calls",
    ),
    (
        {"messages": [TALK[0], {"role": "assistant", "content": None, "function_call": {"name": "look_up"}}]},
        "field 'messages.1.function_call': the assistant calls tools",
        "a turn with function_call",
    ),
    ({"messages": TALK[:1]}, "no answer of the assistant after the user's turn", "no answer of the assistant"),
    ({"messages": TALK[1:]}, "field 'messages.0.content': a turn of the assistant", "turns do not alternate"),
    ({"messages": [SYSTEM]}, "no user turn", "no user turn"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
        "field 'messages.0.content' has parts that are no text",
        "parts that are no text",
    ),
]


STRICT: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"messages": TALK}, {"turns": "refuse"}, "2 user turns, where one is read; set reference.turns to first or last"),
    (
        {"messages": [SYSTEM, *TALK[:2]]},
        {"system_turn": "refuse"},
        "a system turn; set reference.system_turn to prepend",
    ),
]


@pytest.mark.parametrize(("row", "fields", "message"), STRICT)
def test_conversations_can_be_refused(
    row: dict[str, Any], fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=f"line 1: {message}"):
        read_tasks(DataSource(path=write(tmp_path / "rows.jsonl", [row]), **fields), "reference", with_response=True)


ROLE = st.sampled_from(["system", "user", "assistant", "human", "gpt", "tool", "", None, 3])
CONTENT = st.sampled_from(["Hi", " ", "", None, 7, [{"type": "text", "text": "Hi"}], [{"type": "image"}], {"a": 1}])
TURNS = st.lists(
    st.fixed_dictionaries({"role": ROLE, "content": CONTENT}, optional={"weight": st.sampled_from([0, 1, None, "x"])})
    | st.none()
    | st.just("Hi"),
    max_size=5,
) | st.sampled_from([None, "Hi", {}])


@given(
    TURNS,
    st.sampled_from(["all", "first", "last", "refuse"]),
    st.sampled_from(["keep", "prepend", "drop", "refuse"]),
    st.booleans(),
)
def test_any_conversation_is_read_or_refused_by_field(
    tmp_path_factory: pytest.TempPathFactory, talk: Any, rule: Any, system_turn: Any, with_response: bool
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "any.jsonl", [{"messages": talk}])
    source = DataSource(path=path, turns=rule, system_turn=system_turn)
    try:
        [task] = read_tasks(source, "reference", with_response)
    except DataError as error:
        refusal = str(error)
        assert refusal.startswith(f"{path}, line 1: ")
        assert any(word in refusal for word in ("field", "turn", "answer"))
        return
    roles = [turn["role"] for turn in task.before]
    assert roles[roles[:1] == ["system"] :] == ["user", "assistant"] * (len(roles) // 2)
    assert task.instruction.strip()
    assert bool(task.response.strip()) == with_response
    assert rule == "all" or set(roles) <= {"system"}


@pytest.mark.guarantee("broken rows or wrong fields")
@pytest.mark.parametrize(("row", "message", "reason"), REFUSED)
def test_bad_row_is_refused_or_counted(row: dict[str, Any], message: str, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD, row, GOOD])
    with pytest.raises(DataError) as refusal:
        read_tasks(DataSource(path=path), "reference", with_response=True)
    assert f"rows.jsonl, line 2: {message}" in str(refusal.value)
    assert str(refusal.value).endswith("; or set reference.drop_bad_rows: true to leave such rows out")
    bad: list[BadRow] = []
    source = DataSource(path=path, drop_bad_rows=True, max_bad_rows=0.5)
    assert len(read_tasks(source, "reference", with_response=True, bad_rows=bad)) == 2
    assert [(row.place, row.reason) for row in bad] == [(f"{path}, line 2", reason)]


def test_bad_seed_takes_no_id(tmp_path: Path) -> None:
    rows = [{"instruction": f"Name object {n}.", "topic": ["maths"] if n == 1 else "maths"} for n in range(6)]
    path = write(tmp_path / "seeds.jsonl", rows)
    bad: list[BadRow] = []
    source = DataSource(path=path, drop_bad_rows=True, max_bad_rows=0.5)
    assert len(read_tasks(source, "seed_pool", with_response=False, bad_rows=bad)) == 5
    assert [row.place for row in bad] == [f"{path}, line 2"]


@pytest.mark.guarantee("broken rows or wrong fields")
@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ('{"instruction": "a", "output": "b", "output": "c"}', "a field occurs twice"),
        ('{"instruction": "a", "output": "b", "n": ' + 5000 * "9" + "}", "a number has too many digits"),
        ('{"instruction": "a", "output": "b", "n": "' + 70_000 * "x" + '", "n": 1}', "a field occurs twice"),
        ('{"instruction": "a", "output": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_bad_entry_of_a_list_is_left_out(entry: str, reason: str, tmp_path: Path) -> None:
    """The entries after it are read; one entry is longer than what is read at once."""
    good = '{"instruction": "Name a river.", "output": "Rhine."}'
    path = tmp_path / "rows.json"
    path.write_text(f"[{good},\n{entry},\n{good}]")
    with pytest.raises(DataError, match="rows.json, entry 2: .*; or set reference.drop_bad_rows: true"):
        read_tasks(DataSource(path=str(path)), "reference", with_response=True)
    bad: list[BadRow] = []
    source = DataSource(path=str(path), drop_bad_rows=True, max_bad_rows=0.5)
    assert len(read_tasks(source, "reference", with_response=True, bad_rows=bad)) == 2
    assert [(row.place, row.reason) for row in bad] == [(f"{path}, entry 2", reason)]


def test_missing_conversation_field_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"messages": TALK[:2], "instruction": "x"}])
    with pytest.raises(
        DataError,
        match=r"field 'chat.turns' is missing \(found: messages, instruction\); .* holds it with reference.conv",
    ):
        read_tasks(DataSource(path=path, conversation_field="chat.turns"), "reference", with_response=True)


@pytest.mark.guarantee("broken rows or wrong fields")
def test_bad_rows_are_counted_listed_and_limited(tmp_path: Path) -> None:
    good = [json.dumps({"instruction": f"Name river {number}.", "output": "Rhine."}).encode() for number in range(96)]
    bad = [b'{"instruction": "a", "output": null}', b'{"instruction": "a",}', b'"\xff"', b'{"instruction": " "}']
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([*good, *bad]))
    source = DataSource(path=str(tmp_path / "rows.jsonl"), drop_bad_rows=True, max_bad_rows=0.04)
    reader = TaskReader(source, "reference", with_response=True)
    assert len(list(reader)) == 96
    assert reader.summary().startswith(
        "reference: 96 rows, format: alpaca; 4 more left out (1 field 'output' is null, "
    )
    write_bad_rows(reader.bad_rows, tmp_path)
    listed = [json.loads(line) for line in (tmp_path / BAD_ROWS).read_text().splitlines()]
    assert [row["place"].rpartition(", line ")[2] for row in listed] == ["97", "98, column 21", "99", "100"]
    assert count_reasons(reader.bad_rows).count("1 ") == 4
    write_bad_rows([], tmp_path)
    assert not (tmp_path / BAD_ROWS).exists()
    assert not source.model_copy(update={"max_bad_rows": 0.29}).refuses(29, 100)
    strict = source.model_copy(update={"max_bad_rows": 0.039})
    with pytest.raises(
        DataError, match=r"4 of 100 rows cannot be used .*, more than reference.max_bad_rows \(0.039\); "
    ):
        read_tasks(strict, "reference", with_response=True)


def test_set_of_bad_rows_says_why(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"question": "a", "output": "b"}] * 2)
    source = DataSource(path=path, drop_bad_rows=True, max_bad_rows=1.0)
    reason = r"2 of 2 rows cannot be used \(2 field 'instruction' is missing\); the first: .*rows.jsonl, line 1: field"
    with pytest.raises(DataError, match=reason):
        read_tasks(source, "reference", with_response=True)


@pytest.mark.parametrize("name", [name for name in FORMATS if "JSON" in name])
def test_csv_cell_may_hold_a_conversation(name: str, tmp_path: Path) -> None:
    format, rows = FORMATS[name]
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    reader = TaskReader(DataSource(path=str(path)), "reference", with_response=True)
    assert [(task.instruction, task.response) for task in reader] == PAIRS
    assert reader.format == format


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "[{'role': 'user', 'content': 'x'}]"}, "is str, expected a list of turns; write it as JSON"),
        ({"messages": '[{"role": "user"}]'}, "is str, expected a list of turns; write it as JSON"),
        ({"messages": '[{"role": "user", "content": 1}]'}, "field 'messages.0.content' is int, expected text"),
        ({"messages": "[" * 100_000}, "is str, expected a list of turns"),
        ({"prompt": '[{"role": "robot", "content": "x"}]', "completion": "y"}, "prompt.0.role is 'robot'"),
    ],
)
def test_bad_conversation_in_a_cell_is_refused(row: dict[str, str], message: str, tmp_path: Path) -> None:
    source = DataSource(path=write(tmp_path / "rows.jsonl", [row]))
    with pytest.raises(DataError, match=re.escape(message)):
        read_tasks(source, "reference", with_response=True)


def test_text_that_begins_like_a_list_stays_text(tmp_path: Path) -> None:
    rows = [{"prompt": text, "completion": "[1, 2]"} for text in ("[1] and [2]", '["a"]', "[]")]
    tasks = read_tasks(DataSource(path=write(tmp_path / "rows.jsonl", rows)), "reference", with_response=True)
    assert [(task.instruction, task.response) for task in tasks] == [(row["prompt"], "[1, 2]") for row in rows]


@pytest.mark.parametrize(("limit", "told"), [(1, " (reference.limit)"), (2, " (reference.limit)"), (3, ""), (None, "")])
def test_log_tells_whether_a_limit_was_reached(limit: int | None, told: str, tmp_path: Path) -> None:
    rows = [{"instruction": instruction, "output": output} for instruction, output in PAIRS]
    reader = TaskReader(
        DataSource(path=write(tmp_path / "rows.jsonl", rows), limit=limit), "reference", with_response=True
    )
    tasks = list(reader)
    assert reader.summary() == f"reference: {len(tasks)} rows{told}, format: alpaca"
