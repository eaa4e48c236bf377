"""Train a student on any data, without a run: `montessori train`."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cluster.fanout import fan_out
from cluster.lock import only_driver
from cluster.shards import Shards
from cluster.stage import Stage
from montessori_core import programs
from montessori_core.config import DataSource, Experiment, StageResources, Used, parse_experiment, used_of_model
from montessori_core.data.bad_rows import BadRow, write_bad_rows
from montessori_core.data.origins import Origin, origin_of
from montessori_core.data.rows import Rows, TrainingRow
from montessori_core.data.sources import Task, TaskReader
from montessori_core.data.tables import EXAMPLES, name_of_table, open_parquet
from montessori_core.data.task_tables import task_rows, write_task_rows
from montessori_core.errors import DataError, UserError
from montessori_core.export.model_card import student_card, write_card
from montessori_core.export.models import write_merged
from montessori_core.files import commit, read_json, refuse_existing, write_json
from montessori_core.layout import COUNTS_FILE, LOG_FILE
from montessori_core.models.adapters import is_adapter
from montessori_core.models.fetch import fingerprint
from montessori_core.models.fingerprints import hash_model
from tasks.progress import ProgressBar
from tasks.resume import record_command
from tasks.run import check_environment, stage_of
from tasks.students import check_student, open_student, sft_settings
from tasks.tracking import show_problems, start_tracking, tracking_input

_MERGED = "merged.json"  # hash of the merged student
_USED: Used = {
    "": (Experiment, ("name", "seed", "student", "training", "zero", "tracking", "cluster")),
    "cluster.resources": (StageResources, ("training",)),
}


@dataclass(frozen=True)
class StudentTraining:
    """A training of a student.

    Attributes:
        experiment: its student, and the sections `training`, `zero`, `seed`, `tracking` and `cluster`. All rows of the data
            within `training.response_tokens` are used, whatever `training.examples` is.
        data: the examples.
        save_moments: save AdamW's moments with the weights, so that influence can be measured on a warm student.
        merge: merge the adapter of a LoRA student into its base model, in float32.
    """

    experiment: Experiment
    data: DataSource
    save_moments: bool = False
    merge: bool = False


@dataclass(frozen=True)
class Trained:
    """A trained student.

    Attributes:
        counts: numbers of examples, truncated ones and those left out.
        log: an entry per optimizer step.
    """

    counts: Mapping[str, int]
    log: list[dict[str, Any]]


def training_experiment(content: Mapping[str, Any], model: str, source: str) -> Experiment:
    """Return the configuration of a student's training; only settings that it uses are checked.

    Args:
        content: a configuration as plain data.
        model: folder or Hugging Face id of the student.
        source: names the configuration in errors.

    Raises:
        ConfigError: a setting that is used is not valid, or there is no such setting.
    """
    used = used_of_model(content, _USED, model)
    cluster = used.pop("cluster", {})
    recipe = parse_experiment(used, source).training
    # The processes of a training also share the batches of a warm-up, and by default those of a teacher update.
    used["warmup"] = recipe.model_dump(include={"batch_size", "micro_batch_size"})
    if isinstance(cluster, dict) and isinstance(resources := cluster.get("resources", {}), dict):
        cluster = {**cluster, "resources": {**resources, "teacher_update": {}}}
    return parse_experiment({**used, "cluster": cluster}, source)


def train_on_data(training: StudentTraining, output: Path, command: Sequence[str]) -> Trained:
    """Train a student and write it to the folder `output`, with a model card.

    Finished work is kept in a folder next to `output`, so that an interrupted training resumes from its last checkpoint, and
    a finished one is not repeated.

    Args:
        training: what is trained, on what.
        output: the new folder.
        command: words after `montessori` of the command that resumes it.

    Raises:
        UserError: an option, the data or the model is invalid, or `output` exists and has another model.
    """
    if training.merge and training.experiment.student.lora is None:
        raise UserError("--merge: the student has no adapter; leave it out, or set student.lora")
    if training.merge and training.save_moments:
        raise UserError("--merge and --save-moments exclude each other: the moments are those of the adapter")
    folder = _work_folder(output)
    if not folder.exists():
        refuse_existing(output, "folder")
    bad_rows: list[BadRow] = []
    with TemporaryDirectory() as scratch:
        rows, origin = read_training_rows(training.data, bad_rows, Path(scratch) / "data.parquet")
        if not len(rows):
            raise DataError(f"data.path: {training.data.path} has no rows; give examples to train on")
        check_environment(training.experiment)
        check_student(training.experiment.student)
        folder.mkdir(parents=True, exist_ok=True)
        with only_driver(folder):
            return _train_on_rows(training, rows, bad_rows, origin, output, command)


def _train_on_rows(
    training: StudentTraining,
    rows: Rows,
    bad_rows: list[BadRow],
    origin: Origin,
    output: Path,
    command: Sequence[str],
) -> Trained:
    """Train on rows in the folder next to `output`, whose lock is held; see `train_on_data`."""
    folder = _work_folder(output)
    experiment, cluster = training.experiment, training.experiment.cluster
    settings = sft_settings(experiment, experiment.training, training.save_moments)
    student = open_student(experiment.student, folder)
    start_tracking(folder, experiment)
    trackers = tracking_input(folder, experiment)
    stage = stage_of(programs.SFT, settings, folder / "training", {"student": student}, {}, trackers)
    shards, existed = Shards(rows, len(rows)), output.exists()
    _check_output(output, stage, shards, training)
    write_bad_rows(bad_rows, folder)
    record_command(folder, command, experiment.student.model, output, cluster)
    with ProgressBar(f"training of {experiment.student.model}") as bar:
        (trained,) = fan_out(stage, shards, cluster.resources.training, cluster, bar.show)
    show_problems(folder, experiment)
    counts, log = (read_json(trained / name) for name in (COUNTS_FILE, LOG_FILE))
    if not existed:  # at the start of the training
        _check_output(output, stage, shards, training)
    if not output.exists():
        card = student_card(experiment, training.data, origin, settings, counts, log, training.merge)
        with commit(output, durable=False) as temporary:
            if training.merge:
                write_merged(trained, temporary)
                write_json(fingerprint(temporary), folder / _MERGED)
            else:
                shutil.copytree(trained, temporary, copy_function=_link)
            write_card(card, temporary)
    return Trained(counts, log)


def _work_folder(output: Path) -> Path:
    return output.with_name(f"{output.name}.parts").absolute()


def read_training_rows(source: DataSource, bad_rows: list[BadRow], copy: Path) -> tuple[Rows, Origin]:
    """Read training examples: an example table of a run, or any data with an instruction and a response.

    A response whose row says `response_finished: false` is trained without the end of its turn.

    Args:
        source: the data.
        bad_rows: takes the rows that are left out.
        copy: file to which rows of any data are written: they may be many, and the result reads them from there.

    Raises:
        DataError: the data cannot be read, or has no rows.
    """
    path = Path(os.path.expanduser(source.path))
    if path.suffix == ".parquet" and path.is_file():
        with open_parquet(path) as file:
            if name_of_table(file.schema_arrow) == name_of_table(EXAMPLES):
                return Rows.of_file(path, EXAMPLES, TrainingRow, last=source.limit), origin_of(source.path)
    reader = TaskReader(source, "data", with_response=True)
    write_task_rows(reader, copy, TrainingRow, Task.to_training_row)
    reader.report(bad_rows)
    return task_rows(copy, TrainingRow), origin_of(source.path, reader.commit)


def _check_output(output: Path, stage: Stage, shards: Shards, training: StudentTraining) -> None:
    """Check that an existing folder has the result of this training.

    Raises:
        UserError: it has another.
    """
    (rows,) = shards
    if not output.exists():
        return
    adapter = training.experiment.student.lora is not None and not training.merge
    done = is_adapter(output) == adapter and stage.is_done(0, stage.key(rows), thorough=True)
    if not done or not _has_student(output, stage, training.merge):
        raise UserError(
            f"{output} has a student of another training; nothing is overwritten: give another folder with --output, or "
            "remove it"
        )


def _has_student(output: Path, stage: Stage, merged: bool) -> bool:
    """Return whether a folder has the student of a finished training."""
    try:
        student = hash_model(output)
    except (UserError, OSError):  # there is no model
        return False
    expected = read_json(stage.folder.parent / _MERGED) if merged else hash_model(stage.part(0))
    return expected in (None, student)  # None: an earlier version merged it


def _link(source: str, target: str) -> None:
    """Link a file, or copy it where that is not possible: weights are large."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
