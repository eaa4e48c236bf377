"""Files and folders that are either whole or absent, and the hashes that prove which."""

import errno
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_STALE_READS = 5
"""Over NFS, reading a file that another host replaces at that moment fails; the next reading finds the new one."""


@contextmanager
def commit(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk (if `durable`) and move it to `path`.

    Works for a file and for a folder (the block creates either). On any exception the temporary is removed and `path`
    keeps what it held. Concurrent commits never mix: the name carries host, process and a random part.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        for file in [temporary] if temporary.is_file() else sorted(temporary.rglob("*")):
            if durable and file.is_file():
                _flush(file)
        if temporary.is_dir() and path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
        if durable:
            _flush(path.parent)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


def write_json(content: Any, path: Path, durable: bool = True) -> None:
    """Write `content` as JSON, atomically; what can be made again need not be `durable`, and is written much faster.

    People read what is kept. The rest is for programs, in one line: only that way does Python write JSON at the speed of C.
    """
    with commit(path, durable) as temporary:
        temporary.write_text(
            json.dumps(content, indent=2 if durable else None, sort_keys=True) + "\n", encoding="utf-8"
        )


def read_json(path: Path) -> Any:
    """Read JSON; None if the file is missing or is not whole."""
    for _ in range(_STALE_READS):
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
            return None
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
    return None


def hash_json(content: Any) -> str:
    """SHA-256 of plain data, independent of key order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hash_path(path: Path) -> str:
    """SHA-256 of a file's bytes, or of a folder's file names and bytes."""
    if path.is_file():
        return _hash_file(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return hash_json([[file.relative_to(path).as_posix(), _hash_file(file)] for file in files])


def _hash_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_root() -> Path:
    """Folder of converted models and of answers of APIs: $MONTESSORI_CACHE, else the user's cache folder."""
    if "MONTESSORI_CACHE" in os.environ:
        return Path(os.environ["MONTESSORI_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "montessori"
