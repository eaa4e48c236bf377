"""Reading JSON and JSONL, with errors that name file and line."""

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from montessori_core.errors import DataError


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """Open a text in UTF-8; a byte order mark is passed over.

    Raises:
        DataError: it cannot be opened, or is a pipe or a device: files are read again when a run goes on.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path}: not a file; give one, not a folder or a pipe")
        return path.open(encoding="utf-8-sig", newline=newline)
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', error)}); check the path") from error


def parse_json(text: str, where: str) -> Any:
    """Parse JSON that can be written again, as JSON and as a table.

    Raises:
        JSONDecodeError: it is not JSON.
        DataError: it cannot be kept; the message begins with `where`.
    """
    try:
        content = json.loads(text)
        if "\\u" in text:
            json.dumps(content, ensure_ascii=False).encode()
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply; remove what is not needed") from error
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: a text holds half of a surrogate pair ({error.object[error.start]!r}), which is no character; it was "
            "cut in the middle of one: correct or remove it"
        ) from error
    except ValueError as error:  # Python's limit
        raise DataError(f"{where}: a number has too many digits; write it as text, or remove it") from error
    return content


def jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (where it stands, row) pairs of a file with one JSON value a line; blank lines are passed over.

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
            raise DataError(f"{path}, line {_undecodable(path)}: not UTF-8 text; convert the file") from error


def _undecodable(path: Path) -> int:
    """The line of a file where what is not UTF-8 begins."""
    content = path.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        content = content[: error.start]
    return content.count(b"\n") + 1
