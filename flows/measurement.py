"""What a measurement of influence outside a run is of: student, examples and reference sets, read and checked."""

import itertools
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from cluster.backends import open_backend
from cluster.lock import only_driver
from montessori_core.config import Cluster, DataSource, Influence, Student, Warmup
from montessori_core.data.bad_rows import BadRow, write_bad_rows
from montessori_core.data.rows import ExampleRow, Rows
from montessori_core.data.sources import Task, TaskReader, write_tasks
from montessori_core.data.task_tables import task_rows, write_task_rows
from montessori_core.errors import DataError, UserError
from montessori_core.files import commit, hash_path
from montessori_core.layout import CONFIG, DRIVER_LOCK, MOMENTS_FILE
from montessori_core.models.fingerprints import moments_rate, moments_recipe
from montessori_core.models.thinking import thinking_warning
from tasks.resume import command_of
from tasks.run import Model
from tasks.students import check_student, open_student

log = logging.getLogger(__name__)

_EXAMPLES, _REFERENCE = "examples.parquet", "reference.jsonl"


@dataclass(frozen=True)
class Store:
    """Projected steps of examples, kept for other reference sets.

    Attributes:
        folder: where they are.
        numbers: about how many numbers of a step are kept.
    """

    folder: Path
    numbers: int


@dataclass(frozen=True)
class Measurement:
    """A measurement of influence.

    Attributes:
        student: model whose loss is measured.
        warm_state: folder with AdamW's moments of the student; None: the step is AdamW's first.
        examples: examples to measure.
        reference: reference set.
        settings: settings of the estimator and its step.
        baseline: baseline of helping, see `config.Preferences`.
        cluster: where jobs run.
        store: where steps are kept; None: they are not.
        targets: further reference sets; each has a table of its own.
    """

    student: Student
    warm_state: Path | None
    examples: DataSource
    reference: DataSource
    settings: Influence
    baseline: str
    cluster: Cluster
    store: Store | None = None
    targets: tuple[DataSource, ...] = ()


@dataclass(frozen=True)
class Target:
    """A reference set: its name, its examples, and the file with a copy of them."""

    name: str
    examples: list[Task]
    file: Path


@dataclass(frozen=True)
class Inputs:
    """Inputs of a measurement.

    Attributes:
        rows: examples to measure, as rows of a program; read from a file, since they may be many.
        reference: the reference set.
        models: `student`, and `moments` if it is warm.
        files: `reference`, a copy of the reference set.
        targets: all reference sets, this one first.
    """

    rows: Rows
    reference: list[Task]
    models: Mapping[str, Model]
    files: Mapping[str, Path]
    targets: Sequence[Target] = ()

    @property
    def hashes(self) -> dict[str, str]:
        """Hashes of models, reference sets and examples."""
        files = [*(target.file for target in self.targets), self.rows.source]
        models = {name: model.sha256 for name, model in self.models.items()}
        return {**models, **{file.name: hash_path(file) for file in files if isinstance(file, Path)}}

    def on(self, target: Target) -> "Inputs":
        """Return the inputs of a measurement on this reference set."""
        return replace(self, reference=target.examples, files={"reference": target.file})

    @property
    def examples(self) -> list[Task]:
        """The examples as tasks, in memory."""
        return list(tasks_of(self.rows))

    @property
    def adamw(self) -> dict[str, float]:
        """AdamW's betas, epsilon and weight decay of the steps that left the moments; empty if there are none."""
        moments = self.models.get("moments")
        return moments_recipe(Path(moments.path)) if moments else {}


def step_rate(warm_state: Path | None) -> float:
    """Return the learning rate of a step: the peak rate of the training that left the student's moments, or the default."""
    if warm_state is None or not (warm_state / MOMENTS_FILE).exists():
        return Warmup().learning_rate
    rate = moments_rate(warm_state)
    return Warmup().learning_rate if rate is None else rate


def names_of_targets(measurement: Measurement) -> list[str]:
    """Return a name of each reference set, of letters, digits, '_' and '-': from its path, with a number if it is taken."""
    names: list[str] = []
    for source in (measurement.reference, *measurement.targets):
        name = re.sub(r"[^\w-]+", "-", Path(source.path).name.partition(".")[0], flags=re.ASCII).strip("-") or "set"
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        names.append(next(free for free in itertools.chain([name], numbered) if free not in names))
    return names


