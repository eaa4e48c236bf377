"""NOMAD: encoding, reading and filtering conversations, and NormSim."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from montessori_core.data.sources import Task, write_tasks
from montessori_core.data.tables import SIMILARITY, read_table
from montessori_core.models.chat import IGNORED
from montessori_core.models.load import load_model, load_tokenizer
from montessori_core.models.rendering import text_beginning
from montessori_core.programs import Similarity
from montessori_core.synthesis.filtering import CODE, INCOMPLETE, REPETITION
from montessori_core.synthesis.nomad import (
    USER,
    Conversation,
    RealExamples,
    encode_conversation,
    judge_conversation,
    open_norm_sim,
    read_conversation,
)
from support.row_programs import as_compute


@pytest.mark.parametrize("masked", [False, True])
def test_instruction_has_loss_unless_masked(smollm2: Path, masked: bool) -> None:
    tokenizer = load_tokenizer(str(smollm2))
    encoded = encode_conversation(tokenizer, "Name a river.", "The Danube.", 64, mask_prompt=masked)
    assert tokenizer.decode(encoded.input_ids[:-1]) == "User: Name a river.\nAssistant: The Danube."
    assert encoded.input_ids[-1] == tokenizer.eos_token_id
    learned = tokenizer.decode([label for label in encoded.labels if label != IGNORED][:-1])
    assert learned == (" The Danube." if masked else "User: Name a river.\nAssistant: The Danube.")
    beginning = tokenizer(USER, add_special_tokens=False)["input_ids"]
    assert encoded.input_ids[: len(beginning)] == beginning  # training and generation start with the same tokens
    assert encode_conversation(tokenizer, "Name a river.", "The Danube.", 5).truncated
    cut = encode_conversation(tokenizer, "Name a river.", "The Dan", 64, finished=False)
    assert cut.labels[-1] == IGNORED  # truncated


@pytest.mark.parametrize("begins", [False, True])
def test_trained_conversation_begins_like_generation(smollm2: Path, begins: bool) -> None:
    tokenizer = load_tokenizer(str(smollm2))
    tokenizer.bos_token = "<|endoftext|>"
    if begins:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
        )
    encoded = encode_conversation(tokenizer, "Name a river.", "The Danube.", 64)
    beginning = tokenizer(f"{text_beginning(tokenizer)}{USER}", add_special_tokens=False)["input_ids"]
    assert [token == tokenizer.bos_token_id for token in beginning] == [True] * begins + [False, False]
    assert encoded.input_ids[: len(beginning)] == beginning
    assert encoded.labels[: len(beginning)] == beginning


@pytest.mark.parametrize(
    ("text", "finish_reason", "expected"),
    [
        (" Name a river.\nAssistant: The Danube.", "stop", Conversation("Name a river.", "The Danube.")),
        (
            " Name one.\nAssistant: Spree.\nUser: Another?\nAssistant: The",
            "length",
            Conversation("Name one.", "Spree."),
        ),
        (" Two\nlines.\nAssistant: And\nmore.", "stop", Conversation("Two\nlines.", "And\nmore.")),
        (" Name a river.\nAssistant: The Dan", "length", None),
        (" Name a river.", "stop", None),
        (" Name a river.\nAssistant: ", "stop", None),
        ("\nAssistant: The Danube.", "stop", None),
        (" Name a river.\nUser: Please.\nAssistant: The Danube.", "stop", None),
    ],
)
def test_first_round_of_a_complete_conversation_is_kept(
    text: str, finish_reason: str, expected: Conversation | None
) -> None:
    assert read_conversation(text, finish_reason) == expected
    assert (judge_conversation(read_conversation(text, finish_reason)) == INCOMPLETE) == (expected is None)


@given(st.text(max_size=200), st.sampled_from(["stop", "length"]))
def test_read_conversation_accepts_any_text(text: str, finish_reason: str) -> None:
    found = read_conversation(text, finish_reason)
    if found is not None:
        assert found.instruction
        assert found.response
        judge_conversation(found)


@pytest.mark.parametrize(
    ("response", "rejection"),
    [
        ("Rivers flow to the sea, and the sea is wide and blue.", None),
        ("It is very, very, very good.", None),  # three times may be intended
        ("no no no no", REPETITION),
        ("The sea is wide, the sea is wide, the sea is wide, the sea is wide,", REPETITION),
        ("Use python to do it.", CODE),
        ("def answer(): pass", CODE),
        ("```\nx = 1\n```", CODE),
        ("Select the ripest fruit from the basket.", None),
        ("She saw a python in the zoo's javanese house.", CODE),  # a keyword search has false positives
        ("The javanese house is old.", None),
    ],
)
def test_filters_drop_repetition_and_code(response: str, rejection: str | None) -> None:
    assert judge_conversation(Conversation("Tell me.", response)) == rejection
    assert judge_conversation(Conversation(response, "Well.")) == rejection


def test_filters_resist_regex_backtracking() -> None:
    started = time.process_time()
    for text in (
        "a " * 20_000 + "b",
        "ab" * 20_000,
        "select " * 5_000,
        "a-b " * 10_000,
        " ".join(map(str, range(20_000))),
    ):
        judge_conversation(Conversation("Tell me.", text))
    assert time.process_time() - started < 20


def test_norm_sim_uses_nearest_real_example() -> None:
    common = np.array([7.0, 7.0, 7.0])  # without information
    real = common + np.array([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, -2.0, 0.0]])
    synthetic = common + np.array([[3.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])
    assert RealExamples(real).norm_sim(synthetic) == pytest.approx([1.0, 0.8, 0.0])
    assert RealExamples(real[:1]).norm_sim(real[:1]) == pytest.approx([1.0])


def record_inputs(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Return a list that gets the token ids of each text that a model reads."""
    read: list[list[int]] = []

    def load(*arguments: Any) -> Any:
        model = load_model(*arguments)
        model.register_forward_pre_hook(
            lambda _, __, named: read.append(named["input_ids"][0].tolist()), with_kwargs=True
        )
        return model

    monkeypatch.setattr("montessori_core.models.load.load_model", load)
    return read


