"""Private folders of one process of a job: temporary files, and compile caches that processes must not share.

They are on the node's disk and end with the process, which locks its folder while it runs. The next process on the node
removes the folders of killed processes.
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from montessori_core.locks import take_lock

_JUST_MADE = 60.0  # seconds; its process may not have locked a newer folder yet
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
    try:
        take_lock(lock, fcntl.LOCK_EX)
        for variable, folder in _CACHES.items():
            (root / folder).mkdir()
            os.environ[variable] = str(root / folder)
        tempfile.tempdir = None  # make tempfile read TMPDIR again
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)
        os.close(lock)


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