@contextmanager
def opened_inputs(
    measurement: Measurement,
    folder: Path,
    bad_rows: Sequence[BadRow] = (),
    check: Callable[[int, int], None] = lambda examples, reference: None,
) -> Iterator[Inputs]:
    """Read the files and find the models of a measurement; create its folder, and hold the folder's lock.

    Args:
        measurement: what is measured.
        folder: its folder; rows that are left out are listed there.
        bad_rows: those of a set that was read before.
        check: called with the numbers of examples and of reference examples before the folder is touched; may raise.

    Raises:
        UserError: a file or the model is invalid, or jobs cannot be started here; the message names it. Or another process
            measures in the folder.
    """
    measurement.cluster.resources.refuse_idle_processes(unused=("generation", "evaluation", "judging"))
    is_run = (folder / CONFIG).exists()
    ours = (folder / DRIVER_LOCK).exists() or command_of(folder) is not None  # a user may have removed the lock
    if folder.exists() and (is_run or not ours) and any(folder.iterdir()):
        raise UserError(
            f"{folder}: the folder holds something else; nothing is overwritten: name another one with --out"
        )
    left_out = list(bad_rows)
    with TemporaryDirectory() as scratch:  # the folder is created when all inputs are valid
        examples = Path(scratch) / _EXAMPLES
        _write_examples(measurement.examples, examples, left_out)
        references = _check_other_inputs(measurement, left_out)
        check(len(task_rows(examples, ExampleRow)), len(references[0]))
        folder.mkdir(parents=True, exist_ok=True)
        with only_driver(folder):  # before the copies are written: jobs of another process may be reading them
            with commit(folder / _EXAMPLES) as copy:
                shutil.copyfile(examples, copy)
            examples.unlink()
            write_bad_rows(left_out, folder)
            targets: list[Target] = []
            for name, tasks in zip(names_of_targets(measurement), references, strict=True):
                file = folder / (f"reference-{name}.jsonl" if measurement.targets else _REFERENCE)
                write_tasks(tasks, file)
                targets.append(Target(name, tasks, file))
            rows = task_rows(folder / _EXAMPLES, ExampleRow)
            warnings = thinking_warning("examples", tasks_of(rows))
            for target in targets:
                name = f"reference {target.name}" if measurement.targets else "reference"
                warnings += thinking_warning(name, target.examples)
            for warning in warnings:
                log.warning(warning)
            first, models = targets[0], _open_models(measurement, folder)
            yield Inputs(rows, first.examples, models, {"reference": first.file}, targets)


def tasks_of(rows: Rows) -> Iterator[Task]:
    """Yield the rows as tasks, with a few of them in memory."""
    for table in rows.tables():
        for row in table.to_pylist():
            yield Task.of(row | {"unfinished": not row["response_finished"]})


def _write_examples(source: DataSource, path: Path, bad_rows: list[BadRow]) -> None:
    """Write the rows of examples to a table; `bad_rows` takes those that are left out."""
    reader = TaskReader(source, "examples", with_response=True)
    write_task_rows(reader, path, ExampleRow, _example_row)
    reader.report(bad_rows)


def _example_row(task: Task) -> ExampleRow:
    return {**task.to_training_row(), "example_id": task.example_id, "prompt_id": task.example_id}


def _check_other_inputs(measurement: Measurement, bad_rows: list[BadRow]) -> list[list[Task]]:
    """Check the models and the cluster of a measurement, and read its reference sets.

    Args:
        measurement: what is measured.
        bad_rows: takes the rows that are left out.
    """
    open_backend(measurement.cluster, measurement.cluster.resources.influence, None, "influence")
    warm_state = measurement.warm_state
    if warm_state is not None and not (warm_state / MOMENTS_FILE).exists():
        raise DataError(f"--warm-state {warm_state}: no {MOMENTS_FILE} there; name the folder of a warm student")
    if warm_state is not None:
        moments_recipe(warm_state)  # fails if the file is damaged
    check_student(measurement.student)
    references = []
    sources = measurement.reference, *measurement.targets
    for name, source in zip(names_of_targets(measurement), sources, strict=True):
        reader = TaskReader(source, "reference", with_response=True)
        references.append(list(reader))
        reader.report(bad_rows, name if measurement.targets else "")
    return references


def _open_models(measurement: Measurement, folder: Path) -> dict[str, Model]:
    """Return the models of a measurement; links to a student with a configured chat template are in its folder."""
    models = {"student": open_student(measurement.student, folder)}
    if measurement.warm_state is not None:
        warm_state = measurement.warm_state.resolve()
        models["moments"] = Model(str(warm_state), hash_path(warm_state / MOMENTS_FILE))
    return models
