"""A file system without locks, such as Lustre mounted without flock: a library makes the call of the C library fail."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import lock
from cluster.lock import Driver, driver_of
from montessori_core import layout
from montessori_core.errors import UserError
from support import ROOT
from support.runs import configuration, montessori

SOURCE = ROOT / "tests" / "support" / "file_faults" / "no_locks.c"
DRIVER = """
import logging, sys, time
from pathlib import Path
from cluster.lock import only_driver
logging.basicConfig()
with only_driver(Path(sys.argv[1])):
    print("drives", flush=True)
    time.sleep(600)
"""
OPENS = """
import sys
from pathlib import Path
from cluster.lock import driver_of, no_driver
with no_driver(Path(sys.argv[1])):
    pass
print(driver_of(Path(sys.argv[1])))
"""

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Environment variables for processes that find no locks in `tmp_path`."""
    library = tmp_path / "no_locks.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library), "NO_LOCKS_ROOT": str(tmp_path)}


def start(folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(driver: subprocess.Popen[str]) -> str:
    """Return 'drives', or why the driver was refused."""
    assert driver.stdout is not None
    assert driver.stderr is not None
    return driver.stdout.readline().strip() or driver.stderr.read()


def test_run_has_one_driver_without_locks(tmp_path: Path, environment: dict[str, str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    both = [start(run, environment), start(run, environment)]
    try:
        outcomes = [outcome(driver) for driver in both]
        assert sorted(said == "drives" for said in outcomes) == [False, True]
        winner = both[outcomes.index("drives")]
        both.append(start(run, environment))
        assert f"already has a driver (process {winner.pid} on" in outcome(both[-1])
        winner.kill()
        winner.wait()
        both.append(start(run, environment))
        assert outcome(both[-1]) == "drives"
    finally:
        for driver in both:
            driver.kill()
            driver.communicate()
    assert driver_of(run) is None  # with locks, a file of before does not count


def test_last_of_two_simultaneous_writers_drives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has emptied the file before the other wrote: both names are there."""
    monkeypatch.setattr(lock, "_SIMULTANEOUS", 0.0)
    path, first, second = tmp_path / layout.DRIVER_LOCK, '{"process":1,"host":"a"}', '{"process":2,"host":"b"}'
    path.write_text(first + second)
    lock._refuse_simultaneous_driver(path, second)
    with pytest.raises(UserError, match="already has a driver"):
        lock._refuse_simultaneous_driver(path, first)


def test_remote_driver_counts_until_its_file_is_removed(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / layout.DRIVER_LOCK).write_text(Driver(process=1, host="login9").model_dump_json())
    driver = start(tmp_path, environment)
    refusal = outcome(driver)
    driver.communicate()
    assert "already has a driver (process 1 on login9)" in refusal
    assert "Remove the file if a driver on another host died" in refusal
    (tmp_path / layout.DRIVER_LOCK).unlink()
    driver = start(tmp_path, environment)
    assert outcome(driver) == "drives"
    driver.kill()
    driver.communicate()


def test_opened_run_has_no_driver_whose_process_id_was_reused(tmp_path: Path, environment: dict[str, str]) -> None:
    """A driver died; another process, which is not to be interrupted, has its id."""
    path = tmp_path / layout.DRIVER_LOCK
    path.write_text(Driver(process=os.getpid(), host=socket.gethostname(), folder=str(tmp_path)).model_dump_json())
    os.utime(path, (time.time() - 86400,) * 2)
    for _ in range(2):
        command = [sys.executable, "-c", OPENS, str(tmp_path)]
        opening = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
        assert opening.stdout == "None\n"


@pytest.mark.slow
@pytest.mark.guarantee("no locks")
def test_run_needs_no_locks(talking_llama: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    config = configuration(tmp_path, talking_llama)
    (tmp_path / "tmp").mkdir()
    run = montessori("run", str(config), cwd=tmp_path, TMPDIR=str(tmp_path / "tmp"), **environment)
    output, _ = run.communicate(timeout=600)
    assert run.returncode == 0, output
    assert "this file system has no locks" in output
    assert (tmp_path / "runs" / "tiny" / "report.html").exists()
