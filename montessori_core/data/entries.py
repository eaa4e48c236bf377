"""Read benchmark files in their published formats: a JSON list, or one JSON object per line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from montessori_core.data.jsonl import jsonl_rows, open_text, parse_json
from montessori_core.errors import DataError

Text = Annotated[str, StringConstraints(pattern=r"\S")]
"""A text that is not blank."""


class Entry(BaseModel):
    """An entry of a file; other fields are ignored."""

    model_config = ConfigDict(frozen=True)


AnyEntry = TypeVar("AnyEntry", bound=Entry)


def read_entries(path: Path, kind: type[AnyEntry]) -> list[AnyEntry]:
    """Read a file of entries.

    Raises:
        DataError: it cannot be read, is empty, or has an invalid entry; the message names file, line or entry, and field.
    """
    entries = [_entry(where, content, kind) for where, content in _contents(path)]
    if not entries:
        raise DataError(f"{path}: no entries; give a file with at least one")
    return entries


def _contents(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place in the file, entry) pairs."""
    if path.suffix != ".json":
        yield from jsonl_rows(path)
        return
    try:
        with open_text(path) as stream:
            contents = parse_json(stream.read(), str(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}); a .json file must be one "
            "list, and a file with one object per line must be named .jsonl"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text; convert the file") from error
    if not isinstance(contents, list):
        raise DataError(f"{path}: expected a list of objects, found {type(contents).__name__}")
    for number, content in enumerate(contents, 1):
        yield f"{path}, entry {number}", content


def _entry(where: str, content: Any, kind: type[AnyEntry]) -> AnyEntry:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"]))
        raise DataError(
            f"{where}: {f'field {field}: ' if field else ''}{problem['msg']}; an entry has the fields "
            f"{', '.join(kind.model_fields)}"
        ) from error
