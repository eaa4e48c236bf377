"""Tokenize rows of programs and human-written tasks for the student."""

import logging
from collections.abc import Sequence
from typing import Any

from montessori_core.data.rows import EarlierTurn, ExampleRow, TrainingRow
from montessori_core.data.sources import Task
from montessori_core.errors import DataError
from montessori_core.models.chat import Encoded, encode_example

log = logging.getLogger(__name__)


def encode_row(tokenizer: Any, row: TrainingRow, max_length: int, name: str) -> Encoded:
    """Tokenize a row of a program; see `encode_example`."""
    before, finished = row.get("before") or (), row["response_finished"]
    return encode_example(tokenizer, row["instruction"], row["response"], max_length, finished, before, name)


def encode_measured(tokenizer: Any, row: ExampleRow, max_length: int) -> Encoded:
    """Tokenize an example that is measured; see `encode_example`."""
    return encode_row(tokenizer, row, max_length, f"example {row['example_id']}")


def encode_task(tokenizer: Any, task: Task, max_length: int, demonstration: Sequence[EarlierTurn] = ()) -> Encoded:
    """Tokenize a human-written task after a `demonstration`, if any; see `encode_example`."""
    systems = sum(turn["role"] == "system" for turn in task.before)
    before = [*task.before[:systems], *demonstration, *task.before[systems:]]
    finished, name = not task.unfinished, f"example {task.example_id}"
    return encode_example(tokenizer, task.instruction, task.response, max_length, finished, before, name)


def encode_tasks(tokenizer: Any, tasks: list[Task], max_length: int, field: str) -> list[Encoded]:
    """Tokenize human-written tasks for the student; `field` names the set in errors and in a warning of cut ones.

    Raises:
        DataError: a task has no response token within `max_length`.
    """
    encoded = [encode_task(tokenizer, task, max_length) for task in tasks]
    empty = [task.example_id for task, example in zip(tasks, encoded, strict=True) if not example.response_tokens]
    if empty:
        raise DataError(
            f"{field}: {len(empty)} examples have no response within student.max_length={max_length} tokens, e.g. "
            f"{empty[0]}; raise it or shorten them"
        )
    if cut := sum(example.truncated for example in encoded):
        log.warning(
            "%s: the end of %d of %d examples is beyond student.max_length=%d tokens, and is cut; see montessori data check",
            *(field, cut, len(tasks), max_length),
        )
    return encoded
