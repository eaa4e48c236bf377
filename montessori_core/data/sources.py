"""Read seed pools, reference sets and evaluation sets: from files, folders, the hub, or built-in sets."""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import as_file
from pathlib import Path
from typing import Any

from montessori_core.config import DataFormat, DataSource, Experiment
from montessori_core.data.bad_rows import BadRow, RowError, count_reasons
from montessori_core.data.builtin_sets import builtin_file
from montessori_core.data.files import kind_of
from montessori_core.data.formats import recognise, turns_of
from montessori_core.data.hub import hub_rows
from montessori_core.data.jsonl import jsonl_rows
from montessori_core.data.origins import Origin, origin_of
from montessori_core.data.readers import shard_rows
from montessori_core.data.rouge import RougeIndex
from montessori_core.data.rows import EarlierTurn, TaskRow, TrainingRow, optional_fields
from montessori_core.data.shards import expected, find_local, find_remote, is_url
from montessori_core.data.turns import read_turns
from montessori_core.errors import DataError
from montessori_core.files import commit

_FEWEST_REFERENCES = 8  # influence is a mean over them: with fewer, one odd example decides the sign

FINISHED = "response_finished"
"""The column of a row that is false if its response was cut."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """A task of a data set.

    Attributes:
        example_id: id of its row.
        instruction: what is asked.
        response: empty in a seed pool.
        before: the turns of a conversation before its last instruction.
        unfinished: whether the response was cut, so that its end is not the end of the turn.
    """

    example_id: str
    instruction: str
    response: str = ""
    before: tuple[EarlierTurn, ...] = ()
    unfinished: bool = False

    @staticmethod
    def of(row: Mapping[str, Any]) -> "Task":
        """Return the task of a row of a program or a file; other fields are ignored."""
        before, unfinished = tuple(row.get("before") or ()), bool(row.get("unfinished"))
        return Task(row["example_id"], row["instruction"], row["response"], before, unfinished)

    def to_training_row(self) -> TrainingRow:
        """Return the task as a training example."""
        return {
            "instruction": self.instruction,
            "response": self.response,
            "response_finished": not self.unfinished,
            "before": list(self.before),
        }

    @property
    def request(self) -> str:
        """What is asked: the instruction; of a conversation, all turns up to it except a system turn, which many share."""
        spoken = (turn["content"] for turn in self.before if turn["role"] != "system")
        return "\n\n".join([*spoken, self.instruction])


@dataclass(frozen=True)
class Seed(Task):
    """A seed with a topic or a persona, columns of the seed pool that the text of a prompt can name."""

    topic: str = ""
    persona: str = ""


@dataclass(frozen=True)
class Sources:
    """The three human-written sets of an experiment."""

    seed_pool: list[Task]
    reference: list[Task]
    evaluation: list[Task]


def read_sources(
    experiment: Experiment, bad_rows: list[BadRow] | None = None, origins: dict[str, Origin] | None = None
) -> Sources:
    """Read the three sets; `bad_rows` takes the rows that are left out, `origins` licence and commit of each set.

    Raises:
        DataError: a set cannot be read or is empty, or the reference set is too small; the message names file and line.
    """
    sources = Sources(
        seed_pool=read_tasks(experiment.seed_pool, "seed_pool", False, bad_rows, origins),
        reference=read_tasks(experiment.reference, "reference", True, bad_rows, origins),
        evaluation=read_tasks(experiment.evaluation, "evaluation", True, bad_rows, origins),
    )
    if len(sources.reference) != experiment.reference.limit:  # a limit is the user's choice
        check_reference_size(len(sources.reference), experiment.reference)
    return sources


def check_reference_size(examples: int, source: DataSource) -> None:
    """Check that a reference set has enough examples for a mean.

    Raises:
        DataError: it has not.
    """
    if examples < _FEWEST_REFERENCES:
        raise DataError(
            f"reference.path: {source.path} holds {examples} examples; a reference set needs at least "
            f"{_FEWEST_REFERENCES}, better some dozens, because influence is a mean over them. Add examples of the same kind"
        )


def check_sources(sources: Sources, experiment: Experiment) -> list[str]:
    """Check the size of the seed pool and the overlap of the sets; return warnings.

    Raises:
        DataError: the seed pool is too small for a prompt, or the reference set overlaps the evaluation set.
    """
    needed = experiment.synthesis.seeds_needed
    if len(sources.seed_pool) < needed:
        raise DataError(
            f"seed_pool.path: {experiment.seed_pool.path} has {len(sources.seed_pool)} tasks, but a prompt of the first "
            f"iteration takes {needed} of them; add tasks"
            + (", or lower synthesis.seed_demonstrations or synthetic_demonstrations" if needed > 1 else "")
        )
    leaks = _overlaps(sources.evaluation, sources.reference)
    if leaks:
        raise DataError(
            f"reference.path: {len(leaks)} of {len(sources.reference)} examples are also in the evaluation set, e.g. "
            f"{leaks[0][0]} and {leaks[0][1]}: the held-out loss would not be held out. Remove them from either set"
        )
    warnings = []
    reference, evaluation = experiment.reference.path, experiment.evaluation.path
    if reference != evaluation and any(path.partition("/")[0] == "builtin" for path in (reference, evaluation)):
        warnings.append(
            f"reference.path is {reference}, evaluation.path {evaluation}: if these are of different kinds, the held-out "
            "loss does not tell whether the student learned what influence was measured for; set both"
        )
    measured = {"reference": "influence", "evaluation": "the held-out loss"}
    return warnings + [
        f"{len(shared)} of {len(getattr(sources, name))} {name} examples are also in the seed pool, e.g. "
        f"{shared[0][0]} and {shared[0][1]}: prompts show the teacher examples on which {result} is measured"
        for name, result in measured.items()
        if (shared := _overlaps(sources.seed_pool, getattr(sources, name)))
    ]


def read_tasks(
    source: DataSource,
    field: str,
    with_response: bool,
    bad_rows: list[BadRow] | None = None,
    origins: dict[str, Origin] | None = None,
) -> list[Task]:
    """Read one set, and log the number of its rows and their format.

    Args:
        source: the set.
        field: its setting, such as 'seed_pool', which selects the built-in set and is named in errors.
        with_response: whether rows have a response.
        bad_rows: takes the rows that are left out.
        origins: takes the set's origin, by `field`.

    Raises:
        DataError: the set cannot be used; the message names the file, the line or column, and the remedy.
    """
    reader = TaskReader(source, field, with_response)
    tasks = list(reader)
    reader.report(bad_rows)
    if origins is not None:
        origins[field] = origin_of(source.path, reader.commit)
    return tasks


class TaskReader(Iterable[Task]):
    """Reads a set row by row, so that a large one is never in memory as a whole.

    Attributes:
        format: of the rows, None before the first.
        rows: number of rows read.
        tasks: number of them that can be used.
        conversations: number of these that have earlier turns.
        bad_rows: rows left out; see `DataSource.drop_bad_rows`.
        row: all columns of the last task.
        commit: of a data set on the hub, that which is read.
    """

    def __init__(self, source: DataSource, field: str, with_response: bool) -> None:
        """See `read_tasks`."""
        self._source, self._field, self._with_response = source, field, with_response
        self.format: DataFormat | None = None
        self.rows = self.tasks = self.conversations = 0
        self.bad_rows: list[BadRow] = []
        self.row: Mapping[str, Any] = {}
        self.commit: str | None = None
        self._ids: set[str] = set()

    def __iter__(self) -> Iterator[Task]:
        """Yield the tasks, once.

        Raises:
            DataError: as `read_tasks`.
        """
        source, field = self._source, self._field
        for where, row in _rows(source, field, self._read_commit):
            self.rows += 1
            try:
                task = self._task(where, row)
            except RowError as error:
                if not source.drop_bad_rows:
                    again = f"; or set {field}.drop_bad_rows: true to leave such rows out" if self.tasks else ""
                    raise DataError(f"{error}{again}") from error
                self.bad_rows.append(BadRow(field, error.place, error.reason, error.problem))
                continue
            self.tasks += 1
            self.conversations += bool(task.before)
            self.row = row
            yield task
            if self.tasks == source.limit:
                break
        refused = source.refuses(len(self.bad_rows), self.rows)
        if refused or (self.bad_rows and not self.tasks):
            limit = f", more than {field}.max_bad_rows ({source.max_bad_rows:g})" if refused else ""
            raise DataError(
                f"{field}.path: {source.path}: {len(self.bad_rows):,} of {self.rows:,} rows cannot be used "
                f"({count_reasons(self.bad_rows)}){limit}; the first: {self.bad_rows[0].place}: {self.bad_rows[0].problem}"
            )
        if not self.tasks:
            raise DataError(f"{field}.path: {source.path} has no examples; give a set with at least one")

    def _read_commit(self, commit: str) -> None:
        self.commit = commit

    def report(self, bad_rows: list[BadRow] | None, name: str = "") -> None:
        """Log what was read, with the `name` of one of several sets, and append the rows left out to `bad_rows`."""
        if bad_rows is not None:
            bad_rows += self.bad_rows
        _log.info(f"{name}: {self.summary()}" if name else self.summary())

    def summary(self) -> str:
        """Return a line on what was read: 'reference: 1,319 rows, format: messages'."""
        loss = {"all": "every answer", "last": "the last answer"}[self._source.train_on]
        turns = f"; {self.conversations:,} with earlier turns, loss on {loss}" if self.conversations else ""
        bad = f"; {len(self.bad_rows):,} more left out ({count_reasons(self.bad_rows)})" if self.bad_rows else ""
        limit = f" ({self._field}.limit)" if self.tasks == self._source.limit else ""
        return f"{self._field}: {self.tasks:,} rows{limit}, format: {self.format}{turns}{bad}"

    def _task(self, where: str, row: Any) -> Task:
        if isinstance(row, RowError):
            raise row
        if not isinstance(row, dict):
            problem = f"expected an object with named fields, found {type(row).__name__}"
            raise RowError(where, problem, "no object with named fields")
        if self.format is None:
            self.format = recognise(row, self._source)
        turns = turns_of(row, self._source, self.format, where, self._with_response, self._field)
        texts = read_turns(turns, self._source, where, self._with_response, self._field)
        id = row.get("id")
        task_id = f"{self._field}-{self.tasks + 1:05d}" if id is None else str(id)
        if task_id in self._ids:
            raise RowError(where, f"id {task_id!r} occurs twice; ids must differ", "an id that occurs twice")
        about = [_text(row, name, where) for name in ("topic", "persona")] if self._field == "seed_pool" else []
        self._ids.add(task_id)  # a bad row takes no id
        if any(about):
            return Seed(task_id, *texts, topic=about[0], persona=about[1])
        cut = str(row.get(FINISHED)).lower() == "false"  # CSV has texts alone
        # The flag is of the last answer; `turns: first` reads another of a longer conversation.
        return Task(task_id, *texts, unfinished=cut and texts[1] == turns[-1].text)


def check_single_turns(reference: Iterable[Task], use: str) -> None:
    """Check that no task of the reference set is a conversation, for a `use` of single instructions.

    Raises:
        DataError: a task has earlier turns.
    """
    conversation = next((task for task in reference if task.before), None)
    if conversation is not None:
        raise DataError(
            f"reference: {use} takes single instructions, but example {conversation.example_id} is a conversation with "
            f"{len(conversation.before)} earlier turns; set reference.turns to first or last, and "
            "reference.system_turn to prepend or drop"
        )


def write_tasks(tasks: list[Task], path: Path) -> None:
    """Write a set as JSONL; workers read it with `load_tasks`."""
    optional = optional_fields(TaskRow)
    rows = ({name: value for name, value in vars(task).items() if name not in optional or value} for task in tasks)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    with commit(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def load_tasks(path: Path) -> list[Task]:
    """Read a set that `write_tasks` wrote."""
    return [_load_task(row) for _, row in jsonl_rows(path)]


def _text(row: dict[str, Any], name: str, where: str) -> str:
    """Return the text of an optional column of a row; empty if it is missing or null.

    Raises:
        RowError: it holds something else.
    """
    value = row.get(name)
    if value is None or isinstance(value, str):
        return (value or "").strip()
    problem = f"field {name!r}: expected text, found {type(value).__name__}; correct or remove it"
    raise RowError(where, problem, f"{name} is no text")


def _load_task(row: dict[str, Any]) -> Task:
    task = Task.of(row)
    return Seed(**vars(task), topic=row["topic"], persona=row["persona"]) if "topic" in row else task


def _rows(source: DataSource, field: str, on_commit: Callable[[str], object]) -> Iterator[tuple[str, Any]]:
    """Yield (place in the source, row) pairs; a row that cannot be read is a RowError. See `hub_rows` for `on_commit`."""
    path = Path(os.path.expanduser(source.path))
    if not source.path.strip():
        raise DataError(f"{field}.path is empty; expected {expected()}")
    if is_url(source.path):
        yield from shard_rows(find_remote(source.path, source.split, field))
    elif path.parts[:1] == ("builtin",) and not kind_of(source.path):
        with as_file(builtin_file(source.path, field)) as builtin:
            yield from jsonl_rows(builtin)
    elif (files := find_local(path, source.split, field)) is not None:
        yield from shard_rows(files)
    elif source.path.startswith((".", "~")) and not path.exists():
        raise DataError(f"{field}.path: {source.path}: no such file or folder; correct the path")
    elif source.path.startswith((".", "~")) and not path.is_dir():
        raise DataError(f"{field}.path: {source.path}: expected {expected()}")
    else:
        yield from hub_rows(source, field, on_commit)


def _overlaps(first: list[Task], second: list[Task]) -> list[tuple[str, str]]:
    """Return pairs of ids, one for each task of `second` whose ROUGE-L F with a task of `first` is above 0.9."""
    index = RougeIndex([task.request for task in first], max_rouge_l=0.9)
    matches = ((task, index.nearest(task.request)) for task in second)
    return [(first[nearest].example_id, task.example_id) for task, nearest in matches if nearest is not None]
