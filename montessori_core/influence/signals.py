"""Signals other than influence, measured on the student: the training loss of an example, and in-context learning."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from montessori_core import programs
from montessori_core.data.rows import ExampleRow
from montessori_core.data.sources import load_tasks
from montessori_core.data.tables import UTILITY
from montessori_core.influence.losses import TokenLosses
from montessori_core.influence.reference import ReferenceSet, influence_of
from montessori_core.models.chat import IGNORED, Encoded, encode_example, encode_tasks
from montessori_core.models.device import compute_device
from montessori_core.models.load import check_tokenizer, load_model, load_tokenizer
from montessori_core.program import Recorder, RowProgram


def open_training_loss(settings: programs.ModelLoss, inputs: Mapping[str, Path]) -> RowProgram[ExampleRow]:
    """Open the training loss signal: load the student.

    Inputs: `student`. The result is a table of schema `UTILITY`: the mean training loss of the example, nats per token;
    null if no response token fits into the student's `max_length`.
    """
    tokenizer, losses = _open_student(inputs)
    device = compute_device()

    def loss_of(row: ExampleRow) -> float | None:
        example = encode_example(
            tokenizer, row["instruction"], row["response"], settings.max_length, row["response_finished"]
        )
        if not example.response_tokens:
            return None
        return ReferenceSet([example], settings.batch_tokens, device).evaluate(losses).reduce("example")

    return _utility_of_rows(loss_of)


def open_in_context(settings: programs.InContext, inputs: Mapping[str, Path]) -> RowProgram[ExampleRow]:
    """Open the in-context learning signal (ARTE): load the student and the reference set.

    Inputs: `student`; `reference` (tasks). The result is a table of schema `UTILITY`: by how much the example, as a
    demonstration before each reference example, lowers the reference loss, nats per token; null if the two do not fit
    into twice the student's `max_length`.
    """
    tokenizer, losses = _open_student(inputs)
    device = compute_device()
    tasks = load_tasks(inputs["reference"])
    zero_shot = encode_tasks(tokenizer, tasks, settings.max_length, "reference")
    before = ReferenceSet(zero_shot, settings.batch_tokens, device).evaluate(losses)

    def in_context_gain(row: ExampleRow) -> float | None:
        one_shot = []
        demonstration = row["instruction"], row["response"]
        for task, plain in zip(tasks, zero_shot, strict=True):
            example = encode_example(
                tokenizer, task.instruction, task.response, 2 * settings.max_length, demonstration=demonstration
            )
            one_shot.append(first_labels(example, plain.response_tokens))
            if one_shot[-1].response_tokens < plain.response_tokens:
                return None
        after = ReferenceSet(one_shot, settings.batch_tokens, device).evaluate(losses)
        return influence_of(before, after, settings.reference_reduction)[0]

    return _utility_of_rows(in_context_gain)


def first_labels(example: Encoded, count: int) -> Encoded:
    """Return the example with loss on its first `count` response tokens only."""
    remaining, labels = count, []
    for label in example.labels:
        labels.append(label if label != IGNORED and remaining > 0 else IGNORED)
        remaining -= label != IGNORED
    return replace(example, labels=labels)


def _open_student(inputs: Mapping[str, Path]) -> tuple[Any, TokenLosses]:
    path = str(inputs["student"])
    tokenizer = load_tokenizer(path)
    model = load_model(path, torch.float32)
    check_tokenizer(tokenizer, model)
    losses = TokenLosses(model.to(compute_device()).eval())
    return tokenizer, losses


def _utility_of_rows(utility_of: Callable[[ExampleRow], float | None]) -> RowProgram[ExampleRow]:
    def compute(rows: list[ExampleRow], recorder: Recorder) -> None:
        recorder.progress(0)
        for position, row in enumerate(rows):
            ids = {"example_id": row["example_id"], "prompt_id": row["prompt_id"]}
            recorder.finish(position, [{**ids, "utility": utility_of(row)}])
            recorder.progress(position + 1)

    return RowProgram(UTILITY, compute)
