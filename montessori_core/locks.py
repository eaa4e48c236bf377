"""Locks on open files, also on file systems that have none."""

import errno
import fcntl
from typing import IO

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""Errors of a file system without locks, such as Lustre mounted without `flock`, or NFS whose lock service is down."""


def take_lock(file: IO[str] | int, operation: int) -> bool:
    """Lock a file until it is closed; return False if its file system has no locks.

    Args:
        file: open file, or its descriptor.
        operation: of `fcntl.flock`.

    Raises:
        BlockingIOError: another process holds the lock, and `operation` has LOCK_NB.
    """
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True
