"""Folders of runs, of studies and of other commands, for commands that only read them."""

from pathlib import Path
from typing import Any

from cluster.status import stages_of
from montessori_core import layout
from montessori_core.config import Cluster, Experiment, Student, Teacher, parse, read_study
from montessori_core.errors import UserError
from montessori_core.files import read_json
from tasks.resume import STUDY, command_of, study_of
from tasks.run import Run, reopen_run

RESULT, PAGE = "comparison.json", "comparison.html"


def reopen(folder: Path) -> Run:
    """Open the folder of a run, of a study or of another command, to look at its stages and jobs.

    A study is opened as a run with the study's name, other work as a run with the folder's name.

    Raises:
        UserError: the folder is none of these.
    """
    if (command := command_of(folder)) is not None:
        cluster = parse(Cluster, command.cluster, f"{folder}: the cluster of its command.json")
        teacher, student = Teacher(model=command.model), Student(model=command.model)
        experiment = Experiment(teacher=teacher, student=student)  # a folder's name need not be valid for a run
        return Run(folder.resolve(), experiment.model_copy(update={"name": folder.resolve().name, "cluster": cluster}))
    if not (folder / STUDY).exists():
        return reopen_run(folder)
    study = read_study(folder / STUDY)
    return Run(folder.resolve(), study.experiment.model_copy(update={"name": study.name}))


def is_finished(run: Run) -> bool:
    """Return whether what `reopen` opened is finished; a seed of a study finishes with the study."""
    if (command := command_of(run.folder)) is not None:
        return Path(command.result).exists()
    study = study_of(run.folder)
    return run.finished if study is None else (study / RESULT).exists()


def unused_stages(run: Run) -> set[Path]:
    """Return the stages of what `reopen` opened that its settings do not have any more; empty while that is not known."""
    stages = stages_of(run.folder)
    if (command := command_of(run.folder)) is not None:
        return {stage for stage in stages if stage.relative_to(run.folder).parts[0] in command.unused}
    if study_of(run.folder) is not None or not run.finished:
        return set()
    metrics = [read_json(run.iteration(number) / layout.METRICS) for number in range(1, run.experiment.iterations + 1)]
    used = {run.folder / stage["stage"] for content in metrics for stage in content.get("stages", [])}
    return set(stages) - used if used else set()  # older versions did not record them


def read_comparison(folder: Path) -> dict[str, Any]:
    """Return the result of a study.

    Raises:
        UserError: the study has no result yet.
    """
    result: dict[str, Any] | None = read_json(folder / RESULT)
    if result is None:
        raise UserError(f"{folder}: no result yet; resume the study with montessori compare")
    return result
