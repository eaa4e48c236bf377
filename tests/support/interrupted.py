"""Continue an interrupted run of the tests: option `--continue-interrupted`, as in `make test`.

A run keeps the ids of the tests that passed; a run that ends by itself removes them. After a kill, the next run of the same
files and of the same tier deselects them.
"""

import fcntl
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest

_HASHED = (
    *("montessori_core", "montessori_report", "cluster", "tasks", "flows", "tests", "benchmarks", "docs", "docker"),
    *("requirements", ".ci"),
)
_ENDED = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--continue-interrupted", action="store_true", help="skip what passed in a killed run of the same files"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--continue-interrupted"):
        config.pluginmanager.register(_Continuation(config))


class _Continuation:
    """Records the tests that pass, and deselects those that passed before the kill."""

    def __init__(self, config: pytest.Config) -> None:
        self._passed = config.cache.mkdir("interrupted") / "passed"
        self._is_worker = hasattr(config, "workerinput")
        self._called: set[str] = set()
        if self._is_worker:
            self._earlier = frozenset(config.workerinput["earlier"])
            return
        self._lock = (self._passed.parent / "lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise pytest.UsageError(
                "another run of the tests is under way in this checkout; wait for its end"
            ) from None
        key = _hash_files(config.rootpath) + (" all" if config.getoption("--all", False) else "")
        lines = self._passed.read_text().splitlines() if self._passed.exists() else []
        self._earlier = frozenset(lines[1:] if lines[:1] == [key] else [])
        if not self._earlier:
            self._passed.write_text(f"{key}\n")

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Give a worker of xdist what the main process found; all workers must collect the same tests."""
        node.workerinput["earlier"] = sorted(self._earlier)

    def pytest_report_header(self) -> list[str]:
        if not self._earlier:
            return []
        return [
            f"continuing a killed run: {len(self._earlier)} tests passed in it (to start over, delete {self._passed})"
        ]

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        earlier = [item for item in items if item.nodeid in self._earlier]
        items[:] = [item for item in items if item.nodeid not in self._earlier]
        config.hook.pytest_deselected(items=earlier)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self._called.add(report.nodeid)
        elif report.when == "teardown" and report.passed and report.nodeid in self._called and not self._is_worker:
            with self._passed.open("a") as file:
                file.write(f"{report.nodeid}\n")

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if not self._is_worker and exitstatus in _ENDED:
            self._passed.unlink(missing_ok=True)


def _hash_files(root: Path) -> str:
    """Return a hash of the interpreter, of the seed of drawn examples, and of the files on which tests depend."""
    digest = hashlib.sha256(f"{sys.executable} {os.environ.get('MONTESSORI_TEST_SEED')}".encode())
    files = [file for folder in _HASHED for file in (root / folder).rglob("*") if file.is_file()]
    patterns = ("*.py", "*.toml", "*.md", "*.yml", "Makefile", ".dockerignore")
    at_root = [file for pattern in patterns for file in root.glob(pattern)]
    for file in sorted([*files, *at_root]):
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()