def test_norm_sim_reads_control_tokens_as_characters(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = load_tokenizer(str(tiny_llama)).eos_token
    read = record_inputs(monkeypatch)
    text = f"Say {control} aloud."
    write_tasks([Task("r", text, "Yes."), Task("s", "Name a river.", "The Danube.")], tmp_path / "real.jsonl")
    compute = as_compute(
        open_norm_sim(Similarity(max_length=64), {"student": tiny_llama, "real": tmp_path / "real.jsonl"})
    )
    compute([{"example_id": "x", "instruction": text, "response": "Yes."}], tmp_path / "part.parquet", print)
    assert len(read) == 3
    assert not any(load_tokenizer(str(tiny_llama)).eos_token_id in ids for ids in read)
    assert read_table(tmp_path / "part.parquet", SIMILARITY)["norm_sim"].to_pylist() == [pytest.approx(1.0)]


def test_norm_sim_reads_texts_after_beginning_token(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = record_inputs(monkeypatch)

    def tokenizer_with_beginning(model: str) -> Any:
        tokenizer = load_tokenizer(model)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
        )
        return tokenizer

    monkeypatch.setattr("montessori_core.models.load.load_tokenizer", tokenizer_with_beginning)
    write_tasks([Task("r", "Name a river.", "Yes."), Task("s", "Name a sea.", "No.")], tmp_path / "real.jsonl")
    open_norm_sim(Similarity(max_length=64), {"student": tiny_llama, "real": tmp_path / "real.jsonl"})
    beginning = load_tokenizer(str(tiny_llama)).bos_token_id
    assert [ids.count(beginning) for ids in read] == [1, 1]
    assert all(ids[0] == beginning for ids in read)
