"""Files of a study, for commands that only read them."""

import shlex
from pathlib import Path
from typing import Any

from montessori_core.config import read_study
from montessori_core.errors import UserError
from montessori_core.files import read_json
from tasks.run import Run, reopen_run

STUDY, RESULT, PAGE = "study.yaml", "comparison.json", "comparison.html"


def study_of(folder: Path) -> Path | None:
    """Return the folder of the study of a seed, of another student of a seed, or of the study itself; None for other runs."""
    folder = folder.resolve()
    return next((place for place in (folder, *folder.parents[:2]) if (place / STUDY).exists()), None)


def reopen(folder: Path) -> Run:
    """Open the folder of a run, or of a study as a run with the study's name, to look at its stages and jobs.

    Raises:
        UserError: the folder is neither.
    """
    if not (folder / STUDY).exists():
        return reopen_run(folder)
    study = read_study(folder / STUDY)
    return Run(folder.resolve(), study.experiment.model_copy(update={"name": study.name}))


def command_to_compare(study: Path) -> list[str]:
    """Return the words after `montessori` of the command that resumes a study in a folder."""
    return ["compare", str(study / STUDY), "--run-root", str(study.parent)]


def resume_command(folder: Path, options: str = "") -> str:
    """Return the command that resumes a run, or the study it belongs to."""
    study = study_of(folder)
    if study is None:
        return f"{shlex.join(['montessori', 'resume', str(folder)])}{options}"
    return f"{shlex.join(['montessori', *command_to_compare(study)])}{options}"


def is_finished(run: Run) -> bool:
    """Return whether a run, or a study that `reopen` opened, is finished."""
    return (run.folder / RESULT).exists() if (run.folder / STUDY).exists() else run.finished


def read_comparison(folder: Path) -> dict[str, Any]:
    """Return the result of a study.

    Raises:
        UserError: the study has no result yet.
    """
    result: dict[str, Any] | None = read_json(folder / RESULT)
    if result is None:
        raise UserError(f"{folder}: no result yet; resume the study with montessori compare")
    return result
