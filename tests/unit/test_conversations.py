"""Conversations: which tokens carry loss, in the chat templates of real models."""

import json
import tracemalloc
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AddedToken

from cluster.shards import Shards
from cluster.stage import Stage
from montessori_core.config import DataSource
from montessori_core.data import task_tables
from montessori_core.data.rows import EarlierTurn, ExampleRow, Rows, TaskRow, TrainingRow
from montessori_core.data.sources import Task, load_tasks, read_tasks, write_tasks
from montessori_core.data.tables import INFLUENCE, ROW_GROUP, table_from_rows, write_table
from montessori_core.data.task_tables import task_rows, write_task_rows
from montessori_core.errors import UserError
from montessori_core.export.formats import CONVERSATION_FORMATS
from montessori_core.files import hash_path
from montessori_core.influence.losses import TokenLosses
from montessori_core.influence.reference import ReferenceSet
from montessori_core.models.chat import IGNORED, Encoded, encode_example
from montessori_core.models.examples import encode_row, encode_task
from montessori_core.models.load import load_model, load_tokenizer
from montessori_core.models.rendering import takes_system_turn
from montessori_core.selection.choose import Choice, choose
from montessori_core.selection.pools import open_pool
from montessori_core.selection.write import write_chosen
from support.runs import invoke
from support.templates import TEMPLATES, real_template

TALK = ("Name a colour.", "Red.", " Another? ", "Blue or\ngreen.", "One more?", "Black.")


def turn(role: Any, content: str, weight: int = 0) -> EarlierTurn:
    return {"role": role, "content": content, "weight": weight}


def earlier(*texts: str, system: str | None = None, weight: int = 1) -> tuple[EarlierTurn, ...]:
    """Return turns of a conversation without its last instruction and response; answers have the weight."""
    spoken = [
        turn("assistant", text, weight) if number % 2 else turn("user", text) for number, text in enumerate(texts[:-2])
    ]
    return (*([turn("system", system)] if system else []), *spoken)


def encode(tokenizer: Any, texts: tuple[str, ...], system: str | None = None, weight: int = 1) -> Encoded:
    return encode_example(tokenizer, *texts[-2:], 2000, before=earlier(*texts, system=system, weight=weight))


def shown(tokenizer: Any, example: Encoded) -> str:
    """Return the text of an example, with trained parts in [[brackets]]."""
    places = groupby(range(len(example.labels)), lambda place: example.labels[place] != IGNORED)
    parts = ((trained, tokenizer.decode([example.input_ids[place] for place in group])) for trained, group in places)
    return "".join(f"[[{text}]]" if trained else text for trained, text in parts)


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    """A tokenizer that a test may change."""
    return load_tokenizer(str(tiny_llama))


