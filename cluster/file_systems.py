"""Shared file systems: transient errors, and results of other hosts that become visible late."""

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from montessori_core.files import OUT_OF_SPACE

log = logging.getLogger(__name__)

_PASSING = (errno.ESTALE, errno.EIO, errno.EREMOTEIO)
_PASSING_TEXTS = tuple(os.strerror(number) for number in _PASSING)
_FULL_TEXTS = (
    *(os.strerror(number) for number in OUT_OF_SPACE),
    ". unexpected pos ",  # torch.save, when a write was cut short
)
_LATEST_RESULT = 90.0  # seconds; NFS caches attributes of a folder for up to 60 by default (acdirmax)
_PATIENCE = 600.0  # seconds
_NEARLY_FULL = 64 * 2**20  # bytes

T = TypeVar("T")


def is_full(error: BaseException) -> bool:
    """Return whether there was no space or quota left; libraries such as safetensors raise errors of their own."""
    return any(text in str(error) for text in _FULL_TEXTS)


def node_is_full(folder: Path) -> bool:
    """Return whether the disk of this node's temporary files is full, and that of a shared folder is not."""
    temporary = os.environ.get("TMPDIR", "/tmp")  # tempfile.gettempdir ignores a folder where it cannot write
    with suppress(OSError):
        return shutil.disk_usage(temporary).free < _NEARLY_FULL <= shutil.disk_usage(folder).free
    return False


def may_pass(error: BaseException) -> bool:
    """Return whether a file server or a mount failed: another attempt, or another node, may succeed."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _PASSING
    return any(text in str(error) for text in _PASSING_TEXTS)


def _look_again(folder: Path) -> None:
    """Make NFS look at a folder again: its client drops cached attributes of a folder when it changes the folder itself."""
    probe = folder / f".look-{os.getpid()}"
    with suppress(OSError):
        probe.touch()
        probe.unlink()


class LateResults:
    """Jobs that ended well, and whose results this host does not see yet."""

    def __init__(self, reason: Callable[[str], str]) -> None:
        """Take the function that asks the scheduler why a job ended."""
        self._reason = reason
        self._ended: dict[str, float] = {}

    def may_come(self, job_id: str, folder: Path) -> bool:
        """Return whether to wait for the results of a job that has left the queue; look at their folder again."""
        if job_id not in self._ended:
            if "COMPLETED" not in self._reason(job_id):
                return False
            self._ended[job_id] = time.monotonic()
            log.info("job %s completed, but its results are not visible here yet", job_id)
        _look_again(folder)
        return time.monotonic() - self._ended[job_id] < _LATEST_RESULT


def patiently(action: Callable[[], T], pause: float) -> T:
    """Return the result of an action; while a file server or mount fails, repeat it for up to ten minutes.

    Args:
        action: must be safe to repeat after a failure at any of its steps.
        pause: time between two attempts, seconds.
    """
    deadline: float | None = None
    while True:
        try:
            return action()
        except OSError as error:
            if not may_pass(error) or (deadline is not None and time.monotonic() >= deadline):
                raise
            if deadline is None:
                deadline = time.monotonic() + _PATIENCE
                log.warning("%s; trying again for %.0f minutes", error, _PATIENCE / 60)
        time.sleep(pause)
