"""The sandbox of the filter code_runs: what the code of a response can and cannot do."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from montessori_core import programs
from montessori_core.data.tables import CODE_RUNS, read_table
from montessori_core.errors import UserError
from montessori_core.synthesis import sandbox
from montessori_core.synthesis.sandbox import FAILS, LIMITS, NO_CODE, RUNS, has_namespaces, python_code, run_code
from support import ROOT
from support.row_programs import as_compute

SETTINGS = programs.CodeRuns(seconds=2, memory_mb=512, need_isolation=False)
ISOLATED = pytest.mark.skipif(not has_namespaces(), reason="the system has no namespaces")


def block(code: str) -> str:
    return f"Here it is:\n```python\n{code}\n```\nDone."


@pytest.mark.parametrize(
    ("response", "code"),
    [
        (block("a = 1"), "a = 1\n"),
        (f"{block('a = 1')}\n~~~py\nb = a\n~~~", "a = 1\n\nb = a\n"),
        ("```\na = 1\n```", None),
        ("```bash\nls\n```", None),
        ("```python\nnever closed", None),
        ("  ````Python\n```\n  ````", "```\n"),
        ("1. Run:\n   ```python\n   if a:\n       b = 1\n\n   c = 2\n   ```", "if a:\n    b = 1\n\nc = 2\n"),
        ("  ```python\nif a:\n\tb = 1\n  ```", "if a:\n\tb = 1\n"),
        (block("if a:\n    b = 1").replace("\n", "\r\n"), "if a:\n    b = 1\n"),
        ("", None),
    ],
)
def test_code_blocks_are_found(response: str, code: str | None) -> None:
    assert python_code(response) == code


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("import math\nassert math.sqrt(4) == 2\nprint('é')", RUNS),
        ("open('x', 'w').write('1'); assert open('x').read() == '1'", RUNS),
        ("1 / 0", FAILS),
        ("def (", FAILS),
        ("import sys; sys.exit(3)", FAILS),
        ("input()", FAILS),
        ("a = '\x00'", FAILS),
        ("while True: pass", LIMITS),
        ("import os, signal; os.kill(os.getpid(), signal.SIGXCPU)", LIMITS),
        ("import time; time.sleep(60)", LIMITS),
        ("a = bytearray(2**31)", FAILS),
        ("import os\nassert not [name for name in os.environ if name != 'LC_CTYPE'], dict(os.environ)", RUNS),
    ],
)
def test_outcome_of_code(code: str, outcome: str) -> None:
    assert run_code(code, SETTINGS) == outcome


def test_code_too_long_for_a_command_line_fails() -> None:
    assert run_code("a = 1\n" * 50_000, SETTINGS) == FAILS


@ISOLATED
@pytest.mark.guarantee("code in a response that the filter code_runs runs")
def test_isolated_code_has_neither_network_nor_files(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("kept")
    for attempt in (
        f"open({str(victim)!r}, 'w')",
        f"import os; os.remove({str(victim)!r})",
        "import socket; socket.create_connection(('127.0.0.1', 22), 2)",
        "import ctypes, os, struct\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.syscall(442, -100, b'/', 0x8000, struct.pack('QQQQ', 0, 1, 0, 0), 32) == 0",
    ):
        assert run_code(attempt, SETTINGS) == FAILS, attempt
    assert victim.read_text() == "kept"
    assert run_code("import os\nassert os.listdir('/run') == []  # sockets of services", SETTINGS) == RUNS


@ISOLATED
def test_child_processes_end_with_the_code() -> None:
    marker = f"4242.{os.getpid()}"
    code = (
        "import subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', '{marker}'], start_new_session=True)"
    )
    assert run_code(code, SETTINGS) == RUNS
    assert [process for process in psutil.process_iter(["cmdline"]) if marker in (process.info["cmdline"] or [])] == []


def test_lower_hard_limits_of_the_node_hold() -> None:
    code = (
        "import resource\nfrom montessori_core import programs\nfrom montessori_core.synthesis.sandbox import run_code\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))\n"
        "settings = programs.CodeRuns(seconds=2, memory_mb=512, need_isolation=False)\n"
        "print(run_code('import resource; assert resource.getrlimit(resource.RLIMIT_NOFILE) == (60, 60)', settings))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.stdout.strip() == RUNS, ended.stderr


def test_system_without_namespaces_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "has_namespaces", lambda: False)
    assert run_code("1", SETTINGS) == RUNS
    with pytest.raises(UserError, match="this node cannot keep the code from the network .* need_isolation: false"):
        run_code("1", SETTINGS.model_copy(update={"need_isolation": True}))


def test_program_records_an_outcome_per_response(tmp_path: Path) -> None:
    responses = [block("a = 1"), block("a ="), "No code."]
    rows = [{"example_id": str(n), "instruction": "i", "response": text} for n, text in enumerate(responses)]
    as_compute(sandbox.open_code_runs(SETTINGS, {}))(rows, tmp_path / "part.parquet", lambda done: None)
    assert read_table(tmp_path / "part.parquet", CODE_RUNS)["outcome"].to_pylist() == [RUNS, FAILS, NO_CODE]
