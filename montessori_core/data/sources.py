"""Read seed pools, reference sets and evaluation sets from JSONL, Parquet, Hugging Face data sets, or the built-in data."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import pyarrow as pa

from montessori_core.config import DataSource, Experiment
from montessori_core.data.jsonl import jsonl_rows
from montessori_core.data.rouge import RougeIndex
from montessori_core.data.tables import read_parquet
from montessori_core.errors import DataError
from montessori_core.files import commit


@dataclass(frozen=True)
class Task:
    """A human-written task; `response` is empty in a seed pool."""

    example_id: str
    instruction: str
    response: str = ""


@dataclass(frozen=True)
class Sources:
    """The three human-written sets of an experiment."""

    seed_pool: list[Task]
    reference: list[Task]
    evaluation: list[Task]


def read_sources(experiment: Experiment) -> Sources:
    """Read the three sets.

    Raises:
        DataError: a set cannot be read or is empty; the message names file and line.
    """
    return Sources(
        seed_pool=read_tasks(experiment.seed_pool, "seed_pool", with_response=False),
        reference=read_tasks(experiment.reference, "reference", with_response=True),
        evaluation=read_tasks(experiment.evaluation, "evaluation", with_response=True),
    )


def check_sources(sources: Sources, experiment: Experiment) -> list[str]:
    """Check the sets against each other and against the size of prompts; return warnings.

    Raises:
        DataError: the seed pool is too small for a prompt, or the reference set overlaps the evaluation set.
    """
    own, synthetic = experiment.synthesis.seed_demonstrations, experiment.synthesis.synthetic_demonstrations
    if len(sources.seed_pool) < own + synthetic:
        raise DataError(
            f"seed_pool.path: {experiment.seed_pool.path} has {len(sources.seed_pool)} tasks, but a prompt of the first "
            f"iteration takes {own + synthetic} demonstrations from it (synthesis.seed_demonstrations {own} + "
            f"synthesis.synthetic_demonstrations {synthetic}); add tasks or lower one of them"
        )
    leak = _overlaps(sources.evaluation, sources.reference)
    if leak:
        raise DataError(
            f"reference.path: {len(leak)} of {len(sources.reference)} examples also stand in the evaluation set, e.g. "
            f"{leak[0][0]} and {leak[0][1]}: the held-out loss would not be held out. Remove them from either set"
        )
    warnings = []
    shared = _overlaps(sources.seed_pool, sources.reference)
    if shared:
        warnings.append(
            f"{len(shared)} of {len(sources.reference)} reference examples also stand in the seed pool, e.g. "
            f"{shared[0][0]} and {shared[0][1]}: the teacher is shown what influence is measured on"
        )
    return warnings


def read_tasks(source: DataSource, field: str, with_response: bool) -> list[Task]:
    """Read one set; `field` (e.g. 'seed_pool') picks the built-in set and names the setting in errors.

    Raises:
        DataError: names the file and the line or column, and the remedy.
    """
    tasks: list[Task] = []
    for where, row in _rows(source, field):
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object with named fields, found {type(row).__name__}")
        instruction = _text(row, source.instruction_field, where, required=True)
        addition = _text(row, source.input_field, where, required=False)
        response = _text(row, source.output_field, where, required=True) if with_response else ""
        id = row.get("id")
        named = f"{field}-{len(tasks) + 1:05d}" if id is None else str(id)
        tasks.append(Task(named, f"{instruction} {addition}".strip(), response))
        if source.limit and len(tasks) == source.limit:
            break
    if not tasks:
        raise DataError(f"{field}.path: {source.path} holds no examples; give a set with at least one")
    ids: set[str] = set()
    for task in tasks:
        if task.example_id in ids:
            raise DataError(f"{field}.path: {source.path}: id {task.example_id!r} occurs twice; ids must differ")
        ids.add(task.example_id)
    return tasks


def write_tasks(tasks: list[Task], path: Path) -> None:
    """Write a set as JSONL, which `load_tasks` reads."""
    lines = [json.dumps(vars(task), ensure_ascii=False) for task in tasks]
    with commit(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def load_tasks(path: Path) -> list[Task]:
    """Read a set that `write_tasks` wrote."""
    return [Task(**row) for _, row in jsonl_rows(path)]


def _rows(source: DataSource, field: str) -> Iterator[tuple[str, Any]]:
    """Yield (location, row) pairs."""
    if source.path == "builtin":
        with as_file(files("montessori_core") / "data" / "builtin" / f"{field}.jsonl") as path:
            yield from jsonl_rows(path)
        return
    path = Path(os.path.expanduser(source.path))
    if path.suffix == ".jsonl":
        yield from jsonl_rows(path)
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif os.path.exists(path) or path.suffix[1:].isalpha() or source.path.startswith((".", "/", "~")):
        raise DataError(
            f"{field}.path: {source.path}: expected a .jsonl or .parquet file, a Hugging Face data set id, or 'builtin'"
        )
    else:
        yield from _hub_rows(source, field)


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = read_parquet(path).to_pylist()
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise DataError(f"{path}: a column cannot be read ({error}); remove it") from error
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def _hub_rows(source: DataSource, field: str) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        loaded = datasets.load_dataset(source.path, split=source.split)
    except Exception as error:  # the library raises many types when a data set cannot be loaded
        raise DataError(
            f"{field}.path: data set {source.path!r} (split {source.split!r}) cannot be loaded: {error}; check the id and "
            "the network, or give a .jsonl or .parquet file"
        ) from error
    for number, row in enumerate(loaded, 1):
        yield f"{source.path} ({source.split}), row {number}", row


def _text(row: dict[str, Any], name: str, where: str, required: bool) -> str:
    value = row.get(name)
    if value is None and not required:
        return ""
    if value is None:
        raise DataError(
            f"{where}: field {name!r} is missing (found: {', '.join(map(str, row))}); "
            "set the field's option (instruction_field, input_field, output_field) to its name"
        )
    if not isinstance(value, str):
        raise DataError(f"{where}: field {name!r} is {type(value).__name__}, expected text")
    if required and not value.strip():
        raise DataError(f"{where}: field {name!r} is empty; fill it or remove the row")
    return value


def _overlaps(first: list[Task], second: list[Task]) -> list[tuple[str, str]]:
    """Return pairs of ids, one for each task of `second` whose ROUGE-L F with a task of `first` is above 0.9."""
    known = RougeIndex([task.instruction for task in first], max_rouge_l=0.9)
    matches = ((task, known.nearest(task.instruction)) for task in second)
    return [(first[index].example_id, task.example_id) for task, index in matches if index is not None]
