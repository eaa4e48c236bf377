"""A driver whose lock's file cannot be read for a moment."""

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.lock import only_driver
from support import ROOT, file_faults, wait_until
from support.file_faults import faults

pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
    pytest.mark.guarantee("stale file handles"),
]
libraries = file_faults.libraries

LOOKS_FOR_DRIVER = """
import sys
from pathlib import Path
from cluster.lock import driver_of
print(driver_of(Path(sys.argv[1])))
"""
AWAITS_END = """
import sys
from pathlib import Path
from prefect.logging import disable_run_logger
from flows import driver_job
driver_job._POLL_SECONDS = 0.1
with disable_run_logger():
    driver_job._await_end(Path(sys.argv[1]))
(Path(sys.argv[1]) / "awaited").touch()
"""
ENDS_ABANDONED = """
import sys
from pathlib import Path
from montessori_core.config import Cluster
from tasks.preview import _end_abandoned
_end_abandoned(Path(sys.argv[1]).parent, Cluster())
"""


def start(program: str, run: Path, libraries: Path) -> "subprocess.Popen[str]":
    """Start a program on a run whose lock cannot be opened once, as over NFS."""
    variables = faults(run.parent, libraries, "open", ["driver.lock"], errno.ESTALE, 1)
    return subprocess.Popen(
        [sys.executable, "-c", program, str(run)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run without stages, in a folder of runs."""
    folder = tmp_path / "runs" / ".preview-tiny"
    folder.mkdir(parents=True)
    return folder


def test_stale_lock_is_not_taken_for_none(run: Path, libraries: Path) -> None:
    with only_driver(run):
        output, _ = start(LOOKS_FOR_DRIVER, run, libraries).communicate(timeout=60)
    assert "Stale file handle" in output
    (run / "driver.lock").unlink()
    assert subprocess.check_output([sys.executable, "-c", LOOKS_FOR_DRIVER, run], cwd=ROOT, text=True) == "None\n"


def test_flow_run_awaits_driver_with_stale_lock(run: Path, libraries: Path) -> None:
    with only_driver(run):
        waiting = start(AWAITS_END, run, libraries)
        wait_until(lambda: not list((run.parent.parent / "tokens").iterdir()), 60, process=waiting)
        time.sleep(1.0)
        assert not (run / "awaited").exists()
    output, _ = waiting.communicate(timeout=60)
    assert (run / "awaited").exists(), output


def test_preview_with_stale_lock_is_left(run: Path, libraries: Path) -> None:
    """It is older than an hour, but a driver may work there."""
    with only_driver(run):
        os.utime(run, (1, 1))
        ending = start(ENDS_ABANDONED, run, libraries)
        output, _ = ending.communicate(timeout=60)
        assert ending.returncode == 0, output
        assert "Stale file handle" in output
        assert run.exists()
