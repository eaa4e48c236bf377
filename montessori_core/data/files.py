"""Data files as streams of bytes: of this machine or of an fsspec file system, decompressed, within bounds."""

import gzip
import io
import lzma
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa

from montessori_core.data.jsonl import check_regular
from montessori_core.errors import DataError

KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".zst", ".xz")
MAX_EXPANSION = 200
"""Times that a compressed file may grow, beyond the first FREE bytes; text grows by 3 to 30."""
FREE = 2**24


@dataclass(frozen=True)
class DataFile:
    """A file with rows.

    Attributes:
        path: on its file system.
        name: path or URL, for messages.
        system: its fsspec file system; None: this machine's.
    """

    path: str
    name: str
    system: Any = None

    @property
    def kind(self) -> str:
        """Its suffix without that of the compression; '' if it is none of KINDS."""
        return kind_of(self.path)

    @property
    def compression(self) -> str:
        """The suffix of its compression, or ''; of a download, whose path has none, that in its URL."""
        suffixes = (PurePosixPath(text).suffix.lower() for text in (self.path, self.name))
        return next((suffix for suffix in suffixes if suffix in COMPRESSIONS), "")

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the decompressed bytes.

        Raises:
            DataError: it cannot be read, is damaged, or grows by more than MAX_EXPANSION.
        """
        with self._open_raw() as raw:
            compressed = _Bytes(raw, self.name)
            if not self.compression:
                yield io.BufferedReader(compressed, 2**20)
                return
            stream = _open_compressed(io.BufferedReader(compressed, 2**18), self.compression)
            yield io.BufferedReader(_Bytes(stream, self.name, compressed), 2**20)

    @contextmanager
    def open_seekable(self) -> Iterator[BinaryIO]:
        """Open the decompressed bytes for reads at any position; a compressed file is first written to a temporary one.

        Raises:
            DataError: as `open`.
        """
        if not self.compression:
            with self._open_raw() as raw:
                yield raw
            return
        with tempfile.TemporaryFile() as copy:
            with self.open() as stream:
                shutil.copyfileobj(stream, copy, 2**20)
            copy.seek(0)
            yield copy

    def copy(self, target: Path) -> None:
        """Write its bytes, compressed as they are, to a file of this machine.

        Raises:
            DataError: it cannot be read.
        """
        with self._open_raw() as raw, target.open("wb") as stream:
            shutil.copyfileobj(io.BufferedReader(_Bytes(raw, self.name)), stream, 2**20)

    @contextmanager
    def _open_raw(self) -> Iterator[BinaryIO]:
        try:
            if self.system is None:
                check_regular(Path(self.path))
                raw = io.BufferedReader(io.FileIO(self.path), 2**20)
            else:
                raw = self.system.open(self.path, "rb")
        except DataError:
            raise
        except Exception as error:  # file systems raise many kinds
            raise DataError(
                f"{self.name}: cannot be read ({getattr(error, 'strerror', None) or error}); check the path"
            ) from error
        with raw:
            yield raw


def kind_of(path: str) -> str:
    """Return the suffix of a data file without that of its compression, in lower case; '' if it is none of KINDS."""
    name = PurePosixPath(path)
    if name.suffix.lower() in COMPRESSIONS:
        name = name.with_suffix("")
    return name.suffix.lower() if name.suffix.lower() in KINDS else ""


def _open_compressed(stream: BinaryIO, compression: str) -> Any:
    if compression == ".gz":
        return gzip.GzipFile(fileobj=stream)
    if compression == ".xz":
        return lzma.LZMAFile(stream)
    return pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd")


class _Bytes(io.RawIOBase):
    """Bytes of a stream; damage and growth beyond the bound are errors that name the file."""

    def __init__(self, stream: Any, name: str, compressed: "_Bytes | None" = None) -> None:
        self._stream, self._name, self._compressed = stream, name, compressed
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._stream.read(len(buffer))
        except DataError:
            raise
        except Exception as error:  # file systems and decompressors raise many kinds
            remedy = "it is damaged: copy or compress it again" if self._compressed else "check the disk or network"
            raise DataError(f"{self._name}: cannot be read after {self.count:,} bytes ({error}); {remedy}") from error
        self.count += len(content)
        if self._compressed and self.count > FREE and self.count > MAX_EXPANSION * self._compressed.count:
            raise DataError(
                f"{self._name}: {self._compressed.count:,} bytes grow to more than {self.count:,} ({MAX_EXPANSION} times as "
                "many is the limit); if it is no decompression bomb, decompress it first"
            )
        buffer[: len(content)] = content
        return len(content)
