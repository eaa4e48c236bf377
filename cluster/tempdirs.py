"""Folders of one process of a job: temporary files and compile caches, which must not be shared while they change.

They lie on the node's own disk and go with the process. What a killed process left there is removed by the next one on
that node: each folder is locked for as long as its process lives.
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_JUST_MADE = 60.0  # seconds in which a folder's process may not have locked it yet
_CACHES = {
    "TMPDIR": "tmp",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "extensions",
    "VLLM_CACHE_ROOT": "vllm",
    "CUDA_CACHE_PATH": "cuda",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
}


@contextmanager
def private_folders(name: str) -> Iterator[Path]:
    """Give this process folders of its own, in $SLURM_TMPDIR or the node's usual place, and say so in its environment.

    Args:
        name: of the process among all of this user's, for people who look.
    """
    shared = Path(os.environ.get("SLURM_TMPDIR", tempfile.gettempdir()))
    prefix = f"montessori-{os.getuid()}-"
    for old in shared.glob(f"{prefix}*"):
        _remove_abandoned(old)
    own = Path(tempfile.mkdtemp(prefix=f"{prefix}{name}-", dir=shared))
    lock = os.open(own, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for variable, folder in _CACHES.items():
            (own / folder).mkdir()
            os.environ[variable] = str(own / folder)
        tempfile.tempdir = None  # Python remembers where temporary files went before
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)
        os.close(lock)


def _remove_abandoned(folder: Path) -> None:
    try:
        if time.time() - folder.stat().st_mtime < _JUST_MADE:
            return
        lock = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # another process removes it, too
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass  # its process lives
    finally:
        os.close(lock)