GOLDEN = {
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe short.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nName a colour.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[[Red.<|eot_id|>]]"
    "<|start_header_id|>user<|end_header_id|>\n\nAnother?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[[Blue or\ngreen.<|eot_id|>]]"
    "<|start_header_id|>user<|end_header_id|>\n\nOne more?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[[Black.<|eot_id|>]]",
    # Gemma refuses a system turn; Gemma 3 puts it before the first user turn itself.
    **dict.fromkeys(
        ("gemma", "gemma3"),
        "<s><start_of_turn>user\nBe short.\n\nName a colour.<end_of_turn>\n"
        "<start_of_turn>model\n[[Red.<end_of_turn>]]\n"
        "<start_of_turn>user\nAnother?<end_of_turn>\n"
        "<start_of_turn>model\n[[Blue or\ngreen.<end_of_turn>]]\n"
        "<start_of_turn>user\nOne more?<end_of_turn>\n"
        "<start_of_turn>model\n[[Black.<end_of_turn>]]",
    ),
    "qwen2_5": "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nName a colour.<|im_end|>\n"
    "<|im_start|>assistant\n[[Red.<|im_end|>]]\n<|im_start|>user\n Another? <|im_end|>\n"
    "<|im_start|>assistant\n[[Blue or\ngreen.<|im_end|>]]\n<|im_start|>user\nOne more?<|im_end|>\n"
    "<|im_start|>assistant\n[[Black.<|im_end|>]]",
    # Qwen 3 writes the block of thinking in the last answer alone.
    "qwen3": "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nName a colour.<|im_end|>\n"
    "<|im_start|>assistant\n[[Red.<|im_end|>]]\n<|im_start|>user\n Another? <|im_end|>\n"
    "<|im_start|>assistant\n[[Blue or\ngreen.<|im_end|>]]\n<|im_start|>user\nOne more?<|im_end|>\n"
    "<|im_start|>assistant\n[[<think>\n\n</think>\n\nBlack.<|im_end|>]]",
    "phi3_5": "<|system|>\nBe short.<|end|>\n<|user|>\nName a colour.<|end|>\n<|assistant|>\n[[Red.<|end|>]]\n"
    "<|user|>\n Another? <|end|>\n<|assistant|>\n[[Blue or\ngreen.<|end|>]]\n"
    "<|user|>\nOne more?<|end|>\n<|assistant|>\n[[Black.<|end|>]]",
    # GLM writes no end of a turn, gpt-oss another one in earlier turns.
    "glm4moe": "[gMASK]<sop><|system|>\nBe short.<|user|>\nName a colour.<|assistant|>[[\n<think></think>\nRed.]]"
    "<|user|>\n Another? <|assistant|>[[\n<think></think>\nBlue or\ngreen.]]"
    "<|user|>\nOne more?<|assistant|>[[\n<think></think>\nBlack.<|im_end|>]]",
    "gptoss": "# Instructions\n\nBe short.\n\n<|end|><|start|>user<|message|>Name a colour.<|end|>"
    "<|start|>assistant[[<|channel|>final<|message|>Red.]]<|end|><|start|>user<|message|> Another? <|end|>"
    "<|start|>assistant[[<|channel|>final<|message|>Blue or\ngreen.]]<|end|><|start|>user<|message|>One more?<|end|>"
    "<|start|>assistant[[<|channel|>final<|message|>Black.<|return|>]]",
    "cohere2": "Be short.<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Name a colour.<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>[[Red.<|END_RESPONSE|>]]<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|> Another? <|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>[[Blue or\ngreen.<|END_RESPONSE|>]]<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>One more?<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>[[Black.<|END_RESPONSE|>]]",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_every_answer_has_loss_in_real_templates(tokenizer: Any, name: str) -> None:
    real_template(tokenizer, name)
    text = shown(tokenizer, encode(tokenizer, TALK, "Be short."))
    assert text.endswith(GOLDEN[name])
    assert text == GOLDEN[name] or name in ("gptoss", "cohere2")  # whose own system text comes before
    last = shown(tokenizer, encode(tokenizer, TALK, "Be short.", weight=0))
    assert last.count("[[") == 1
    assert last.replace("[[", "").replace("]]", "") == text.replace("[[", "").replace("]]", "")


@pytest.mark.parametrize("name", ["gemma3", "llama3", "phi3_5", "qwen2_5", "lfm2", "glm4moe", "cohere2"])
def test_masks_are_those_of_trl(tokenizer: Any, name: str) -> None:
    """TRL marks the assistant's text in templates of its own; its marks may go on to blanks after the end of a turn."""
    template = real_template(tokenizer, f"{name}_training").chat_template
    real_template(tokenizer, name)
    example = encode(tokenizer, TALK)
    turns = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(TALK)]
    marked = tokenizer.apply_chat_template(
        turns, chat_template=template, return_assistant_tokens_mask=True, return_dict=True
    )
    pairs = zip(marked["input_ids"], marked["assistant_masks"], strict=True)
    theirs = [(token, bool(mask)) for token, mask in pairs]
    ours = [(token, label != IGNORED) for token, label in zip(example.input_ids, example.labels, strict=True)]
    appended = ours[-1][0] != theirs[len(ours) - 1][0] if len(ours) <= len(theirs) else True
    for (token, trained), (their_token, their_mark) in zip(ours[: len(ours) - appended], theirs, strict=False):
        assert token == their_token
        if trained != their_mark:
            assert tokenizer.decode([token]).strip() in ("", "<|END_OF_TURN_TOKEN|>", "<|user|>")


