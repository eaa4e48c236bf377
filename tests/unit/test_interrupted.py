"""A killed run of the tests is continued."""

import os
import subprocess
import sys
from pathlib import Path

_TESTS = """
import os, signal
from pathlib import Path
import pytest

@pytest.mark.parametrize("number", range(6))
def test_count(number):
    with open("ran", "a") as file:
        file.write(f"{number}\\n")
    if number == 3 and Path("kill").exists():
        Path("kill").unlink()
        os.kill(os.getppid() if os.environ.get("PYTEST_XDIST_WORKER") else os.getpid(), signal.SIGKILL)
    assert number != 5 or Path("good").exists()
"""


def run_tests(folder: Path, *options: str) -> tuple[int, list[str], str]:
    (folder / "ran").write_text("")
    # Without the variables of a worker of xdist that runs this test: the inner test would kill it.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "support.interrupted", "--continue-interrupted", *options, "test_it.py"],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, sorted((folder / "ran").read_text().split()), done.stdout


def test_killed_run_continues_and_ended_run_starts_over(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text(_TESTS)
    (tmp_path / "kill").touch()
    options = ("-p", "no:xdist", "-p", "no:randomly")
    assert run_tests(tmp_path, *options)[1] == ["0", "1", "2", "3"]
    code, ran, output = run_tests(tmp_path, *options)
    assert (code, ran) == (1, ["3", "4", "5"])
    assert "continuing a killed run: 3 tests passed in it" in output
    assert run_tests(tmp_path, *options)[1] == list("012345")

    (tmp_path / "kill").touch()
    run_tests(tmp_path, *options)
    (tmp_path / "good.py").touch()  # another file: what passed may fail now
    assert run_tests(tmp_path, *options)[1] == list("012345")


def test_workers_continue_killed_run(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text(_TESTS)
    (tmp_path / "good").touch()
    (tmp_path / "kill").touch()
    first = run_tests(tmp_path, "-n", "1")[1]
    code, ran, _ = run_tests(tmp_path, "-n", "1")
    assert code == 0
    assert set(first) | set(ran) == set("012345")
    assert not {"0", "1"} & set(ran)
