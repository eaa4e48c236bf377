"""Read JSON and JSONL, with errors that name file and line."""

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from montessori_core.errors import DataError


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """Open a UTF-8 text file; a byte order mark is skipped.

    Raises:
        DataError: it cannot be opened, or is a pipe or a device: a resumed run reads its files again.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path}: not a file; give a file, not a folder or a pipe")
        return path.open(encoding="utf-8-sig", newline=newline)
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', error)}); check the path") from error


def parse_json(text: str, where: str) -> Any:
    """Parse JSON, and check that its values can be written again, as JSON and in a table.

    Raises:
        JSONDecodeError: it is not JSON.
        DataError: a value cannot be written, or a field occurs twice; the message begins with `where`.
    """

    def to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"{where}: field {twice!r} occurs twice in an object; remove one of them")
        return fields

    try:
        content = json.loads(text, object_pairs_hook=to_object)
        if "\\u" in text:
            json.dumps(content, ensure_ascii=False).encode()
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply; remove what is not needed") from error
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: a text holds half of a surrogate pair ({error.object[error.start]!r}): it was cut in the middle of a "
            "character; correct or remove it"
        ) from error
    except ValueError as error:  # Python's limit
        raise DataError(f"{where}: a number has too many digits; write it as text, or remove it") from error
    return content


def jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place in the file, row) pairs of a file with one JSON value per line; blank lines are skipped.

    Raises:
        DataError: it cannot be read; the message names file and line.
    """
    number = 0
    with open_text(path) as stream:
        try:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, parse_json(line.rstrip("\n"), where)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}, column {error.colno}: not valid JSON ({error.msg}); each line must be one object"
            ) from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, line {_find_invalid_line(path)}: not UTF-8 text; convert the file") from error


def _find_invalid_line(path: Path) -> int:
    """Return the number of the first line that is not UTF-8."""
    content = path.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        content = content[: error.start]
    return content.count(b"\n") + 1
