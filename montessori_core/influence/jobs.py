"""Programs of the influence and evaluation stages: influence and held-out loss."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from montessori_core import programs
from montessori_core.data.rows import ExampleRow, TaskRow
from montessori_core.data.sources import Task
from montessori_core.data.tables import REFERENCE_LOSS
from montessori_core.influence.adamw import AdamW
from montessori_core.influence.host_memory import host_memory_limit
from montessori_core.influence.linear import LinearMeter
from montessori_core.influence.losses import TokenLosses
from montessori_core.influence.memory import Planned, plan_memory
from montessori_core.influence.meter import FirstOrder, InfluenceMeter, Measurement
from montessori_core.influence.reference import ReferenceSet, open_reference
from montessori_core.influence.sequential import SequentialReference
from montessori_core.influence.student import ON_DEVICE, Placement, ResidentStudent
from montessori_core.influence.table import CUT_REFERENCES, schema_with_metadata
from montessori_core.models.chat import Encoded
from montessori_core.models.device import compute_device
from montessori_core.models.examples import encode_measured, encode_tasks
from montessori_core.models.load import load_with_tokenizer
from montessori_core.models.shape import GB, Shape
from montessori_core.program import Recorder, Row, RowProgram
from montessori_core.training.moments import cold_moments, load_moments

log = logging.getLogger(__name__)

StepSettings = programs.InfluenceMeasurement | programs.StepProjection


def open_influence(settings: programs.InfluenceMeasurement, inputs: Mapping[str, Path]) -> RowProgram[ExampleRow]:
    """Load the warm student, its moments and the reference set once.

    Inputs: `student`; `moments`, a folder with AdamW's moments, without which the step is a first one; `reference` (tasks);
    `shared`, see `open_program`, without which nothing is shared.
    """
    tokenizer, model = load_student(settings, inputs)
    device = model.device
    reference = open_reference(
        tokenizer, inputs["reference"], settings.max_length, settings.reference_batch_tokens, device
    )
    meter = _open_meter(settings, model, reference, inputs)
    notes = notes_of(meter, reference, settings)

    def compute(rows: list[ExampleRow], recorder: Recorder) -> None:
        recorder.progress(done := 0)
        examples = [encode_measured(tokenizer, row, settings.max_length) for row in rows]
        longest = settings.max_length if settings.estimator == "first_order" else 0
        groups = meter.batches(examples) if isinstance(meter, LinearMeter) else consecutive(examples, longest)
        for positions in groups:
            batch = [examples[position] for position in positions]
            for position, measurement in zip(positions, measure(batch, done, recorder), strict=True):
                recorder.finish(position, [_record(rows[position], examples[position], settings, measurement)])
            done += len(positions)
            recorder.progress(done)

    def measure(batch: list[Encoded], done: int, recorder: Recorder) -> list[Measurement]:
        if isinstance(meter, InfluenceMeter) and settings.estimator == "exact":
            return [meter.measure(batch[0], lambda share: recorder.progress(done + share))]
        return meter.measure_batch(batch)

    return RowProgram(schema_with_metadata(notes), compute)


def notes_of(
    meter: InfluenceMeter | LinearMeter | FirstOrder,
    reference: ReferenceSet,
    settings: programs.InfluenceMeasurement,
) -> dict[str, float]:
    """Return the numbers that are recorded with an influence table, see `table.NOTES` and CUT_REFERENCES."""
    return {
        "noise_floor": meter.noise_floor,
        "null_step_influence": meter.null_step_influence,
        "student_loss": meter.student_loss.reduce(settings.reference_reduction),
        "reference_tokens": float(reference.input_tokens),
        CUT_REFERENCES: float(reference.truncated),
    }


def consecutive(examples: Sequence[Encoded], most_tokens: int) -> list[list[int]]:
    """Return the positions of consecutive examples that are measured together.

    They have at most as many tokens as the longest example may have, for the same memory; a longer one is alone. The result
    of an example does not depend on its batch.
    """
    batches: list[list[int]] = []
    tokens = 0
    for position, example in enumerate(examples):
        length = len(example.input_ids)
        if batches and tokens + length <= most_tokens:
            batches[-1].append(position)
            tokens += length
        else:
            batches.append([position])
            tokens = length
    return batches


def encoded_batches(
    tokenizer: Any, rows: Sequence[ExampleRow], max_length: int, recorder: Recorder
) -> Iterator[tuple[list[int], list[Encoded]]]:
    """Yield the positions and the examples of each batch, see `consecutive`; report progress when it is finished."""
    recorder.progress(done := 0)
    examples = [encode_measured(tokenizer, row, max_length) for row in rows]
    for positions in consecutive(examples, max_length):
        yield positions, [examples[position] for position in positions]
        recorder.progress(done := done + len(positions))


def _record(
    row: ExampleRow, example: Encoded, settings: programs.InfluenceMeasurement, measurement: Measurement
) -> Row:
    return describe_example(row, example) | {"estimator": settings.estimator, "audited": False} | vars(measurement)


def describe_example(row: ExampleRow, example: Encoded) -> Row:
    """Return the fields of a record that say which example it is of, and how it was tokenized."""
    return {
        "example_id": row["example_id"],
        "prompt_id": row["prompt_id"],
        "tokens": len(example.input_ids),
        "response_tokens": example.response_tokens,
        "truncated": example.truncated,
    }


def _open_meter(
    settings: programs.InfluenceMeasurement,
    model: Any,
    reference: ReferenceSet,
    inputs: Mapping[str, Path],
) -> InfluenceMeter | LinearMeter:
    sequential, mixed = settings.sequential, settings.dtype == "mixed"
    typical_tokens = float(reference.tokens.mean()) if settings.step.weight_per == "token" else None

    def open_student() -> ResidentStudent:
        tokens = settings.reference_batch_tokens
        return resident_student(model, settings, inputs, settings.estimator, tokens, typical_tokens)

    shared, reduction = inputs.get("shared"), settings.reference_reduction
    if settings.estimator == "linear":
        state_dtype = _state_dtype(settings)
        return LinearMeter(model, open_student, reference, reduction, mixed, typical_tokens, shared, state_dtype)
    return InfluenceMeter(
        open_student(),
        reference,
        settings.estimator,
        reduction,
        SequentialReference(reference, sequential.block, sequential.error_rate) if sequential else None,
        settings.baseline or "student",
        shared,
    )


def load_student(settings: StepSettings, inputs: Mapping[str, Path]) -> tuple[Any, Any]:
    """Return the tokenizer and the model of the input `student`, on the device that computes."""
    dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    tokenizer, model = load_with_tokenizer(str(inputs["student"]), dtype)
    return tokenizer, model.to(compute_device())


def resident_student(
    model: Any,
    settings: StepSettings,
    inputs: Mapping[str, Path],
    estimator: Planned,
    batch_tokens: int,
    typical_tokens: float | None = None,
    targets: int = 1,
) -> ResidentStudent:
    """Return the student with its moments, those of the input `moments` or zeros; see `ResidentStudent`.

    Args:
        model: the student, on its device.
        settings: of the step.
        inputs: of the program.
        estimator: what is measured, which decides what is in memory.
        batch_tokens: tokens of a batch of reference examples.
        typical_tokens: see `ResidentStudent`.
        targets: number of reference sets.
    """
    moments = load_moments(inputs["moments"]) if "moments" in inputs else cold_moments(model)
    adamw = AdamW(step=moments.step + 1, **settings.step.model_dump(exclude={"weight_per"}))
    placement, mixed = _placement(model, settings, estimator, batch_tokens, targets), settings.dtype == "mixed"
    # A linear step adds up squares in the second moment, which takes fp32; and only its directions stay in memory.
    state_dtype = None if estimator == "linear" else _state_dtype(settings)
    return ResidentStudent(model, moments, adamw, model.device, mixed, placement, typical_tokens, state_dtype)


def _state_dtype(settings: StepSettings) -> torch.dtype | None:
    """Return what the state is kept in, None if that is the dtype of the weights."""
    return torch.bfloat16 if settings.state_dtype == "bfloat16" and settings.dtype != "bfloat16" else None


def _placement(model: Any, settings: StepSettings, estimator: Planned, batch_tokens: int, targets: int) -> Placement:
    """Return where moments, snapshot and reference gradient go, given the device's memory.

    Raises:
        UserError: the device or the host has too little memory.
    """
    if model.device.type == "cpu":
        return ON_DEVICE
    _, memory = torch.cuda.mem_get_info(model.device)
    dtypes = settings.dtype, settings.state_dtype
    plan = plan_memory(Shape.of(model), estimator, dtypes, settings.max_length, batch_tokens, memory, targets)
    log.info("memory: %s", ", ".join(f"{n.name} {n.size / GB:.1f} GB on the {n.home}" for n in plan.needs))
    plan.check(host_memory_limit())
    return plan.placement


def open_reference_loss(settings: programs.ModelLoss, inputs: Mapping[str, Path]) -> RowProgram[TaskRow]:
    """Load a model to evaluate its loss on human-written examples.

    Inputs: `model`.
    """
    device = compute_device()
    tokenizer, model = load_with_tokenizer(str(inputs["model"]), torch.float32)
    losses = TokenLosses(model.to(device).eval())

    def compute(rows: list[TaskRow], recorder: Recorder) -> None:
        tasks = [Task.of(row) for row in rows]
        encoded = encode_tasks(tokenizer, tasks, settings.max_length, "evaluation")
        examples = ReferenceSet(encoded, settings.batch_tokens, device)
        recorder.progress(done := 0)
        # Batches group rows of similar length and are recorded whole: a resumed job computes the same batches.
        for batch in examples.batches:
            summed = examples.sum_losses(losses, [batch])
            for position in batch.indices:
                loss, tokens = float(summed[position]), int(examples.tokens[position])
                record = {"example_id": tasks[position].example_id, "loss": loss, "response_tokens": tokens}
                recorder.finish(position, [record])
            done += len(batch.indices)
            recorder.progress(done)

    return RowProgram(REFERENCE_LOSS, compute)
