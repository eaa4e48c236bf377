"""Programs of a step store: project the steps on examples, and the gradient of a reference set; see `projections`."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from montessori_core import programs
from montessori_core.data.rows import ExampleRow, TaskRow
from montessori_core.data.sources import Task
from montessori_core.data.tables import REFERENCE_PROJECTION, STEPS, table_from_rows, write_table
from montessori_core.influence.jobs import describe_example, encoded_batches, load_student, resident_student
from montessori_core.influence.losses import make_batch
from montessori_core.influence.reference import ReferenceSet, influence_of
from montessori_core.influence.reference_state import ReferenceState
from montessori_core.influence.stored_steps import FP16
from montessori_core.influence.table import CUT_REFERENCES
from montessori_core.models.examples import encode_tasks
from montessori_core.program import Compute, Recorder, Report, Row, RowProgram

_NO_STEP: Row = {"status": "no_response_tokens", "scale": 0.0, "numbers": b""}


def open_steps(settings: programs.StepProjection, inputs: Mapping[str, Path]) -> RowProgram[ExampleRow]:
    """Load the student and project the steps on examples.

    Inputs: `student`; `moments`, without which the step is a first one.
    """
    tokenizer, model = load_student(settings, inputs)
    student = resident_student(model, settings, inputs, "steps", settings.max_length)
    student.end_steps()
    directions = student.random_directions(settings.numbers)
    null_step = student.project_null_step(directions)

    def compute(rows: list[ExampleRow], recorder: Recorder) -> None:
        for positions, examples in encoded_batches(tokenizer, rows, settings.max_length, recorder):
            measured = [example for example in examples if example.response_tokens]
            steps = iter(student.project_steps([make_batch([(0, e)], student.device) for e in measured], directions))
            for position, example in zip(positions, examples, strict=True):
                kept = _NO_STEP
                if example.response_tokens:
                    gradient, numbers = next(steps)
                    kept = _kept(numbers - null_step) | {
                        "example_loss": gradient.loss if math.isfinite(gradient.loss) else None,
                        "gradient_norm": gradient.norm if math.isfinite(gradient.norm) else None,
                        "dominated_share": gradient.dominated_share,
                    }
                recorder.finish(position, [describe_example(rows[position], example) | kept])

    return RowProgram(STEPS, compute)


def open_reference_projection(settings: programs.ReferenceProjection, inputs: Mapping[str, Path]) -> Compute[TaskRow]:
    """Load the student; project the gradient of its loss on the reference examples, which are the rows.

    Inputs: as `open_steps`.
    """
    tokenizer, model = load_student(settings, inputs)
    student = resident_student(model, settings, inputs, "first_order", settings.reference_batch_tokens)

    def compute(rows: list[TaskRow], path: Path, report: Report) -> None:
        encoded = encode_tasks(tokenizer, [Task.of(row) for row in rows], settings.max_length, "reference")
        reference = ReferenceSet(encoded, settings.reference_batch_tokens, student.device)
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
                CUT_REFERENCES: float(reference.truncated),
            },
        }
        write_table(table_from_rows([row], REFERENCE_PROJECTION), path, REFERENCE_PROJECTION)

    return compute


def _kept(numbers: torch.Tensor) -> Row:
    """Return the fields of a projection."""
    if not numbers.isfinite().all():
        return _NO_STEP | {"status": "non_finite"}
    scale = float(numbers.abs().max()) or 1.0
    return {"status": "ok", "scale": scale, "numbers": (numbers / scale).numpy().astype(FP16).tobytes()}
