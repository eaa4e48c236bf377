"""Two users of one group whose runs lie in one folder: group-writable, with umask 002 and the setgid and the sticky bit."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest

from montessori_core.files import hash_path, read_json, write_json
from support import ROOT, wait_until
from support.prefect_server import free_port
from support.runs import configuration
from tasks.resume import enter_directory

ALICE, BOB, GROUP = 61001, 61002, 61000

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv, to act as two users"
)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder of the group, outside of the tester's own folders; it has the subfolder `runs`."""
    folder = Path(tempfile.mkdtemp(prefix="montessori-shared-", dir="/tmp"))
    for path in (folder, folder / "runs"):
        path.mkdir(exist_ok=True)
        os.chown(path, 0, GROUP)
        path.chmod(0o3775)
    yield folder
    shutil.rmtree(folder)


def identity(user: int) -> list[str]:
    return ["setpriv", f"--reuid={user}", f"--regid={GROUP}", "--clear-groups"]


@cache
def reading() -> list[str]:
    """Return the options of setpriv with which a user can read Python and the checkout; skip the test if none do.

    Where these are the tester's own files, the user needs the capability to read every file. Docker does not give it.
    """
    code = f"import sys; assert sys.base_prefix == {sys.base_prefix!r}; import flows.cli, psutil"
    check = [sys.executable, "-c", code]  # setpriv starts an unreadable Python, which then takes another's library
    for options in ([], ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]):
        command = [*identity(ALICE), *options, *check]
        if subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0:
            return options
    pytest.skip("another user can read neither this Python nor this checkout, and CAP_DAC_READ_SEARCH is missing")


def start(user: int, folder: Path, *command: str) -> subprocess.Popen[str]:
    """Start a command as a user whose home is a folder of its own."""
    home = folder / f"home-{user}"
    home.mkdir(exist_ok=True)
    os.chown(home, user, GROUP)
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "HF_HOME", "MONTESSORI_"))
    }
    name = f"user-{user}"
    variables = {"HOME": str(home), "USER": name, "LOGNAME": name, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    return subprocess.Popen(
        [*identity(user), *reading(), *command],
        cwd=folder,
        env=kept | variables,
        umask=0o002,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=600)
    return process.returncode, " ".join(output.split())


def montessori(user: int, folder: Path, *arguments: str) -> tuple[int, str]:
    return finish(start(user, folder, sys.executable, "-m", "flows.cli", *arguments))


@pytest.mark.slow
@pytest.mark.guarantee("several users on one run root")
@pytest.mark.guarantee("run of another user")
@pytest.mark.guarantee("run copied or moved to another path")
def test_users_share_a_run_root(talking_llama: Path, shared: Path) -> None:
    model = shutil.copytree(talking_llama, shared / "model")
    for file in model.iterdir():
        file.chmod(0o644)
    config = str(configuration(shared, model))
    drivers = {
        name: start(user, shared, sys.executable, "-m", "flows.cli", "run", config, "--name", name)
        for user, name in ((ALICE, "alices"), (BOB, "bobs"))
    }
    for driver in drivers.values():
        code, output = finish(driver)
        assert code == 0, output
    run = shared / "runs" / "alices"
    jobs = [path for path in run.rglob("jobs") if path.is_dir()]
    pickles = [*jobs, *(path for path in run.rglob("checkpoints/*") if path.is_dir())]
    assert jobs
    assert not any(path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH) for path in pickles)
    assert run.stat().st_mode & stat.S_IWGRP

    before = hash_path(run)
    code, output = montessori(BOB, shared, "status", "runs/alices")
    assert code == 0, output
    assert "iteration-1/influence" in output
    code, output = montessori(BOB, shared, "logs", "runs/alices", "--stage", "iteration-1/influence", "--shard", "0")
    assert code == 0, output
    for command in (["resume", "runs/alices"], ["cancel", "runs/alices"], ["run", config, "--name", "alices"]):
        code, output = montessori(BOB, shared, *command)
        assert code == 1, output
        assert f"alices: this run belongs to user {ALICE}, who alone may continue or cancel it" in output
    assert hash_path(run) == before

    code, output = finish(start(BOB, shared, "cp", "-r", "runs/alices", f"home-{BOB}/copy"))
    assert code == 0, output
    copy = shared / f"home-{BOB}" / "copy"
    shutil.rmtree(copy / "iteration-1" / "student")
    (copy / "iteration-1" / "metrics.json").unlink()
    code, output = montessori(BOB, shared, "resume", str(copy))
    assert code == 0, output
    trained = Path("iteration-1") / "student" / "part-00000" / "model.safetensors"
    assert (copy / trained).read_bytes() == (run / trained).read_bytes()
    for folder in jobs:
        again = copy / folder.relative_to(run)
        assert len(list(again.iterdir())) == len(list(folder.iterdir())), f"{again}: the stage ran again"


@pytest.mark.guarantee("run copied or moved to another path")
def test_start_in_a_closed_home_does_not_hinder_a_copy(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, copy = shared / "home", shared / "copy"
    home.mkdir(mode=0o700)
    os.chown(home, ALICE, GROUP)
    copy.mkdir()
    write_json({"driver": {"directory": str(home)}}, copy / "provenance.json")
    (copy / "provenance.json").chmod(0o644)
    monkeypatch.chdir(shared)
    os.seteuid(BOB)
    try:
        enter_directory(copy)
    finally:
        os.seteuid(0)
    assert Path.cwd() == shared


@pytest.mark.guarantee("several users on one run root")
@pytest.mark.slow
def test_each_user_serves_a_shared_root(shared: Path) -> None:
    with ExitStack() as served:
        for user in (ALICE, BOB):
            up = start(user, shared, sys.executable, "-m", "flows.cli", "up", "--port", str(free_port()))
            served.callback(up.wait, 60)
            served.callback(up.send_signal, signal.SIGINT)
            wait_until(lambda user=user: address(shared, user) is not None, 120, process=up)
        assert address(shared, ALICE) != address(shared, BOB)


def address(shared: Path, user: int) -> str | None:
    """Return the address at which a user's `montessori up` serves; None before it does."""
    states = [read_json(file) or {} for file in (shared / "runs").glob(f".montessori-{user}/up.json")]
    return states[0].get("url") if states else None


@pytest.mark.guarantee("file of another user")
def test_error_names_owner_of_foreign_file(shared: Path) -> None:
    (shared / "runs").chmod(0o755)
    code, output = montessori(BOB, shared, "up", "--run-root", "runs")
    assert code == 1
    assert "Permission denied: " in output
    assert "(owner: root)" in output
