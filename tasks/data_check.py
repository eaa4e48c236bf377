"""What a data source holds: rows, bad rows, lengths, duplicates, languages, and the first rows as the student sees them."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from montessori_core.config import DataSource
from montessori_core.data.bad_rows import BadRow
from montessori_core.data.languages import language_of
from montessori_core.data.rouge import RougeIndex
from montessori_core.data.sources import Task, TaskReader, check_reference_size
from montessori_core.errors import DataError
from montessori_core.models.chat import IGNORED, Encoded
from montessori_core.models.examples import encode_task
from montessori_core.models.rendering import takes_system_turn

SAMPLE = 5_000
"""Rows whose tokens, near duplicates and languages are examined: all of a small source, a random sample of a large one."""
NEAR = 0.9
"""ROUGE-L F of two instructions above which they are near duplicates, as between the sets of a run."""
_SHOWN = 3
_QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)

Part = tuple[str, bool]
"""A text of a rendered example, and whether its tokens are trained."""


@dataclass(frozen=True)
class DataCheck:
    """What a data source holds.

    Attributes:
        format: of its rows.
        tasks: number of rows that can be used, up to the source's limit.
        bad_rows: rows that cannot.
        refusal: whether a run refuses the source for its bad rows.
        too_few: why a run refuses it as a reference set, None if it is large enough.
        duplicates: number of rows with the same turns as an earlier one.
        rounds: number of rows by their rounds, each a turn of the user and an answer.
        system_turns: number of rows with a system turn.
        moves_system_turn: whether the student's chat template takes none, so that its text is put before the first user turn.
        sampled: number of rows on which the rest is based.
        unit: of lengths, 'tokens' or 'characters'.
        lengths: minimum, median, 90 %, 99 % and maximum of each length, by name.
        truncated: rows longer than the student's maximum, whose end is cut; None without a model.
        without_response: rows whose response lies beyond it; None without a model.
        near_duplicates: instructions that are nearly those of another row, and such a pair of instructions; of a
            conversation, all turns before its last answer count, except a system turn.
        languages: number of rows by the language of their turns before the response; None where it cannot be told.
        first: the first rows, in parts.
    """

    format: str
    tasks: int
    bad_rows: list[BadRow]
    refusal: bool
    too_few: str | None
    duplicates: int
    rounds: Counter[int]
    system_turns: int
    moves_system_turn: bool
    sampled: int
    unit: str
    lengths: dict[str, list[int]]
    truncated: int | None
    without_response: int | None
    near_duplicates: tuple[int, tuple[str, str] | None]
    languages: Counter[str | None]
    first: list[list[Part]]


def check_data(
    source: DataSource, field: str, with_response: bool, tokenizer: Any = None, max_length: int = 1024
) -> DataCheck:
    """Read a source once, row by row, and describe it. Bad rows are collected, whatever the source says.

    Args:
        source: the source.
        field: the set it is read as, such as 'reference'.
        with_response: whether rows have a response.
        tokenizer: of the student; None counts characters.
        max_length: tokens of an example; longer ones are cut.

    Raises:
        DataError: a file cannot be read, or no row can be used.
    """
    reader = TaskReader(source.model_copy(update={"drop_bad_rows": True, "max_bad_rows": 1.0}), field, with_response)
    read = _read(reader)
    sample = read.sample
    encoded = [encode_task(tokenizer, task, max_length) for task in sample if tokenizer]
    return DataCheck(
        format=str(reader.format),
        tasks=reader.tasks,
        bad_rows=reader.bad_rows,
        refusal=source.refuses(len(reader.bad_rows), reader.rows),
        too_few=_too_few(reader.tasks, source) if field == "reference" else None,
        duplicates=read.duplicates,
        rounds=read.rounds,
        system_turns=read.system_turns,
        moves_system_turn=bool(tokenizer and read.system_turns and not takes_system_turn(tokenizer)),
        sampled=len(sample),
        unit="tokens" if tokenizer else "characters",
        lengths=_lengths(sample, encoded, with_response),
        truncated=sum(example.truncated for example in encoded) if tokenizer else None,
        without_response=sum(not example.response_tokens for example in encoded)
        if tokenizer and with_response
        else None,
        near_duplicates=_near_duplicates([task.request for task in sample]),
        languages=Counter(language_of(task.request) for task in sample),
        first=[_parts(task, tokenizer, max_length, with_response) for task in read.first],
    )


@dataclass(frozen=True)
class _Read:
    """A random sample of the rows in their order, the first rows, and counts of all rows; see `DataCheck`."""

    sample: list[Task]
    first: list[Task]
    duplicates: int
    rounds: Counter[int]
    system_turns: int


def _read(reader: TaskReader) -> _Read:
    """Read all rows."""
    sample: list[tuple[int, Task]] = []
    first: list[Task] = []
    seen: set[bytes] = set()
    rounds: Counter[int] = Counter()
    draw, count, systems = random.Random(0), 0, 0
    for count, task in enumerate(reader, 1):  # algorithm R
        place = len(sample) if len(sample) < SAMPLE else draw.randrange(count)
        if place < SAMPLE:
            sample[place : place + 1] = [(count, task)]
        if len(first) < _SHOWN:
            first.append(task)
        rounds[1 + sum(turn["role"] == "user" for turn in task.before)] += 1
        systems += any(turn["role"] == "system" for turn in task.before)
        text = json.dumps([[turn["role"], turn["content"]] for turn in task.before] + [task.instruction, task.response])
        seen.add(hashlib.blake2b(text.encode(), digest_size=8).digest())
    ordered = [task for _, task in sorted(sample, key=lambda entry: entry[0])]
    return _Read(ordered, first, count - len(seen), rounds, systems)


def _too_few(examples: int, source: DataSource) -> str | None:
    try:
        if examples != source.limit:  # a limit is the user's choice
            check_reference_size(examples, source)
    except DataError as error:
        return str(error)
    return None


def _lengths(sample: Sequence[Task], encoded: Sequence[Encoded], with_response: bool) -> dict[str, list[int]]:
    if encoded:
        values = {"example": [len(example.input_ids) for example in encoded]}
        if with_response:
            values["response"] = [example.response_tokens for example in encoded]
    else:
        values = {"instruction": [len(task.request) for task in sample]}
        if with_response:
            values["response"] = [len(task.response) for task in sample]
    return {
        name: np.quantile(column, _QUANTILES, method="nearest").astype(int).tolist() for name, column in values.items()
    }


def _near_duplicates(instructions: Sequence[str]) -> tuple[int, tuple[str, str] | None]:
    different = list(dict.fromkeys(instructions))
    index, kept = RougeIndex(max_rouge_l=NEAR), []
    count, pair = 0, None
    for instruction in different:
        nearest = index.nearest(instruction)
        if nearest is None:
            index.add(instruction)
            kept.append(instruction)
        else:
            count, pair = count + 1, pair or (kept[nearest], instruction)
    return count, pair


def _parts(task: Task, tokenizer: Any, max_length: int, with_response: bool) -> list[Part]:
    """Return what the student sees of a task; without a tokenizer, its texts."""
    if not tokenizer:
        named = f"user: {task.instruction}" if task.before else task.instruction
        earlier = [(f"{turn['role']}: {turn['content']}\n", bool(turn["weight"])) for turn in task.before]
        answer = [(f"assistant: {task.response}" if task.before else task.response, True)]
        return [*earlier, (f"{named}\n", False), *answer[:with_response]]
    encoded = encode_task(tokenizer, task, max_length)
    parts: list[Part] = []
    before = ""
    places = groupby(range(len(encoded.input_ids)), lambda place: encoded.labels[place] != IGNORED)
    for trained, group in places:
        *_, last = group
        text = tokenizer.decode(encoded.input_ids[: last + 1], skip_special_tokens=False)
        parts.append((text[len(before) :], trained and with_response))
        before = text
    return parts
