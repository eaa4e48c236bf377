"""What an example is worth as a demonstration: in-context learning in place of a training step (ARTE)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from montessori_core.chat import encode_example
from montessori_core.config import Student
from montessori_core.influence.jobs import compute_device
from montessori_core.influence.losses import TokenLosses
from montessori_core.influence.reference import ReferenceSet, influence_of
from montessori_core.models import check_tokenizer, load_model, load_tokenizer
from montessori_core.program import Compute, Report, Row
from montessori_core.schema import UTILITY, table_from_rows, write_table
from montessori_core.sources import load_tasks


def open_in_context(settings: Mapping[str, Any], inputs: Mapping[str, Path]) -> Compute:
    """Load the student and the reference set once.

    Settings: `student`, `batch_tokens`, `reference_reduction`. Inputs: `student`; `reference` (tasks). Rows: `example_id`,
    `prompt_id`, `instruction`, `response`. The result is a table of schema `UTILITY`: how much lower the reference loss is
    with the example shown before each reference example than without, nats per token; null where the two do not fit
    together into twice the student's `max_length`.
    """
    import torch

    student = Student.model_validate(settings["student"])
    device = compute_device()
    path = str(inputs["student"])
    tokenizer = load_tokenizer(path)
    model = load_model(path, torch.float32)
    check_tokenizer(tokenizer, model)
    losses = TokenLosses(model.to(device).eval())
    tasks = load_tasks(inputs["reference"])

    def reference_with(demonstration: tuple[str, str] | None) -> ReferenceSet:
        limit = student.max_length * (2 if demonstration else 1)
        encoded = [
            encode_example(tokenizer, task.text, task.response, limit, demonstration=demonstration) for task in tasks
        ]
        return ReferenceSet(encoded, settings["batch_tokens"], device)

    plain = reference_with(None)
    before = plain.evaluate(losses)

    def compute(rows: list[Row], output: Path, report: Report) -> None:
        records: list[Row] = []
        for number, row in enumerate(rows, 1):
            shown = reference_with((row["instruction"], row["response"]))
            utility = None
            if torch.equal(shown.tokens, plain.tokens):
                utility, _ = influence_of(before, shown.evaluate(losses), settings["reference_reduction"])
            records.append({"example_id": row["example_id"], "prompt_id": row["prompt_id"], "utility": utility})
            report(number)
        write_table(table_from_rows(records, UTILITY), output, UTILITY)

    return compute
