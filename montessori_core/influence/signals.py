"""Signals other than influence, measured on the student: training loss, in-context learning, gradient cosine."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from montessori_core import programs
from montessori_core.data.rows import EarlierTurn, ExampleRow
from montessori_core.data.sources import load_tasks
from montessori_core.data.tables import UTILITY
from montessori_core.influence.losses import TokenLosses, example_loss, make_batch
from montessori_core.influence.reference import ReferenceSet, influence_of, open_reference
from montessori_core.models.chat import IGNORED, Encoded
from montessori_core.models.device import check_memory, compute_device
from montessori_core.models.examples import encode_measured, encode_task, encode_tasks
from montessori_core.models.load import load_with_tokenizer
from montessori_core.models.positions import positions_of
from montessori_core.program import Recorder, RowProgram


def open_training_loss(settings: programs.ModelLoss, inputs: Mapping[str, Path]) -> RowProgram[ExampleRow]:
    """Open the training loss signal: load the student.

    Inputs: `student`. The result is a table of schema `UTILITY`: the mean training loss of the example, nats per token;
    null if no response token fits into the student's `max_length`.
    """
    tokenizer, model = _open_student(inputs)
    losses, device = TokenLosses(model), compute_device()

    def loss_of(row: ExampleRow) -> float | None:
        example = encode_measured(tokenizer, row, settings.max_length)
        if not example.response_tokens:
            return None
        return ReferenceSet([example], settings.batch_tokens, device).evaluate(losses).reduce("example")

    return _utility_of_rows(loss_of)


def open_in_context(settings: programs.ReferenceSignal, inputs: Mapping[str, Path]) -> RowProgram[ExampleRow]:
    """Open the in-context learning signal (ARTE): load the student and the reference set.

    Inputs: `student`; `reference` (tasks). The result is a table of schema `UTILITY`: by how much the example, as a
    demonstration before each reference example, lowers the reference loss, nats per token; null if the two do not fit
    into twice the student's `max_length`, or into its positions.
    """
    tokenizer, model = _open_student(inputs)
    longest = min(2 * settings.max_length, positions_of(inputs["student"]) or 2 * settings.max_length)
    losses, device = TokenLosses(model), compute_device()
    tasks = load_tasks(inputs["reference"])
    zero_shot = encode_tasks(tokenizer, tasks, settings.max_length, "reference")
    before = ReferenceSet(zero_shot, settings.batch_tokens, device).evaluate(losses)

    def in_context_gain(row: ExampleRow) -> float | None:
        one_shot = []
        demonstration: list[EarlierTurn] = [
            {"role": "user", "content": row["instruction"], "weight": 0},
            {"role": "assistant", "content": row["response"], "weight": 0},
        ]
        for task, plain in zip(tasks, zero_shot, strict=True):
            example = encode_task(tokenizer, task, longest, demonstration)
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


def open_gradient_cosine(settings: programs.ReferenceSignal, inputs: Mapping[str, Path]) -> RowProgram[ExampleRow]:
    """Open the gradient cosine signal: load the student, and compute the gradient of its reference loss once.

    Inputs: `student`; `reference` (tasks). The result is a table of schema `UTILITY`: the cosine between the gradients of
    the example's loss and of the reference loss; null if no response token fits into the student's `max_length`, or a
    gradient is zero or not finite.
    """
    tokenizer, model = _open_student(inputs)
    check_memory(model, 12, "the cosine of gradients")  # fp32: a gradient and that of the reference loss
    losses, device = TokenLosses(model), compute_device()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    reference = open_reference(tokenizer, inputs["reference"], settings.max_length, settings.batch_tokens, device)
    reference.backward(losses, settings.reference_reduction, range(len(reference)))
    direction = _take_gradients(parameters)
    square = _inner_product(direction, direction)

    def cosine(row: ExampleRow) -> float | None:
        example = encode_measured(tokenizer, row, settings.max_length)
        if not example.response_tokens:
            return None
        example_loss(losses, make_batch([(0, example)], device)).backward()
        gradient = _take_gradients(parameters)
        norms = math.sqrt(_inner_product(gradient, gradient) * square)
        return _inner_product(gradient, direction) / norms if 0 < norms < math.inf else None

    return _utility_of_rows(cosine)


def _take_gradients(parameters: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Return the gradients of the parameters (zero where there is none), and free them."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradients


def _inner_product(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    """Return the inner product, summed in fp64."""
    return math.fsum(float((a * b).sum(dtype=torch.float64)) for a, b in zip(first, second, strict=True))


def _open_student(inputs: Mapping[str, Path]) -> tuple[Any, Any]:
    tokenizer, model = load_with_tokenizer(str(inputs["student"]), torch.float32)
    return tokenizer, model.to(compute_device()).eval()


def _utility_of_rows(utility_of: Callable[[ExampleRow], float | None]) -> RowProgram[ExampleRow]:
    def compute(rows: list[ExampleRow], recorder: Recorder) -> None:
        recorder.progress(0)
        for position, row in enumerate(rows):
            ids = {"example_id": row["example_id"], "prompt_id": row["prompt_id"]}
            recorder.finish(position, [{**ids, "utility": utility_of(row)}])
            recorder.progress(position + 1)

    return RowProgram(UTILITY, compute)
