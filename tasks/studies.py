"""What a study leaves on disk, for those who only look at it."""

from pathlib import Path
from typing import Any

from montessori_core.errors import UserError
from montessori_core.files import read_json

STUDY, RESULT, PAGE = "study.yaml", "comparison.json", "comparison.html"


def in_study(folder: Path) -> bool:
    """Whether a run's folder is a seed of a study, or another student's within it."""
    return any((parent / STUDY).exists() for parent in folder.parents[:2])


def read_comparison(folder: Path) -> dict[str, Any]:
    """The result of a study.

    Raises:
        UserError: it has none yet.
    """
    result: dict[str, Any] | None = read_json(folder / RESULT)
    if result is None:
        raise UserError(f"{folder}: no result yet; montessori compare goes on with the study")
    return result
