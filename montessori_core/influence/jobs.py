"""Influence and held-out loss on a node: the programs behind the influence and evaluation stages."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from montessori_core.chat import Encoded, encode_example
from montessori_core.config import Influence, Student, Warmup
from montessori_core.errors import DataError
from montessori_core.influence.adamw import AdamW
from montessori_core.influence.estimators import InfluenceMeter
from montessori_core.influence.reference import ReferenceSet
from montessori_core.influence_table import note_influence
from montessori_core.models import load_model, load_tokenizer
from montessori_core.program import Compute, Report, Row
from montessori_core.schema import INFLUENCE, REFERENCE_LOSS, table_from_rows, write_table
from montessori_core.sources import Task, load_tasks
from montessori_core.training.moments import cold_moments, load_moments


def open_influence(settings: Mapping[str, Any], inputs: Mapping[str, Path]) -> Compute:
    """Load the warm student, its moments and the reference set once.

    Settings: `student`, `influence`, `warmup` (their configurations). Inputs: `student`, unless it is a hub id; `moments`, a
    folder with AdamW's moments, without which the step is a first one; `reference` (tasks). Rows: `example_id`,
    `prompt_id`, `instruction`, `response`, `finished`.
    """
    student = Student.model_validate(settings["student"])
    influence = Influence.model_validate(settings["influence"])
    warmup = Warmup.model_validate(settings["warmup"])
    device = _device()
    path = str(inputs.get("student", student.model))
    tokenizer = load_tokenizer(path, student.revision)
    model = load_model(path, torch.float32, student.revision).to(device)
    moments = load_moments(inputs["moments"]) if "moments" in inputs else cold_moments(model)
    reference = _encode_tasks(tokenizer, load_tasks(inputs["reference"]), student.max_length, "reference")
    meter = InfluenceMeter(
        model,
        moments,
        AdamW(
            influence.learning_rate or warmup.learning_rate,
            warmup.beta1,
            warmup.beta2,
            warmup.epsilon,
            warmup.weight_decay,
            moments.step + 1,
        ),
        ReferenceSet(reference, influence.reference_batch_tokens, tokenizer.pad_token_id, device),
        device,
        influence.estimator,
        influence.reference_reduction,
    )
    measured = {
        "noise_floor": meter.noise_floor,
        "null_step_influence": meter.null_step_influence,
        "student_loss": meter.student_loss.reduce(influence.reference_reduction),
    }

    def compute(rows: list[Row], output: Path, report: Report) -> None:
        records = []
        for number, row in enumerate(rows, 1):
            example = encode_example(
                tokenizer, row["instruction"], row["response"], student.max_length, row["finished"]
            )
            records.append(
                {
                    "example_id": row["example_id"],
                    "prompt_id": row["prompt_id"],
                    "tokens": len(example.input_ids),
                    "response_tokens": example.response_tokens,
                    "truncated": example.truncated,
                    "estimator": influence.estimator,
                    **vars(meter.measure(example)),
                }
            )
            report(number)
        write_table(note_influence(table_from_rows(records, INFLUENCE), measured), output, INFLUENCE)

    return compute


def open_reference_loss(settings: Mapping[str, Any], inputs: Mapping[str, Path]) -> Compute:
    """Load a model to evaluate its loss on human-written examples.

    Settings: `student`, `batch_tokens`. Inputs: `model`, or the student's own. Rows: `id`, `text`, `response`.
    """
    student = Student.model_validate(settings["student"])
    path = str(inputs.get("model", student.model))
    device = _device()
    tokenizer = load_tokenizer(path, student.revision)
    model = load_model(path, torch.float32, student.revision).to(device).eval()

    def compute(rows: list[Row], output: Path, report: Report) -> None:
        tasks = [Task(**row) for row in rows]
        encoded = _encode_tasks(tokenizer, tasks, student.max_length, "evaluation")
        loss = ReferenceSet(encoded, settings["batch_tokens"], tokenizer.pad_token_id, device).evaluate(model, report)
        records: list[Row] = [
            {"example_id": task.id, "loss": float(summed), "response_tokens": int(tokens)}
            for task, summed, tokens in zip(tasks, loss.summed, loss.tokens, strict=True)
        ]
        write_table(table_from_rows(records, REFERENCE_LOSS), output, REFERENCE_LOSS)

    return compute


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _encode_tasks(tokenizer: Any, tasks: list[Task], max_length: int, field: str) -> list[Encoded]:
    encoded = [encode_example(tokenizer, task.text, task.response, max_length) for task in tasks]
    empty = [task.id for task, example in zip(tasks, encoded, strict=True) if not example.response_tokens]
    if empty:
        raise DataError(
            f"{field}: {len(empty)} examples have no response within student.max_length={max_length} tokens, e.g. "
            f"{empty[0]}; raise max_length or shorten them"
        )
    return encoded