def test_prompt_tokens_that_take_blanks_have_no_loss(tokenizer: Any) -> None:
    """Those of Phi 3 take the blanks that an answer begins with."""
    names = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    real_template(tokenizer, "phi3_5")
    tokenizer.add_tokens([AddedToken(name, rstrip=True, special=True) for name in names], special_tokens=True)
    text = shown(tokenizer, encode(tokenizer, ("One?", "  \n One.", "Two?", "\n  Two.")))
    assert text == "<|user|>One?<|end|><|assistant|>[[One.<|end|>]]<|user|>Two?<|end|><|assistant|>[[Two.<|end|>]]"


ALLOWING = [name for name in TEMPLATES if name != "no end"]  # its earlier turns have no end token
ALLOWING += ["llama3", "gemma", "gemma3", "qwen2_5", "phi3_5", "lfm2", "cohere2"]


def give_template(tokenizer: Any, name: str) -> None:
    if name not in TEMPLATES:
        real_template(tokenizer, name)
    elif TEMPLATES[name]:
        tokenizer.chat_template = TEMPLATES[name]


@pytest.mark.parametrize("name", ALLOWING)
def test_loss_on_all_is_that_of_every_prefix(tokenizer: Any, name: str) -> None:
    give_template(tokenizer, name)
    whole = encode(tokenizer, TALK)
    labels = [IGNORED] * len(whole.labels)
    for count in (2, 4, 6):
        part = encode(tokenizer, TALK[:count], weight=0)
        assert whole.input_ids[: len(part.input_ids)] == part.input_ids
        labels[: len(part.labels)] = [
            old if new == IGNORED else new for old, new in zip(labels, part.labels, strict=False)
        ]
    assert labels == whole.labels


def test_loss_is_the_weighted_sum_of_prefixes(tiny_llama: Path, tokenizer: Any) -> None:
    losses, device = TokenLosses(load_model(str(tiny_llama), torch.float32)), torch.device("cpu")
    parts = [encode(tokenizer, TALK[:count], weight=0) for count in (2, 4, 6)]
    whole = ReferenceSet([encode(tokenizer, TALK)], 512, device).evaluate(losses)
    separate = ReferenceSet(parts, 512, device).evaluate(losses)
    assert int(whole.tokens[0]) == int(separate.tokens.sum())
    assert whole.reduce("token") == pytest.approx(separate.reduce("token"), rel=1e-6)


THINKING = ("Name a colour.", "<think>\nWarm?\n</think>\n\nRed.", "Another?", "<think>\nCold?\n</think>\n\nBlue.")


def test_answer_whose_thinking_is_dropped_has_no_loss(tokenizer: Any) -> None:
    text = shown(real_template(tokenizer, "qwen3"), encode(tokenizer, THINKING))
    assert "<|im_start|>assistant\nRed.<|im_end|>\n" in text
    assert text.endswith("[[<think>\nCold?\n</think>\n\nBlue.<|im_end|>]]")
    assert text.count("[[") == 1


def test_answer_keeps_loss_with_its_thinking(tokenizer: Any) -> None:
    kept = shown(tokenizer, encode(real_template(tokenizer, "llama3"), THINKING))
    assert f"[[{THINKING[1]}<|eot_id|>]]" in kept


