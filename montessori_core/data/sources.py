"""Read seed pools, reference sets and evaluation sets: JSONL, Parquet, Hugging Face data sets, or built-in sets."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import pyarrow as pa

from montessori_core.config import DataSource, Experiment
from montessori_core.data.hub import hub_rows
from montessori_core.data.jsonl import jsonl_rows
from montessori_core.data.rouge import RougeIndex
from montessori_core.data.tables import read_parquet
from montessori_core.errors import DataError
from montessori_core.files import commit

_SEED_POOLS = ("short", "half-coding", "half-maths")
_FEWEST_REFERENCES = 8  # influence is a mean over them: of fewer, one odd example decides the sign

_DATA_FILES = (".jsonl", ".json", ".parquet", ".csv", ".gz", ".zst", ".arrow")


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
        DataError: a set cannot be read or is empty, or the reference set is too small; the message names file and line.
    """
    sources = Sources(
        seed_pool=read_tasks(experiment.seed_pool, "seed_pool", with_response=False),
        reference=read_tasks(experiment.reference, "reference", with_response=True),
        evaluation=read_tasks(experiment.evaluation, "evaluation", with_response=True),
    )
    if len(sources.reference) != experiment.reference.limit:  # a limit is the user's choice
        check_reference_size(sources.reference, experiment.reference)
    return sources


def check_reference_size(reference: list[Task], source: DataSource) -> None:
    """Check that a reference set has enough examples for a mean.

    Raises:
        DataError: it has not.
    """
    if len(reference) < _FEWEST_REFERENCES:
        raise DataError(
            f"reference.path: {source.path} holds {len(reference)} examples; a reference set needs at least "
            f"{_FEWEST_REFERENCES}, better some dozens, because influence is a mean over them. Add examples of the same kind"
        )


def check_sources(sources: Sources, experiment: Experiment) -> list[str]:
    """Check the size of the seed pool and the overlap of the sets; return warnings.

    Raises:
        DataError: the seed pool is too small for a prompt, or the reference set overlaps the evaluation set.
    """
    seeds, synthetic = experiment.synthesis.seed_demonstrations, experiment.synthesis.synthetic_demonstrations
    if len(sources.seed_pool) < seeds + synthetic:
        raise DataError(
            f"seed_pool.path: {experiment.seed_pool.path} has {len(sources.seed_pool)} tasks, but a prompt of the first "
            f"iteration takes {seeds + synthetic} demonstrations from it (synthesis.seed_demonstrations {seeds} + "
            f"synthesis.synthetic_demonstrations {synthetic}); add tasks or lower one of them"
        )
    leaks = _overlaps(sources.evaluation, sources.reference)
    if leaks:
        raise DataError(
            f"reference.path: {len(leaks)} of {len(sources.reference)} examples are also in the evaluation set, e.g. "
            f"{leaks[0][0]} and {leaks[0][1]}: the held-out loss would not be held out. Remove them from either set"
        )
    shared = _overlaps(sources.seed_pool, sources.reference)
    if not shared:
        return []
    return [
        f"{len(shared)} of {len(sources.reference)} reference examples are also in the seed pool, e.g. "
        f"{shared[0][0]} and {shared[0][1]}: prompts show the teacher examples on which influence is measured"
    ]


def read_tasks(source: DataSource, field: str, with_response: bool) -> list[Task]:
    """Read one set; `field` (e.g. 'seed_pool') selects the built-in set and names the setting in errors.

    Raises:
        DataError: the set cannot be used; the message names the file, the line or column, and the remedy.
    """
    tasks: list[Task] = []
    for where, row in _rows(source, field):
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object with named fields, found {type(row).__name__}")
        instruction = _text(row, source.instruction_field, where, required=True)
        addition = _text(row, source.input_field, where, required=False)
        response = _text(row, source.output_field, where, required=True) if with_response else ""
        id = row.get("id")
        task_id = f"{field}-{len(tasks) + 1:05d}" if id is None else str(id)
        tasks.append(Task(task_id, f"{instruction} {addition}".strip(), response))
        if source.limit and len(tasks) == source.limit:
            break
    if not tasks:
        raise DataError(f"{field}.path: {source.path} has no examples; give a set with at least one")
    ids: set[str] = set()
    for task in tasks:
        if task.example_id in ids:
            raise DataError(f"{field}.path: {source.path}: id {task.example_id!r} occurs twice; ids must differ")
        ids.add(task.example_id)
    return tasks


def write_tasks(tasks: list[Task], path: Path) -> None:
    """Write a set as JSONL; workers read it with `load_tasks`."""
    lines = [json.dumps(vars(task), ensure_ascii=False) for task in tasks]
    with commit(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def load_tasks(path: Path) -> list[Task]:
    """Read a set that `write_tasks` wrote."""
    return [Task(**row) for _, row in jsonl_rows(path)]


def _rows(source: DataSource, field: str) -> Iterator[tuple[str, Any]]:
    """Yield (place in the source, row) pairs."""
    path = Path(os.path.expanduser(source.path))
    if path.suffix == ".jsonl":
        yield from jsonl_rows(path)
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.parts[:1] == ("builtin",):
        with as_file(_builtin_file(source.path, field)) as builtin:
            yield from jsonl_rows(builtin)
    elif not _is_data_set_folder(path) and (
        os.path.exists(path) or path.suffix[1:].isalpha() or source.path.startswith((".", "/", "~"))
    ):
        raise DataError(
            f"{field}.path: {source.path}: expected a .jsonl or .parquet file, a Hugging Face data set id or a folder with "
            "such a data set, 'builtin' or 'builtin/<kind>'"
        )
    else:
        yield from hub_rows(source, field)


def _is_data_set_folder(path: Path) -> bool:
    """Return whether a folder has files that the library `datasets` reads."""
    try:
        return path.is_dir() and any(file.suffix in _DATA_FILES for file in path.rglob("*"))
    except (OSError, ValueError):  # a path that no file can have
        return False


def _builtin_file(path: str, field: str) -> Traversable:
    """Return the file of a built-in set: `builtin` has tasks of all kinds, `builtin/maths` a target of one kind."""
    folder = files("montessori_core") / "data" / "builtin"
    if field not in ("seed_pool", "reference", "evaluation"):
        raise DataError(
            f"{field}.path: {path}: the built-in sets are seeds, references and held-out examples; give a file"
        )
    if path == "builtin":
        return folder / f"{field}.jsonl"
    targets = {f"builtin/{target.name}": target / f"{field}.jsonl" for target in (folder / "targets").iterdir()}
    pools = {f"builtin/{name}": folder / f"{name.replace('-', '_')}_seed_pool.jsonl" for name in _SEED_POOLS}
    named = pools if field == "seed_pool" else targets
    if path in named:
        return named[path]
    why = ""
    if path in targets:
        why = " is a target: it has no seeds, so that the teacher is not shown what influence is measured on"
    choices = ", ".join(["builtin", *sorted(named)])
    raise DataError(
        f"{field}.path: {path}{why or ': no such built-in set'}; give one of {choices}, or a file of your own"
    )


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = read_parquet(path).to_pylist()
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise DataError(f"{path}: a column cannot be read ({error}); remove it") from error
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


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
    index = RougeIndex([task.instruction for task in first], max_rouge_l=0.9)
    matches = ((task, index.nearest(task.instruction)) for task in second)
    return [(first[nearest].example_id, task.example_id) for task, nearest in matches if nearest is not None]
