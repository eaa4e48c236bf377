"""The sandbox of the filter code_runs: what the code of a response can and cannot do."""

import os
import socket
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
from support import ROOT, wait_until
from support.row_programs import as_compute

SETTINGS = programs.CodeRuns(seconds=1, memory_mb=512, need_isolation=False)
LIMIT_OF_CPU = "import resource\nassert resource.getrlimit(resource.RLIMIT_CPU) == (1, 1)\n"
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
        ("import os, signal; os.kill(os.getpid(), signal.SIGXCPU)", LIMITS),
    ],
)
def test_outcome_of_code(code: str, outcome: str) -> None:
    assert run_code(code, SETTINGS) == outcome


def test_code_too_long_for_a_command_line_fails() -> None:
    assert run_code("a = 1\n" * 50_000, SETTINGS) == FAILS


@pytest.fixture(params=[pytest.param(True, marks=ISOLATED, id="isolated"), pytest.param(False, id="not isolated")])
def isolated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the test's code runs in namespaces."""
    if not request.param:
        monkeypatch.setattr(sandbox, "has_namespaces", lambda: False)
    return bool(request.param)


@pytest.mark.guarantee("code in a response that the filter code_runs runs")
@pytest.mark.parametrize(
    ("code", "below", "above", "outcome"),
    [
        (f"{LIMIT_OF_CPU}import time\nwhile time.process_time() < {{}}: pass", 0.1, 1.5, LIMITS),
        ("bytearray({} * 2**20)", 256, 512, FAILS),
        ("open('x', 'wb').write(bytes({} * 2**20))", 16, 17, FAILS),
        ("files = [open('/dev/null') for _ in range({})]", 32, 64, FAILS),
        ("import resource\nassert resource.getrlimit(resource.RLIMIT_CORE)[1] < {}", 1, 0, FAILS),
    ],
    ids=["seconds", "memory", "file size", "open files", "core file"],
)
def test_limits_hold(code: str, below: float, above: float, outcome: str, isolated: bool) -> None:
    assert run_code(code.format(below), SETTINGS) == RUNS
    assert run_code(code.format(above), SETTINGS) == outcome


@pytest.mark.guarantee("code in a response that the filter code_runs runs")
def test_environment_is_empty(isolated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code = "import os\nassert not [name for name in os.environ if name != 'LC_CTYPE'], dict(os.environ)"
    assert run_code(code, SETTINGS) == RUNS


@ISOLATED
@pytest.mark.guarantee("code in a response that the filter code_runs runs")
@pytest.mark.parametrize(
    "attempt",
    [
        "open(victim, 'w')",
        "import os; os.remove(victim)",
        "open(f'/dev/shm/{os.path.basename(victim)}', 'w')  # another file system",
        "import socket; socket.create_connection(('127.0.0.1', port), 2)",
        "import socket; socket.socket(socket.AF_UNIX).connect(f'\\0{os.path.basename(victim)}')",
        "os.kill(process, 0)",
        "open(f'/proc/{process}/cmdline')",
        "assert os.readlink('/proc/self/ns/ipc') == ipc",
        "assert os.stat('/run').st_dev == run  # sockets of services",
        "for _ in range(5): tempfile.NamedTemporaryFile(dir='.', delete=False).write(bytes(15 * 2**20))",
    ],
)
def test_isolation_denies(attempt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt succeeds without isolation."""
    victim = tmp_path / f"victim-{os.getpid()}"
    victim.write_text("kept")
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as abstract,
        subprocess.Popen(["sleep", "600"]) as process,
    ):
        abstract.bind(f"\0{victim.name}")
        abstract.listen()
        values = {
            "victim": str(victim),
            "port": server.getsockname()[1],
            "process": process.pid,
            "ipc": os.readlink("/proc/self/ns/ipc"),
            "run": os.stat("/run").st_dev,
        }
        code = "\n".join(["import os, tempfile", *(f"{name} = {value!r}" for name, value in values.items()), attempt])
        try:
            assert run_code(code, SETTINGS) == FAILS
            assert victim.read_text() == "kept"
            monkeypatch.setattr(sandbox, "has_namespaces", lambda: False)
            assert run_code(code, SETTINGS) == RUNS
        finally:
            process.kill()
            Path("/dev/shm", victim.name).unlink(missing_ok=True)


@ISOLATED
@pytest.mark.guarantee("code in a response that the filter code_runs runs")
def test_isolated_code_has_no_capabilities() -> None:
    """With CAP_SYS_ADMIN it could make the files writable again."""
    undo = (
        "import ctypes, os, struct\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.syscall(442, -100, b'/', 0x8000, struct.pack('QQQQ', 0, 1, 0, 0), 32) == -1\n"
        "assert ctypes.get_errno() == 1  # EPERM\n"
    )
    status = (
        "status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "assert [int(status[f'Cap{kind}'], 16) for kind in ('Inh', 'Prm', 'Eff', 'Bnd', 'Amb')] == [0] * 5\n"
        "assert int(status['NoNewPrivs']) == 1\n"
    )
    assert run_code(undo + status, SETTINGS) == RUNS


@pytest.mark.guarantee("code in a response that the filter code_runs runs")
@pytest.mark.parametrize("ending", ["", "; import time; time.sleep(60)"], ids=["in time", "too late"])
def test_child_processes_end_with_the_code(isolated: bool, ending: str) -> None:
    marker = f"4242.{os.getpid()}"
    code = (
        "import subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', '{marker}'],"
        f" start_new_session={isolated}){ending}"
    )
    assert run_code(code, SETTINGS) == (LIMITS if ending else RUNS)
    wait_until(
        lambda: not any(marker in (process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])), 10
    )


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