MISTRAL = (  # as Mistral 7B v0.3: the system text is part of the last user turn
    "{{ bos_token }}{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'user' %}[INST] "
    "{% if loop.last or loop.index0 == loop.length - 2 %}{{ system }}{% endif %}{{ m['content'] }} [/INST]"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def test_rewriting_template_trains_last_turn_alone(tokenizer: Any) -> None:
    tokenizer.chat_template = MISTRAL
    assert shown(tokenizer, encode(tokenizer, TALK)).count("[[") == 3
    with pytest.raises(
        UserError,
        match=r"chat template of \S+ writes an earlier turn differently .*; set train_on: last",
    ):
        encode(tokenizer, TALK, "Be short.")
    assert shown(tokenizer, encode(tokenizer, TALK, "Be short.", weight=0)).count("[[") == 1
    real_template(tokenizer, "qwen3_5_nothink")  # whose prompt has an empty block of thinking, unlike its earlier turns
    with pytest.raises(UserError, match="set train_on: last"):
        encode(tokenizer, TALK)
    assert shown(tokenizer, encode(tokenizer, TALK, weight=0)).endswith("[[Black.<|im_end|>]]")


def test_conversation_that_the_template_refuses_is_named(tokenizer: Any) -> None:
    template = "{% if messages | length > 2 %}{{ raise_exception('one turn at a time') }}{% endif %}"
    tokenizer.chat_template = template + tokenizer.chat_template
    task = Task("t7", *TALK[-2:], before=earlier(*TALK))
    with pytest.raises(
        UserError, match=r"^example t7: the chat template of \S+ refuses .*user, assistant.*: one turn at a"
    ):
        encode_task(tokenizer, task, 2000)


def test_refused_system_turn_is_reported_once(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    real_template(tokenizer, "gemma").name_or_path = "a Gemma"
    assert not takes_system_turn(tokenizer)
    for _ in range(3):
        encode(tokenizer, TALK, "Be short.")
    message = "the chat template of a Gemma takes no system turn: its text is put before the first user turn"
    assert caplog.messages.count(message) == 1
    assert takes_system_turn(real_template(tokenizer, "llama3"))


@pytest.fixture(scope="module")
def fixed(tiny_llama: Path) -> dict[str, Any]:
    """Tokenizers that tests do not change."""
    loaded = {name: load_tokenizer(str(tiny_llama)) for name in ENDS}
    for name, tokenizer in loaded.items():
        give_template(tokenizer, name)
    return loaded


PIECES = ["a", " ", "\n", "é", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|im_start|>user\n", "\ue000", "\u2060"]
TEXT = st.lists(st.sampled_from(PIECES)).map("".join).filter(lambda text: bool(text.replace("\u2060", "").strip()))
ROUNDS = st.lists(st.tuples(TEXT, TEXT, st.booleans()), min_size=1, max_size=4)
ENDS = {"its own": "<|im_end|>", "qwen2_5": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}


@example([("a", "a", True), (" \ue000", "a", True)], None, "gemma")  # a template that strips
@given(ROUNDS, st.none() | TEXT, st.sampled_from(sorted(ENDS)))
def test_trained_texts_are_the_answers(
    fixed: dict[str, Any], rounds: list[tuple[str, str, bool]], system: str | None, name: str
) -> None:
    tokenizer, end = fixed[name], ENDS[name]
    turns = [*earlier("", "", system=system)]
    for asked, answer, trained in rounds[:-1]:
        turns += [turn("user", asked), turn("assistant", answer, int(trained))]
    example = encode_example(tokenizer, *rounds[-1][:2], 4000, before=turns)
    parts = shown_parts(tokenizer, example)
    expected = [answer for _, answer, trained in [*rounds[:-1], (*rounds[-1][:2], True)] if trained]
    assert [part.removesuffix(end).strip() for part in parts] == [answer.strip() for answer in expected]
    assert all(part.endswith(end) for part in parts)
    for length in {1, len(example.input_ids) // 2, len(example.input_ids)}:
        cut = encode_example(tokenizer, *rounds[-1][:2], length, before=turns)
        assert (cut.input_ids, cut.labels) == (example.input_ids[:length], example.labels[:length])
        assert cut.truncated == (length < len(example.input_ids))


def shown_parts(tokenizer: Any, example: Encoded) -> list[str]:
    """Return the trained parts of an example."""
    places = groupby(range(len(example.labels)), lambda place: example.labels[place] != IGNORED)
    return [tokenizer.decode([example.input_ids[place] for place in group]) for trained, group in places if trained]


SINGLE = [Task("r1", "Name a colour.", "Red."), Task("r2", "Add: 1 and 2", " 3\n"), Task("s1", "Ä?")]
KEYS = {  # of version 0.1.0 before it read conversations
    TaskRow: "67bab7c3f00f3c22810929af21d278fab1288720c0de95cfab0ad3f225b54a7d",
    TrainingRow: "b7b9025a54780778fd2fcca733289f3c727ee849baf6b3b7d2136e2a2df80c6e",
    ExampleRow: "b94497d79e8ceb60171d8881a582a4842a5d1c73b82bb2b57a2b15d7afdcdbc1",
}


def rows_of(tasks: list[Task], kind: Any) -> list[dict[str, Any]]:
    full = [{**vars(task), **task.to_training_row(), "prompt_id": task.example_id} for task in tasks]
    return [{name: row[name] for name in (*kind.__required_keys__, *kind.__optional_keys__)} for row in full]


@pytest.mark.parametrize("kind", KEYS)
def test_single_turns_keep_bytes_and_keys(tmp_path: Path, kind: Any) -> None:
    write_tasks(SINGLE, tmp_path / "tasks.jsonl")
    assert hash_path(tmp_path / "tasks.jsonl") == "7241520764ad6d4d2653695f7710ce590417d0aba8dd37583d37bb7a398efa8f"
    stage = Stage("p", 1, "m:f", {"rate": 1.0}, {}, {}, tmp_path)
    rows = Rows.of(rows_of(SINGLE, kind), kind)
    assert "before" not in rows.schema.names
    assert stage.key(next(rows.tables())) == KEYS[kind]


@pytest.mark.parametrize("kind", KEYS)
def test_conversations_reach_jobs_unchanged(tmp_path: Path, tokenizer: Any, kind: Any) -> None:
    talk = Task("c1", TALK[-2], TALK[-1], earlier(*TALK, system="Be short."), unfinished=True)
    tasks = [SINGLE[0], talk, SINGLE[1]]
    write_tasks(tasks, tmp_path / "tasks.jsonl")
    assert load_tasks(tmp_path / "tasks.jsonl") == tasks
    stage, shards = Stage("p", 1, "m:f", {}, {}, {}, tmp_path), Shards(Rows.of(rows_of(tasks, kind), kind), 2)
    stage.write(shards)
    stage.write(shards)
    received = [row for index in range(len(shards)) for row in stage.read_rows(index).to_pylist()]
    keys = [stage.key(table) for table in shards]
    assert keys == [stage.key(stage.read_rows(index)) for index in range(len(shards))]
    if kind is TaskRow:
        assert [Task.of(row) for row in received] == tasks
    else:
        assert [encode_row(tokenizer, row, 200, "row") for row in received] == [
            encode_task(tokenizer, t, 200) for t in tasks
        ]
    changed = [SINGLE[0], Task("c1", TALK[-2], TALK[-1], earlier(*TALK, system="Be short.", weight=0)), SINGLE[1]]
    assert stage.key(next(Rows.of(rows_of(changed, kind), kind).tables(2))) != keys[0]


def test_demonstration_follows_the_system_turn(tokenizer: Any) -> None:
    task = Task("c1", TALK[-2], TALK[-1], earlier(*TALK[:4], "", "", system="Be short.", weight=0))
    text = shown(tokenizer, encode_task(tokenizer, task, 500, earlier("Count.", "One.", "", "", weight=0)))
    assert [text.index(part) for part in ("Be short.", "Count.", "One.", TALK[0], "[[Black.")] == sorted(
        text.index(part) for part in ("Be short.", "Count.", "One.", TALK[0], "[[Black.")
    )


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("form", CONVERSATION_FORMATS)
def test_selected_conversations_keep_tokens_and_masks(tiny_llama: Path, tmp_path: Path, form: str, suffix: str) -> None:
    mixed = (
        turn("user", "Name a colour."),
        turn("assistant", "Red.", 0),
        turn("user", "No."),
        turn("assistant", "Blue.", 1),
    )
    texts = tuple(text.strip() for text in TALK)  # as they are read
    befores = [earlier(*texts, system="Be short."), earlier(*texts[2:], weight=0), (), mixed]
    tasks = [Task(f"c{number}", f"And then {number}?", " Grey.\n", before) for number, before in enumerate(befores)]
    rows = [
        {
            "id": task.example_id,
            "messages": CONVERSATION_FORMATS["messages"].turns(task.before, task.instruction, task.response),
        }
        for task in tasks
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_table(
        table_from_rows([measured(task.example_id) for task in tasks], INFLUENCE), tmp_path / "i.parquet", INFLUENCE
    )
    pool = open_pool(tmp_path / "i.parquet", DataSource(path=str(tmp_path / "data.jsonl")), form=form)
    chosen = choose(pool, Choice(("influence",), rows=4, max_rouge_l=0.99))
    write_chosen(pool, chosen, tmp_path / f"best.{suffix}")
    selected = read_tasks(DataSource(path=str(tmp_path / f"best.{suffix}")), "data", with_response=True)
    assert selected == tasks
    for name in (*TEMPLATES, "llama3", "gemma", "qwen3"):
        tokenizer = load_tokenizer(str(tiny_llama))
        give_template(tokenizer, name)
        assert [encode_task(tokenizer, task, 300) for task in selected] == [
            encode_task(tokenizer, task, 300) for task in tasks
        ]


def test_format_of_other_pools_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pool.jsonl").write_text('{"instruction": "Hi", "output": "Ho", "influence": 1.0}\n')
    refused = "only the texts of an influence table can be written as messages"
    for form, message in (("messages", refused), ("xml", "no such format; give one of messages, sharegpt")):
        options = [str(tmp_path / "pool.jsonl"), "--k", "1", "--output", str(tmp_path / "best.jsonl"), "--to", form]
        code, output = invoke("select", *options, cwd=tmp_path)
        assert code == 1
        assert message in " ".join(output.split())
    assert not (tmp_path / "best.jsonl").exists()


def measured(name: str) -> dict[str, object]:
    """Return a row of an influence table."""
    row: dict[str, object] = {field.name: None if field.nullable else 0 for field in INFLUENCE}
    row |= {"example_id": name, "prompt_id": name, "status": "ok", "truncated": False, "audited": False}
    return row | {"estimator": "exact", "influence_student": 1.0, "response_tokens": 1}


def test_streamed_rows_have_keys_of_rows_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of single turns has no column of turns, whatever the size of its chunks is."""
    monkeypatch.setattr(task_tables, "ROW_GROUP", 2)
    stage = Stage("p", 1, "m:f", {"rate": 1.0}, {}, {}, tmp_path)
    for tasks, has_turns in ((SINGLE, False), ([*SINGLE, Task("c", "a", "b", earlier(*TALK))], True)):
        for kind in (TrainingRow, ExampleRow):
            write_task_rows(tasks, tmp_path / "rows.parquet", kind, lambda task, kind=kind: rows_of([task], kind)[0])
            rows = task_rows(tmp_path / "rows.parquet", kind)
            assert ("before" in rows.schema.names) == has_turns
            assert stage.key(next(rows.tables())) == stage.key(next(Rows.of(rows_of(tasks, kind), kind).tables()))


def test_streamed_rows_are_not_held(tmp_path: Path) -> None:
    """Memory does not grow with the number of rows."""

    def peak(count: int) -> int:
        tasks = (Task(str(n), f"Do {n}.", "x" * 1000) for n in range(count))
        tracemalloc.start()
        write_task_rows(tasks, tmp_path / "rows.parquet", TrainingRow, Task.to_training_row)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(3 * ROW_GROUP) < 1.5 * peak(ROW_GROUP)
