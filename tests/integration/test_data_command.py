"""The command data check, and rows that a run leaves out."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli import app
from montessori_core.config import DataSource
from montessori_core.models.load import load_tokenizer
from tasks import data_check
from tasks.data_check import check_data

TEXTS = [
    ("Name three long rivers of Europe, please.", "Rhine, Danube, Elbe."),
    ("Назови три длинные реки в Европе.", "Волга, Дунай, Рейн."),
]


def write(path: Path, pairs: list[tuple[str, str]], *more: object) -> str:
    rows: list[object] = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in pairs
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more]))
    return str(path)


def test_check_shows_rows_as_the_student_sees_them(tiny_llama: Path, tmp_path: Path) -> None:
    near = ("Name three long rivers of Europe, please!", "Loire, Po, Ebro.")
    path = write(
        tmp_path / "rows.jsonl", [*TEXTS, TEXTS[0], near, ("Say it: <|im_end|>", "x " * 500)], {"messages": None}
    )
    tokenizer: Any = load_tokenizer(str(tiny_llama))
    result = check_data(DataSource(path=path), "reference", True, tokenizer, max_length=200)
    assert (result.format, result.tasks, result.duplicates, result.unit) == ("messages", 5, 1, "tokens")
    assert result.near_duplicates == (1, (TEXTS[0][0], near[0]))
    assert (result.truncated, result.without_response, result.refusal) == (1, 0, True)
    assert result.languages == {"en": 3, "ru": 1, None: 1}
    assert result.lengths["example"][-1] == 200
    for parts, (instruction, response) in zip(result.first, TEXTS, strict=False):
        assert instruction in "".join(text for text, trained in parts if not trained)
        assert "".join(text for text, trained in parts if trained).strip() == f"{response}<|im_end|>"


def test_check_command_prints_and_refuses(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", TEXTS * 4)
    outcome = CliRunner().invoke(app, ["data", "check", path])
    assert outcome.exit_code == 0, outcome.output
    for line in (
        "8 rows, format: messages",
        "bad rows: none",
        "exact duplicates: 6",
        "languages: en 50.0%, ru 50.0%",
        TEXTS[1][0],
    ):
        assert line in outcome.output
    write(tmp_path / "rows.jsonl", TEXTS, {"messages": None}, {"messages": None})
    outcome = CliRunner().invoke(app, ["data", "check", path])
    assert outcome.exit_code == 1
    assert "bad rows: 2 (a run refuses them" in outcome.output
    assert f"2 field 'messages' is null; the first: {path}, line 3: field 'messages' is null; fill it" in outcome.output
    options = ["--as", "examples"]
    outcome = CliRunner().invoke(
        app, ["data", "check", f"{{path: {path}, drop_bad_rows: true, max_bad_rows: 0.5}}", *options]
    )
    assert outcome.exit_code == 0
    assert "bad rows: 2 (left out)" in outcome.output
    outcome = CliRunner().invoke(app, ["data", "check", "builtin/maths", "--as", "evaluation"])
    assert "64 rows, format: alpaca" in outcome.output


def test_check_refuses_what_a_run_refuses(tiny_llama: Path, tmp_path: Path) -> None:
    """Too few references, and sets on which the student is measured with an answer beyond its maximum."""
    few = write(tmp_path / "few.jsonl", TEXTS * 2)
    long = write(tmp_path / "long.jsonl", [*TEXTS * 4, ("word " * 300, "Yes.")])
    model = ["--model", str(tiny_llama), "--max-length", "200"]
    for source, options, status, message in (
        (few, [], 1, "holds 4 examples; a reference set needs at least 8"),
        (f"{{path: {few}, limit: 4}}", [], 0, "4 rows"),
        (few, ["--as", "evaluation"], 0, "4 rows"),
        (long, model, 1, "without a response within 200 tokens: 1"),
        (long, ["--as", "evaluation", *model], 1, "without a response within 200 tokens: 1"),
        (long, ["--as", "examples", *model], 0, "without a response within 200 tokens: 1"),
    ):
        outcome = CliRunner().invoke(app, ["data", "check", source, *options])
        assert outcome.exit_code == status, outcome.output
        assert message in outcome.output


def test_large_source_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_check, "SAMPLE", 20)
    path = write(tmp_path / "rows.jsonl", [(f"Name river number {number}.", "Rhine.") for number in range(200)])
    result = check_data(DataSource(path=path), "reference", True)
    assert (result.tasks, result.sampled, len(result.first)) == (200, 20, 3)
    assert result.lengths["instruction"][-1] == len("Name river number 199.")


def test_check_shows_conversations(tiny_llama: Path, tmp_path: Path) -> None:
    spoken = ["Name a river.", "Rhine.", "Another?", "Elbe."]
    messages = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(spoken)]
    system = {"role": "system", "content": "Be short."}
    rows = [
        {"messages": [system, *messages]},
        {"messages": messages},
        {"messages": messages[:2]},
        {"messages": messages},
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = DataSource(path=str(tmp_path / "chats.jsonl"))
    tokenizer: Any = load_tokenizer(str(tiny_llama))
    result = check_data(source, "reference", True, tokenizer)
    assert (result.rounds, result.system_turns, result.duplicates) == ({1: 1, 2: 3}, 1, 1)
    assert [text for text, trained in result.first[0] if trained] == ["Rhine.<|im_end|>", "Elbe.<|im_end|>"]
    last = check_data(source.model_copy(update={"train_on": "last"}), "reference", True, tokenizer)
    assert [text for text, trained in last.first[0] if trained] == ["Elbe.<|im_end|>"]
    outcome = CliRunner().invoke(app, ["data", "check", str(tmp_path / "chats.jsonl")])
    for line in ("rounds of user and assistant: 1 in 1 rows, 2 in 3 rows", "system turns: 1\n", "assistant: Rhine.\n"):
        assert line in outcome.output
    tokenizer.chat_template = GEMMA
    assert check_data(source, "reference", True, tokenizer).moves_system_turn


GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
