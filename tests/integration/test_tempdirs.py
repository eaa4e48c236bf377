"""Temporary files and compile caches belong to one process and are removed with it."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cluster import tempdirs
from cluster.tempdirs import private_folders
from support import ROOT

HOLD = """
import sys, time
from cluster.tempdirs import private_folders
with private_folders("1-0") as folder:
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in tempdirs._CACHES:
        monkeypatch.setenv(variable, "shared")
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path))
    return tmp_path


@pytest.mark.guarantee("temporary files and compile caches")
def test_process_has_private_temporary_folders(disk: Path) -> None:
    with private_folders("7-0") as first:
        caches = {variable: Path(os.environ[variable]) for variable in tempdirs._CACHES}
        assert all(folder.is_dir() and folder.is_relative_to(first) for folder in caches.values())
        assert Path(tempfile.gettempdir()) == caches["TMPDIR"]
        with private_folders("7-1") as second:
            assert not second.is_relative_to(first)
            assert not any(os.environ[variable] == str(folder) for variable, folder in caches.items())
    assert list(disk.iterdir()) == []


def test_only_folders_of_dead_processes_are_removed(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempdirs, "_JUST_MADE", 0.0)
    holder = subprocess.Popen([sys.executable, "-c", HOLD], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    held = Path(holder.stdout.readline().strip())
    with private_folders("2-0"):
        assert held.is_dir()
    holder.kill()
    holder.wait()
    with private_folders("3-0"):
        assert not held.exists()
