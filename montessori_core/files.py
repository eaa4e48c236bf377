"""Atomic writes of files and folders, and hashes of their content."""

import errno
import hashlib
import json
import os
import shutil
import socket
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from montessori_core.errors import UserError

OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the errors of a full disk and of a used up quota."""
_STALE_READS = 5
"""Over NFS, reading a file while another host replaces it fails with ESTALE; a retry reads the new file."""


@contextmanager
def commit(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path next to `path`; on success flush it to disk (if `durable`) and move it to `path`.

    The block creates a file or a folder there. On any exception the temporary path is removed and `path` is unchanged.
    Concurrent commits do not collide: the temporary name holds host, process and a random part. Weights, which safetensors
    writes for their owner alone, become readable as the umask allows: others of a group copy runs.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        for created in [temporary, *temporary.rglob("*")]:
            if ".safetensors" in created.name and created.is_file() and not created.is_symlink():
                _let_others_read(created)
            if durable and (created.is_file() or created.is_dir()):
                _flush(created)
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


def _let_others_read(file: Path) -> None:
    """Add the bits for reading that the umask allows, unless the file is another user's."""
    found = file.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o444 == 0o444:
        return
    # A new file tells the umask. To ask for it by os.umask changes it for a moment, in all threads.
    probe = file.with_name(f"{file.name}.umask")
    probe.touch()
    allowed = probe.stat().st_mode & 0o444
    probe.unlink()
    file.chmod(stat.S_IMODE(found.st_mode) | allowed)


def is_copy(folder: Path, original: str | None) -> bool:
    """Return whether a folder is a copy of another that still exists, from whose path what it says was written.

    Args:
        folder: the folder.
        original: resolved path of the folder when it was written; None if it is not known.
    """
    if original is None:
        return False
    try:
        return not os.path.samefile(original, folder)  # one folder may have several paths
    except OSError:
        return False  # it was moved


def write_json(content: Any, path: Path, durable: bool = True) -> None:
    """Write `content` as JSON, atomically.

    A file that can be recomputed need not be `durable`: it is not flushed and is written in one line, which Python's C
    encoder does much faster than indented JSON.
    """
    with commit(path, durable) as temporary:
        temporary.write_text(
            json.dumps(content, indent=2 if durable else None, sort_keys=True) + "\n", encoding="utf-8"
        )


def read_json(path: Path) -> Any:
    """Read JSON; return None if the file is missing or incomplete.

    Raises:
        OSError: it cannot be read; with a stale handle, several times.
    """
    remaining = _STALE_READS
    while True:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
            return None
        except OSError as error:
            remaining -= 1
            if error.errno != errno.ESTALE or not remaining:
                raise


def hash_json(content: Any) -> str:
    """Return the SHA-256 of plain data, independent of key order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hash_path(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, or of a folder's file names and bytes."""
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


def make_folder_of_pickles(path: Path) -> None:
    """Create a folder that its owner alone may write: opening a pickle runs code. Who may read the run may read it."""
    path.mkdir(parents=True, exist_ok=True)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        path.chmod(mode & ~(stat.S_IWGRP | stat.S_IWOTH))


def owner_of(path: Path) -> str:
    """Return the name of the user who owns a file or folder, or the nearest folder above it that exists."""
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    try:
        return existing.owner()
    except KeyError:  # a user that this machine does not know
        return f"user {existing.stat().st_uid}"


def cache_root() -> Path:
    """Return the folder of converted models and API answers: $MONTESSORI_CACHE, else the user's cache folder."""
    if folder := os.environ.get("MONTESSORI_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "montessori"


def refuse_existing(output: Path, kind: str) -> None:
    """Check that the path of an option --output is free; `kind` is 'file' or 'folder'.

    Raises:
        UserError: it is not.
    """
    if output.exists() or output.is_symlink():
        raise UserError(f"{output} exists; nothing is overwritten: give another {kind} with --output, or remove it")
