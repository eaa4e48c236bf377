"""Programs of a step store: project the steps on examples, and the gradient of a reference set; see `projections`."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from montessori_core import programs
from montessori_core.data.rows import ExampleRow, TaskRow
from montessori_core.data.sources import Task
from montessori_core.data.tables import REFERENCE_PROJECTION, STEPS, table_from_rows, write_table
from montessori_core.influence.jobs import consecutive, place_student, resident_student
from montessori_core.influence.losses import make_batch
from montessori_core.influence.reference import ReferenceSet, influence_of
from montessori_core.influence.reference_state import ReferenceState
from montessori_core.influence.stored_steps import FP16
from montessori_core.models.chat import Encoded
from montessori_core.models.device import compute_device
from montessori_core.models.examples import encode_measured, encode_tasks
from montessori_core.models.load import load_with_tokenizer
from montessori_core.program import Compute, Recorder, Report, Row, RowProgram


def open_steps(settings: programs.StepProjection, inputs: Mapping[str, Path]) -> RowProgram[ExampleRow]:
    """Load the student and project the steps on examples.

    Inputs: `student`; `moments`, without which the step is a first one.
    """
    device = compute_device()
    tokenizer, model = _load(settings, inputs)
    placement = place_student(model, settings, "first_order", settings.max_length, device)
    student = resident_student(model.to(device), settings, inputs, device, placement)
    student.drop_snapshot()
    directions = student.random_directions(settings.numbers)
    null_step = student.project_null_step_onto(directions)

    def compute(rows: list[ExampleRow], recorder: Recorder) -> None:
        recorder.progress(done := 0)
        examples = [encode_measured(tokenizer, row, settings.max_length) for row in rows]
        for positions in consecutive(examples, settings.max_length):
            measured = [position for position in positions if examples[position].response_tokens]
            batches = [make_batch([(0, examples[position])], device) for position in measured]
            steps = dict(zip(measured, student.project_steps_onto(directions, batches), strict=True))
            for position in positions:
                row = _described(rows[position], examples[position])
                if position in steps:
                    gradient, numbers = steps[position]
                    row |= _kept(numbers - null_step) | {
                        "example_loss": gradient.loss if math.isfinite(gradient.loss) else None,
                        "gradient_norm": gradient.norm if math.isfinite(gradient.norm) else None,
                        "dominated_share": gradient.dominated_share,
                    }
                recorder.finish(position, [row])
            done += len(positions)
            recorder.progress(done)

    return RowProgram(STEPS, compute)


def open_reference_projection(settings: programs.ReferenceProjection, inputs: Mapping[str, Path]) -> Compute[TaskRow]:
    """Load the student; project the gradient of its loss on the reference examples, which are the rows.

    Inputs: as `open_steps`.
    """
    device = compute_device()
    tokenizer, model = _load(settings, inputs)
    placement = place_student(model, settings, "first_order", settings.reference_batch_tokens, device)
    student = resident_student(model.to(device), settings, inputs, device, placement)

    def compute(rows: list[TaskRow], path: Path, report: Report) -> None:
        encoded = encode_tasks(tokenizer, [Task.of(row) for row in rows], settings.max_length, "reference")
        reference = ReferenceSet(encoded, settings.reference_batch_tokens, device)
        state = ReferenceState.measure(student, reference, "first_order", settings.reference_reduction)
        assert state.gradient is not None
        directions = student.random_directions(settings.numbers)
        null_step_influence, _ = influence_of(state.student_loss, state.null_step_loss, settings.reference_reduction)
        row: Row = {
            "full": student.project_gradient(directions, state.gradient.full).tolist(),
            "half": student.project_gradient(directions, state.gradient.half).tolist(),
            "references": len(reference),
            "notes": {
                "noise_floor": state.noise_floor,
                "null_step_influence": null_step_influence,
                "student_loss": state.student_loss.reduce(settings.reference_reduction),
                "reference_tokens": float(reference.input_tokens),
            },
        }
        write_table(table_from_rows([row], REFERENCE_PROJECTION), path, REFERENCE_PROJECTION)

    return compute


def _load(settings: programs.StepProjection, inputs: Mapping[str, Path]) -> tuple[Any, Any]:
    dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    return load_with_tokenizer(str(inputs["student"]), dtype)


def _described(row: ExampleRow, example: Encoded) -> Row:
    """Return the record of an example without a step."""
    return {
        "example_id": row["example_id"],
        "prompt_id": row["prompt_id"],
        "status": "no_response_tokens",
        "tokens": len(example.input_ids),
        "response_tokens": example.response_tokens,
        "truncated": example.truncated,
        "scale": 0.0,
        "numbers": b"",
    }


def _kept(numbers: torch.Tensor) -> Row:
    """Return the fields of a projection."""
    if not numbers.isfinite().all():
        return {"status": "non_finite"}
    scale = float(numbers.abs().max()) or 1.0
    return {"status": "ok", "scale": scale, "numbers": (numbers / scale).numpy().astype(FP16).tobytes()}
