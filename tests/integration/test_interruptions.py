"""Drivers that are interrupted, killed or started twice: the resumed run has the tables of an uninterrupted one."""

import os
import platform
import pty
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from cluster.ledger import Ledger, Submission
from cluster.lock import only_driver
from cluster.processes import start_time
from cluster.supervisor import kill_tree
from cluster.usage import use_of
from flows.prefect_server import starting_server
from support import ROOT, squares, wait_until
from support.row_programs import as_shards
from support.runs import (
    DIES_WHILE_JOINING,
    await_job,
    call,
    configuration,
    digests,
    invoke,
    kill_everything,
    left_over,
    montessori,
)

STAGES = (
    "instructions-1",
    "responses-1",
    "warmup",
    "influence",
    "influence-audit",
    "teacher",
    "training/instructions-1",
    "student",
)


@pytest.mark.guarantee("job killed in the middle of a shard")
@pytest.mark.guarantee("driver killed at any moment")
def test_run_killed_in_every_stage_has_same_tables(
    finished_run: Path, shared_server: dict[str, str], talking_llama: Path, tmp_path: Path
) -> None:
    """A job of each stage is killed at a random moment, and in the middle of the run its driver with all jobs."""
    config = configuration(tmp_path, talking_llama)
    content = yaml.safe_load(config.read_text()) | {
        "comparison": {"unmodified_teacher": False, "influence_examples": 0}
    }
    config.write_text(yaml.safe_dump(content))  # the tables are the same
    run = tmp_path / "runs" / "tiny"
    driver = montessori("run", str(config), cwd=tmp_path, **shared_server)
    draw = random.Random(os.environ.get("MONTESSORI_TEST_SEED", "0"))
    for name in STAGES:
        kill_a_job(run / "iteration-1" / name, driver, draw.uniform(0.0, 0.3))
        if name == "influence":
            kill_everything(driver, signal.SIGKILL)
            driver = montessori("resume", str(run), cwd=tmp_path, **shared_server)
    output, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0, output
    lost = {name for name in STAGES if use_of(run / "iteration-1" / name).retries}
    assert len(lost) >= len(STAGES) / 2  # of the others, the job ended first, or the next driver resumed it
    assert not left_over(tmp_path)
    assert digests(run) == digests(finished_run / "runs" / "tiny")


def kill_a_job(stage: Path, driver: subprocess.Popen[str], after: float) -> None:
    """Wait for a job of a stage, then kill it with its processes `after` seconds later, unless it has ended."""
    job = await_job(driver, stage)
    time.sleep(after)
    with suppress(psutil.NoSuchProcess):
        kill_tree(psutil.Process(int(job.split(":")[0])))


@pytest.mark.guarantee("driver killed at any moment")
@pytest.mark.slow
@pytest.mark.parametrize(
    "stages",
    [
        ("instructions-1", "influence", "teacher", "training/instructions-1", "student"),
        ("responses-1", "warmup", "influence-audit"),
    ],
    ids=["most", "others"],
)
def test_run_interrupted_in_every_stage_has_same_tables(
    stages: tuple[str, ...], finished_run: Path, shared_server: dict[str, str], talking_llama: Path, tmp_path: Path
) -> None:
    """The first two drivers start their temporary Prefect server, which ends with them; the others share one."""
    config = configuration(tmp_path, talking_llama)
    run = tmp_path / "runs" / "tiny"
    draw = random.Random(os.environ.get("MONTESSORI_TEST_SEED", "0"))
    for number, name in enumerate(stages):
        driver = montessori("run", str(config), cwd=tmp_path, **(shared_server if number > 1 else {}))
        begun = run / "iteration-1" / name / "jobs" / "ledger.json"
        wait_until(begun.exists, 300, process=driver)
        time.sleep(draw.uniform(0.0, 6.0))
        assert driver.poll() is None, driver.communicate()[0]
        kill_everything(driver, signal.SIGKILL if number % 2 else signal.SIGINT)
    code, output = call("resume", str(run), cwd=tmp_path, **shared_server)
    assert code == 0, output
    assert not left_over(tmp_path)
    assert digests(run) == digests(finished_run / "runs" / "tiny")


