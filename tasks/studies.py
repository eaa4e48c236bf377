"""Files of a study, for commands that only read them."""

from pathlib import Path
from typing import Any

from montessori_core.errors import UserError
from montessori_core.files import read_json

STUDY, RESULT, PAGE = "study.yaml", "comparison.json", "comparison.html"


def in_study(folder: Path) -> bool:
    """Return whether a run's folder belongs to a study, as a seed or as another student of a seed."""
    return any((parent / STUDY).exists() for parent in folder.parents[:2])


def read_comparison(folder: Path) -> dict[str, Any]:
    """Return the result of a study.

    Raises:
        UserError: the study has no result yet.
    """
    result: dict[str, Any] | None = read_json(folder / RESULT)
    if result is None:
        raise UserError(f"{folder}: no result yet; resume the study with montessori compare")
    return result
