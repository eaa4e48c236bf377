"""Read a JSON list of rows, with a few rows in memory at a time."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from montessori_core.data.bad_rows import RowError
from montessori_core.data.jsonl import LONGEST_ROW, check_characters, named_errors, to_object
from montessori_core.errors import DataError

_NO_BLANK = re.compile(r"[^ \t\r\n]")
_ANY_OBJECT = json.JSONDecoder(parse_int=str)
"""Accepts fields that occur twice and numbers of any length: to find where a value ends."""


def rows_of_list(stream: BinaryIO, name: str) -> Iterator[tuple[str, Any]]:
    """Yield (place in the file, row) pairs of a JSON list, with a few rows in memory at a time.

    A row whose values cannot be written again is a RowError.

    Raises:
        DataError: it is not a list, or its rest cannot be read; the message names the entry and the line.
    """
    buffer = _Buffer(stream, name)
    buffer.expect("[")
    number = 0
    while buffer.peek() != "]":
        if number:
            buffer.expect(",")
        number += 1
        buffer.place = f"entry {number}"
        yield f"{name}, entry {number}", buffer.value(f"{name}, entry {number}")
    buffer.expect("]")
    if buffer.peek():
        raise buffer.error("text after the end of the list")


class _Buffer:
    """The part of a JSON text that is being parsed."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream, self._name = stream, name
        self._bytes = codecs.getincrementaldecoder("utf-8-sig")()
        self._decoder = json.JSONDecoder(object_pairs_hook=to_object)
        self._text, self._position, self._lines, self._ended = "", 0, 1, False
        self.place = "the beginning"

    def error(self, problem: str) -> DataError:
        line = self._lines + self._text.count("\n", 0, self._position)
        return DataError(
            f"{self._name}, line {line}: not valid JSON at {self.place} ({problem}); a .json file must be one list of "
            "objects, or have one object per line"
        )

    def peek(self) -> str:
        """Return the next character that is not white space; '' at the end."""
        while True:
            match = _NO_BLANK.search(self._text, self._position)
            if match or not self._read():
                self._position = match.start() if match else len(self._text)
                return match[0] if match else ""

    def expect(self, character: str) -> None:
        """Pass the next character.

        Raises:
            DataError: it is another one.
        """
        if (found := self.peek()) != character:
            raise self.error(f"expected {character!r}, found {found!r}" if found else "it ends early")
        self._position += 1

    def value(self, where: str) -> Any:
        """Pass the next value and return it; a RowError if it cannot be written again.

        Raises:
            DataError: it is not JSON, or longer than LONGEST_ROW.
        """
        self.peek()
        while True:
            start = self._position
            try:
                content, end = self._decode(where, start)
            except json.JSONDecodeError as error:
                if self._read():
                    continue
                self._position = error.pos
                raise self.error(error.msg) from error
            if end < len(self._text) or not self._read():  # a number may go on
                break
        if end - start > LONGEST_ROW:
            raise self.error(f"longer than {LONGEST_ROW >> 20} MiB")
        self._position = end
        if isinstance(content, RowError):
            return content
        try:
            with named_errors(where):
                check_characters(content, self._text[start:end])
        except RowError as error:
            return error
        return content

    def _decode(self, where: str, start: int) -> tuple[Any, int]:
        """Return the value at a position, or a RowError in its place, and where it ends."""
        try:
            with named_errors(where):
                return self._decoder.raw_decode(self._text, start)
        except RowError as error:
            try:
                return error, _ANY_OBJECT.raw_decode(self._text, start)[1]
            except RecursionError:
                raise error from None  # where it ends is unknown

    def _read(self) -> bool:
        """Read more text, as much again as is waiting; return whether there is more."""
        waiting = len(self._text) - self._position
        if self._ended:
            return False
        if waiting > LONGEST_ROW:
            raise self.error(f"longer than {LONGEST_ROW >> 20} MiB")
        chunk = self._stream.read(max(waiting, 2**16))
        self._ended = not chunk
        self._lines += self._text.count("\n", 0, self._position)
        self._text, self._position = self._text[self._position :], 0
        try:
            self._text += self._bytes.decode(chunk, final=self._ended)
        except UnicodeDecodeError as error:
            raise DataError(f"{self._name}, {self.place}: not UTF-8 text; convert the file") from error
        return True