@pytest.mark.slow
def test_temporary_server_waits_for_server_that_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite refuses the second of two migrations of a new database."""
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    with starting_server():
        driver = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from pathlib import Path; from flows.cli.interrupt import interruptible; "
                "from montessori_core.config import Cluster; "
                "interruptible(lambda: print('ready'), Path(), Cluster(), '')",
            ],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        lock = str(tmp_path / "montessori-server.lock")
        wait_until(lambda: lock in [file.path for file in psutil.Process(driver.pid).open_files()], process=driver)
        assert not psutil.Process(driver.pid).children()
    assert driver.communicate(timeout=300)[0] == "ready\n"


@pytest.mark.slow
def test_temporary_server_ends_with_killed_driver(talking_llama: Path, tmp_path: Path) -> None:
    driver = montessori("run", str(configuration(tmp_path, talking_llama)), cwd=tmp_path)
    wait_until(lambda: any("flows.temporary_server" in command for command in left_over(tmp_path)), process=driver)
    kill_everything(driver, signal.SIGKILL)
    wait_until(lambda: not left_over(tmp_path), 120)


@pytest.mark.slow
def test_ctrl_c_prints_how_to_resume(talking_llama: Path, tmp_path: Path) -> None:
    """A terminal sends the signal to all processes in it, not only to the driver."""
    config = configuration(tmp_path, talking_llama)
    terminal, inside = pty.openpty()
    driver = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, runpy, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
         "runpy.run_module('flows.cli', run_name='__main__')", "run", str(config)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"},
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
    )  # fmt: skip
    os.close(inside)
    ledger = tmp_path / "runs" / "tiny" / "iteration-1" / "instructions-1" / "jobs" / "ledger.json"
    said = b""
    with suppress(OSError):  # raised if the terminal has no more processes
        while chunk := os.read(terminal, 4096):
            said += chunk
            if ledger.exists() and b"\x03" not in said:
                os.write(terminal, b"\x03")
                said += b"\x03"
    assert driver.wait() == 130
    text = said.decode()
    assert "cancelling the jobs of this run" in text
    assert "the jobs were cancelled, finished work is kept" in text
    assert "resume" in text.split("Resume with:")[1]
    assert not left_over(tmp_path)


INTERRUPTED_BEFORE_A_STAGE = """
import signal, sys
from contextlib import nullcontext
from pathlib import Path
from cluster.lock import only_driver
from flows.cli.interrupt import interruptible
from montessori_core.config import Cluster
folder, drives = Path(sys.argv[1]), len(sys.argv) == 2
def flow():
    with only_driver(folder) if drives else nullcontext():
        signal.raise_signal(signal.SIGINT)
interruptible(flow, folder, Cluster(), "montessori resume")
"""


def test_ctrl_c_ends_jobs_of_later_stages(shared_server: dict[str, str], tmp_path: Path) -> None:
    """The driver before was killed in a stage that this one has not reached. Jobs of another driver are left alone."""
    stage = squares.stage(tmp_path)
    stage.write(as_shards(*squares.SHARDS))
    ledger = Ledger(stage.folder / "jobs")
    with subprocess.Popen(["sleep", "600"]) as job:
        ids = [f"{job.pid}:{start_time(job.pid)}"]
        ledger.submissions = [Submission("of-a-killed-driver", "w", [[0]], platform.node(), 1, ids=ids)]
        ledger.save()

        def interrupted(*arguments: str) -> str:
            command = [sys.executable, "-c", INTERRUPTED_BEFORE_A_STAGE, str(tmp_path), *arguments]
            environment = os.environ | shared_server | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"}
            return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False).stdout

        try:
            with only_driver(tmp_path):
                output = interrupted("beside another driver")
            assert "some jobs of this run may still be running" in output
            assert "already has a driver" in output
            assert job.poll() is None
            output = interrupted()
            assert "the jobs were cancelled, finished work is kept" in output
            assert job.poll() == -signal.SIGKILL
        finally:
            job.kill()


@pytest.mark.guarantee("second driver on the same run")
def test_second_driver_on_a_run_is_refused(talking_llama: Path, shared_server: dict[str, str], tmp_path: Path) -> None:
    config = configuration(tmp_path, talking_llama)
    first = montessori("run", str(config), cwd=tmp_path, **shared_server)
    await_job(first, tmp_path / "runs" / "tiny" / "iteration-1" / "instructions-1")
    code, output = invoke("run", str(config), cwd=tmp_path)
    assert code == 1
    assert "this run already has a driver" in output
    code, output = invoke("status", "runs/tiny", cwd=tmp_path)
    assert f"driver: process {first.pid}" in output
    code, output = invoke("cancel", "runs/tiny", cwd=tmp_path)
    assert code == 0, output
    assert "cancelled; finished work is kept" in output
    said, _ = first.communicate(timeout=90)
    assert first.returncode == 130
    assert "the jobs were cancelled, finished work is kept" in said
    assert "resume" in said.split("Resume with:")[1]
    assert not left_over(tmp_path)
    code, output = invoke("cancel", "runs/tiny", cwd=tmp_path)
    assert "nothing of this run is running" in output
    code, output = invoke("status", "runs/tiny", cwd=tmp_path)
    assert "Resume with: montessori resume" in output


@pytest.mark.guarantee("driver killed at any moment")
@pytest.mark.slow
def test_driver_killed_while_joining_has_same_tables(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(finished_run / "runs" / "tiny", run)
    expected = digests(run)
    (run / "iteration-1" / "influence.parquet").unlink()
    (run / "iteration-1" / "preferences.parquet").unlink()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DIES_WHILE_JOINING, str(run)]
    driver = subprocess.run(command, cwd=tmp_path, env=environment, check=False)
    assert driver.returncode == -signal.SIGKILL
    assert not (run / "iteration-1" / "influence.parquet").exists()
    code, output = call("resume", str(run), cwd=tmp_path)
    assert code == 0, output
    assert digests(run) == expected
    assert not left_over(tmp_path)
