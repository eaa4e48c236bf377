"""Temporary files and compile caches belong to one process; temporary files are removed with it."""

import os
import shutil
import stat
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
    for variable in ("TMPDIR", *tempdirs._CACHES):
        monkeypatch.setenv(variable, str(tmp_path / "shared"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path))
    return tmp_path


@pytest.mark.guarantee("temporary files and compile caches")
def test_process_has_private_folders(disk: Path) -> None:
    with private_folders("7-0") as first:
        folders = {variable: Path(os.environ[variable]) for variable in ("TMPDIR", *tempdirs._CACHES)}
        assert Path(tempfile.gettempdir()) == folders["TMPDIR"]
        assert folders["TMPDIR"].is_relative_to(first)
        for folder in folders.values():
            assert folder.is_dir()
            assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
        with private_folders("7-1"):
            others = {Path(os.environ[variable]) for variable in folders}
        assert others.isdisjoint(folders.values())
    assert not first.exists()


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


def compiled(disk: Path) -> Path:
    """Return the Triton cache of a process that runs now, to which it adds a file."""
    with private_folders("4-0"):
        cache = Path(os.environ["TRITON_CACHE_DIR"])
        (cache / "kernel").touch()
    return cache


def test_next_process_has_what_an_earlier_one_compiled(disk: Path) -> None:
    cache = compiled(disk)
    assert (cache / "kernel").exists()
    assert compiled(disk) == cache


def test_code_of_a_killed_process_is_dropped(disk: Path) -> None:
    cache = compiled(disk)
    holder = subprocess.Popen([sys.executable, "-c", HOLD], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    holder.stdout.readline()
    assert compiled(disk) != cache
    holder.kill()
    holder.wait()
    with private_folders("5-0"):
        assert Path(os.environ["TRITON_CACHE_DIR"]) == cache
        assert list(cache.iterdir()) == []


def test_large_cache_is_emptied(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = compiled(disk)
    (cache / "kernel").write_bytes(bytes(1000))
    monkeypatch.setattr(tempdirs, "_LARGEST_CACHE", 1000)
    with private_folders("5-0"):
        assert list(cache.iterdir()) == [cache / "kernel"]
    monkeypatch.setattr(tempdirs, "_LARGEST_CACHE", 999)
    with private_folders("5-0"):
        assert list(cache.iterdir()) == []


@pytest.mark.parametrize("planted", ["link", "writable", "file"])
def test_cache_that_others_can_write_is_not_used(disk: Path, planted: str) -> None:
    """Compiled code is executed, and the names of caches in /tmp can be guessed."""
    cache = compiled(disk).parent
    shutil.rmtree(cache)
    if planted == "link":
        (disk / "elsewhere").mkdir()
        cache.symlink_to(disk / "elsewhere")
    elif planted == "writable":
        cache.mkdir()
        cache.chmod(0o777)
    else:
        cache.touch()
    assert compiled(disk).parent.name == cache.name.removesuffix("0") + "1"


COMPILE = """
import os
import torch
from cluster.tempdirs import private_folders
from torch._dynamo.utils import counters
with private_folders("6-0"):
    torch.compile(lambda x: (x.sin() + 1).sum())(torch.ones(1000))
print(counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on CPUs")
def test_torch_compiles_once_per_node(disk: Path) -> None:
    command = [sys.executable, "-c", COMPILE]
    hits = [subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert list(map(int, hits)) == [0, 1]
