"""Shared parts of tests: models, programs, runs, servers. Test modules import from here, never from each other."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
CONFIGS = ROOT / "montessori_core" / "presets"
NO_LIBRARIES = ROOT / "tests" / "support" / "no_libraries"
"""Folder for the path of jobs that need no torch: a warm process starts in a second instead of seven."""


def wait_until(
    condition: Callable[[], object],
    seconds: float = 180.0,
    explain: Callable[[], str] = str,
    process: "subprocess.Popen[Any] | None" = None,
    pause: float = 0.02,
) -> None:
    """Wait until a condition holds; fail after `seconds`, with an explanation, or when the process ends before that."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, explain()
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(pause)
