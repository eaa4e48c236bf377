"""The server of `montessori up` does not block when the garbage collector closes an SQLite cursor."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT

PROGRAM = """
import sqlite3, sys, threading, time
from flows.prefect_server import collect_in_thread

if sys.argv[1] == "beside":
    collect_in_thread(pause=0.05)
writing, holding = (sqlite3.connect(sys.argv[2], 10, check_same_thread=False, isolation_level=None) for _ in range(2))
writing.execute("PRAGMA journal_mode = WAL")
writing.execute("CREATE TABLE rows (row)")
cycle = [writing.execute("SELECT 1")]  # a cursor that nobody reads on
cycle.append(cycle)
holding.execute("BEGIN IMMEDIATE")
writer = threading.Thread(target=lambda: writing.execute("INSERT INTO rows VALUES (1)"))
writer.start()
time.sleep(0.5)
del cycle
begun = time.monotonic()
while time.monotonic() < begun + 1:  # what an event loop does before it comes to the commit
    [[]].append([{}])
    garbage = []
    garbage.append(garbage)
print(time.monotonic() - begun)
holding.execute("COMMIT")
writer.join()
"""


@pytest.mark.parametrize(
    ("collector", "stands_still"),
    [("beside", False), pytest.param("its own", True, marks=pytest.mark.slow)],
)
def test_abandoned_sqlite_cursor_does_not_block_event_loop(tmp_path: Path, collector: str, stands_still: bool) -> None:
    """The second case shows that Python's collector blocks: once it does not, our workaround is unnecessary."""
    command = [sys.executable, "-c", PROGRAM, collector, str(tmp_path / "database")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = float(ended.stdout)
    assert (seconds > 5) == stands_still
    # "database is locked", unless the collector closes the connection before the writer asks for the reason.
    gave_up = re.search("sqlite3.OperationalError: (database is locked|not an error)", ended.stderr)
    assert (gave_up is not None) == stands_still
