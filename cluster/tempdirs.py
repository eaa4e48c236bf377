"""Private folders of one process of a job: temporary files, and caches of compiled code, which processes must not share.

They are on the node's disk. Temporary files end with the process, which locks its folder while it runs; the next process on
the node removes the folders of killed processes. Compiled code stays, for the next process on the node.
"""

import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from montessori_core.locks import take_lock

_JUST_MADE = 60.0  # seconds; its process may not have locked a newer folder yet
_CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "extensions",
    "VLLM_CACHE_ROOT": "vllm",
    "CUDA_CACHE_PATH": "cuda",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
}
_MOST_CACHES = 64  # of a user on a node; more processes at a time have caches that end with them
_LARGEST_CACHE = 5e9  # bytes; code of earlier models and versions is never used again
_IN_USE = "in-use"
"""File in a cache whose process runs, or was killed."""


@contextmanager
def private_folders(name: str) -> Iterator[Path]:
    """Create private folders in $SLURM_TMPDIR or the default temporary folder; set the environment variables for them.

    Args:
        name: name of the process in the folder's name, unique among the user's processes.
    """
    shared = Path(os.environ.get("SLURM_TMPDIR", tempfile.gettempdir()))
    prefix = f"montessori-{os.getuid()}-"
    for old in shared.glob(f"{prefix}*"):
        _remove_abandoned(old)
    root = Path(tempfile.mkdtemp(prefix=f"{prefix}{name}-", dir=shared))
    lock = os.open(root, os.O_RDONLY)
    with ExitStack() as caches:
        try:
            take_lock(lock, fcntl.LOCK_EX)
            compiled = caches.enter_context(_kept_cache(shared)) or root
            folders = {"TMPDIR": root / "tmp", **{variable: compiled / part for variable, part in _CACHES.items()}}
            for variable, folder in folders.items():
                folder.mkdir(exist_ok=True)
                os.environ[variable] = str(folder)
            tempfile.tempdir = None  # make tempfile read TMPDIR again
            yield root
        finally:
            shutil.rmtree(root, ignore_errors=True)
            os.close(lock)


@contextmanager
def _kept_cache(shared: Path) -> Iterator[Path | None]:
    """Lend a cache that no other process has, with what earlier processes on this node compiled; None if there is none.

    Compiled code may hold the path of its cache, so that a cache keeps its path. That of a killed process is emptied: what it
    was writing may be incomplete. A large one is emptied, too.
    """
    for number in range(_MOST_CACHES):
        cache = shared / f"montessori-compiled-{os.getuid()}-{number}"
        lock = _lock_own_folder(cache)
        if lock is None:
            continue
        try:
            mark = cache / _IN_USE
            if mark.exists() or _size_of(cache) > _LARGEST_CACHE:
                for part in _CACHES.values():
                    shutil.rmtree(cache / part, ignore_errors=True)
            mark.touch()
            yield cache
            mark.unlink(missing_ok=True)
        finally:
            os.close(lock)
        return
    yield None


def _size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    size = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # compilers that a killed process has left may still be at work
                size += os.lstat(os.path.join(path, name)).st_size
    return size


def _lock_own_folder(folder: Path) -> int | None:
    """Create and lock a folder; return its descriptor, or None if others can write to it, or a process has locked it."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    found = os.fstat(lock)
    own = found.st_uid == os.getuid() and not stat.S_IMODE(found.st_mode) & 0o022
    try:
        if own and take_lock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):  # without locks, another process may have it
            return lock
    except BlockingIOError:
        pass
    os.close(lock)
    return None


def _remove_abandoned(folder: Path) -> None:
    try:
        if time.time() - folder.stat().st_mtime < _JUST_MADE:
            return
        lock = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # another process has removed it
    try:
        if take_lock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):  # without locks, nobody knows whether its process is running
            shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass  # its process is running
    finally:
        os.close(lock)
