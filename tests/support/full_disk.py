"""A disk that is full after some writes."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def full_after(writes: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let so many files be replaced in the block; the next one fails for lack of space."""
    left, replace = iter(range(writes)), os.replace

    def replace_some(source: Path, target: Path) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace(source, target)

    with monkeypatch.context() as disk:
        disk.setattr(os, "replace", replace_some)
        yield
