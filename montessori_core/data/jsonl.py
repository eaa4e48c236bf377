"""Read JSON and JSONL, with errors that name file and line."""

import codecs
import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from montessori_core.data.bad_rows import RowError
from montessori_core.errors import DataError

LONGEST_ROW = 2**26
"""Bytes of a line, and characters of a row, that are read; longer ones are refused (64 MiB)."""


def check_regular(path: Path) -> None:
    """Check that a path is a file, not a folder, a pipe or a device: a resumed run reads its files again.

    Raises:
        DataError: it is none, or cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path}: not a file; give a file, not a folder or a pipe")
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', error)}); check the path") from error


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """Open a UTF-8 text file; a byte order mark is skipped.

    Raises:
        DataError: it cannot be opened, or is no file.
    """
    check_regular(path)
    try:
        return path.open(encoding="utf-8-sig", newline=newline)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def parse_json(text: str, where: str) -> Any:
    """Parse JSON, and check that its values can be written again, as JSON and in a table.

    Raises:
        JSONDecodeError: it is not JSON.
        RowError: a value cannot be written, or a field occurs twice; the message begins with `where`.
    """
    with named_errors(where):
        content = json.loads(text, object_pairs_hook=to_object)
        check_characters(content, text)
    return content


class _FieldTwice(ValueError):
    """A field occurs twice in an object."""


def to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, for `object_pairs_hook`; Python's decoder would keep the last of two equal names."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise _FieldTwice(next(name for name in names if names.count(name) > 1))
    return fields


@contextmanager
def named_errors(where: str) -> Iterator[None]:
    """Turn errors of Python's JSON decoder, other than of syntax, into a RowError."""
    try:
        yield
    except json.JSONDecodeError:
        raise
    except _FieldTwice as error:
        problem = f"field {str(error)!r} occurs twice in an object; remove one of them"
        raise RowError(where, problem, "a field occurs twice") from error
    except RecursionError as error:
        raise RowError(where, "nested too deeply; remove what is not needed", "nested too deeply") from error
    except UnicodeEncodeError as error:
        raise RowError(
            where,
            f"a text holds half of a surrogate pair ({error.object[error.start]!r}): it was cut in the middle of a "
            "character; correct or remove it",
            "half of a surrogate pair",
        ) from error
    except ValueError as error:  # Python's limit
        problem = "a number has too many digits; write it as text, or remove it"
        raise RowError(where, problem, "a number has too many digits") from error


def check_characters(content: Any, text: str) -> None:
    """Raise a UnicodeEncodeError if a value, parsed from `text`, holds half of a surrogate pair."""
    if "\\u" in text:
        json.dumps(content, ensure_ascii=False).encode()


def read_lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line) pairs of a file; a byte order mark is skipped, and lines may end in CR, LF or both.

    Raises:
        DataError: a line is longer than LONGEST_ROW.
    """
    number = 0
    while chunk := stream.readline(LONGEST_ROW + 1):
        if number == 0:
            chunk = chunk.removeprefix(codecs.BOM_UTF8)
        if len(chunk) > LONGEST_ROW:
            raise DataError(
                f"{name}, line {number + 1}: longer than {LONGEST_ROW >> 20} MiB; is it a file with one row per line? Split "
                "it"
            )
        for line in chunk.removesuffix(b"\n").removesuffix(b"\r").split(b"\r"):
            number += 1
            yield number, line


def rows_of_lines(stream: BinaryIO, name: str) -> Iterator[tuple[str, Any]]:
    """Yield (place in the file, row) pairs of a file with one JSON value per line; blank lines are skipped.

    A row that cannot be read is a RowError.

    Args:
        stream: the file's bytes.
        name: of the file, for errors.

    Raises:
        DataError: the rest of the file cannot be read.
    """
    for number, line in read_lines(stream, name):
        where = f"{name}, line {number}"
        try:
            text = line.decode()
            if not text.strip():
                continue
            row = parse_json(text, where)
        except UnicodeDecodeError:
            row = RowError(where, "not UTF-8 text; convert the file", "not UTF-8 text")
        except json.JSONDecodeError as error:
            problem = f"not valid JSON ({error.msg}); each line must be one object"
            row = RowError(f"{where}, column {error.colno}", problem, "not valid JSON")
        except RowError as error:
            row = error
        yield where, row


def jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place in the file, row) pairs of a file with one JSON value per line; blank lines are skipped.

    Raises:
        DataError: the file or a row cannot be read; the message names file and line.
    """
    check_regular(path)
    try:
        with path.open("rb") as stream:
            for where, row in rows_of_lines(stream, str(path)):
                if isinstance(row, RowError):
                    raise row
                yield where, row
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
