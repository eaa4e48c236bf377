"""Run the Python code of a model's response: in namespaces of its own where the system has them, and with limits.

The code runs as the user's account. In namespaces it has no network, sees all files as read-only and an empty /run, writes
to an empty folder in memory, has no capabilities, and all its processes end with it. Without them only the limits hold, see
docs/security.md.
"""

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from montessori_core import programs
from montessori_core.data.rows import TaskRow
from montessori_core.data.tables import CODE_RUNS
from montessori_core.errors import UserError
from montessori_core.program import Recorder, RowProgram

RUNS, FAILS, LIMITS, NO_CODE = "runs", "fails", "limits", "no code"
"""Outcomes of a response's code."""
_BLOCK = re.compile(
    r"^([ \t]*)(```+|~~~+)[ \t]*(?:python|python3|py)[ \t]*\n(.*?)^[ \t]*\2[ \t]*$", re.DOTALL | re.MULTILINE | re.I
)
_FILE_BYTES = 16 * 2**20
_ISOLATED = (
    "--user",
    "--map-root-user",
    "--net",
    "--ipc",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount",
    "--mount-proc",
)
_LAUNCHER = """\
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def check(failed):
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
# mount_setattr(AT_FDCWD, "/", AT_RECURSIVE, MOUNT_ATTR_RDONLY): every file system, not only the root's.
check(libc.syscall(442, -100, b"/", 0x8000, struct.pack("QQQQ", 1, 0, 0, 0), 32))
if os.path.isdir("/run"):  # sockets of services, which a read-only file system does not close
    check(libc.mount(b"tmpfs", b"/run", b"tmpfs", 7, b"size=4k"))
check(libc.mount(b"tmpfs", sys.argv[1].encode(), b"tmpfs", 6, b"size=64m"))
os.chdir(sys.argv[1])
for capability in range(64):
    libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP: else the code could undo all this
check(libc.prctl(38, 1, 0, 0, 0))  # PR_SET_NO_NEW_PRIVS
program = os.fork()
if program == 0:
    os.execve(sys.executable, [sys.executable, *sys.argv[2:]], {})
code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
os._exit(code if code >= 0 else 128 - code)  # as a shell: unshare 2.38 does not report the signal that ended its child
"""


def python_code(response: str) -> str | None:
    """Return the Python code blocks of a response, joined in their order; None if there is none.

    As in Markdown, the indentation of a fence, such as that of a list, is removed from the lines of its block.
    """
    blocks = [
        re.sub(f"^[{indent}]{{,{len(indent)}}}", "", block, flags=re.MULTILINE) if indent else block
        for indent, _, block in _BLOCK.findall(response.replace("\r\n", "\n"))
    ]
    return "\n".join(blocks) if blocks else None


def run_code(code: str, settings: programs.CodeRuns) -> str:
    """Run a program; return RUNS, FAILS or LIMITS.

    Its input is empty and its output is not kept, since both are a model's.

    Raises:
        UserError: the system has no namespaces, and `need_isolation` is set.
    """
    if settings.need_isolation:
        check_isolation()
    isolated = has_namespaces()
    with tempfile.TemporaryDirectory(prefix="montessori-code-") as folder:
        # -I: neither environment variables nor the current folder change what is imported.
        program = ["-I", "-X", "utf8", "-c", code]
        command = [sys.executable, *program]
        if isolated:
            command = [
                str(shutil.which("unshare")),
                *_ISOLATED,
                sys.executable,
                "-I",
                "-c",
                _LAUNCHER,
                folder,
                *program,
            ]
        try:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_limiter(settings),
            )
        except ValueError:  # a NUL byte
            return FAILS
        except OSError as error:
            if error.errno != errno.E2BIG:  # the node's fault, such as no memory to fork
                raise
            return FAILS
        try:
            status = process.wait(2 * settings.seconds + 1)
        except subprocess.TimeoutExpired:
            return LIMITS
        finally:
            _kill_group(process.pid)
            process.wait()
    if status == 0:
        return RUNS
    ended_by = status - 128 if isolated else -status
    return LIMITS if ended_by in (signal.SIGKILL, signal.SIGXCPU, signal.SIGXFSZ) else FAILS


def check_isolation() -> None:
    """Check that this system has the namespaces of the sandbox.

    Raises:
        UserError: it has not.
    """
    if not has_namespaces():
        raise UserError(
            "synthesis.filters: code_runs: this node cannot keep the code from the network and your files (unshare does not "
            "work here); run it elsewhere, or accept that and set need_isolation: false"
        )


def _limiter(settings: programs.CodeRuns) -> Callable[[], None]:
    """Return the function that sets the limits in a child, or the node's own hard limits where they are lower."""
    wanted = {
        resource.RLIMIT_CPU: settings.seconds,
        resource.RLIMIT_AS: settings.memory_mb * 2**20,
        resource.RLIMIT_FSIZE: _FILE_BYTES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }
    hard = {name: resource.getrlimit(name)[1] for name in wanted}
    limits = {
        name: value if hard[name] == resource.RLIM_INFINITY else min(value, hard[name])
        for name, value in wanted.items()
    }

    def limit() -> None:
        for name, value in limits.items():
            resource.setrlimit(name, (value, value))

    return limit


def _kill_group(group: int) -> None:
    """End what a program has started; in a PID namespace the kernel has done so already."""
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


@cache
def has_namespaces() -> bool:
    """Return whether the system lets this account make the namespaces of the sandbox."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return False
    with tempfile.TemporaryDirectory(prefix="montessori-code-") as folder:
        command = [unshare, *_ISOLATED, sys.executable, "-I", "-c", _LAUNCHER, folder, "-I", "-c", ""]
        try:
            return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0
        except (OSError, subprocess.TimeoutExpired):
            return False


def open_code_runs(settings: programs.CodeRuns, inputs: Mapping[str, Path]) -> RowProgram[TaskRow]:
    """Run the code of responses, one after the other. No inputs; the result is a table of schema `CODE_RUNS`."""

    def compute(rows: list[TaskRow], recorder: Recorder) -> None:
        recorder.progress(0)
        for position, row in enumerate(rows):
            code = python_code(row["response"])
            outcome = NO_CODE if code is None else run_code(code, settings)
            recorder.finish(position, [{"example_id": row["example_id"], "outcome": outcome}])
            recorder.progress(position + 1)

    return RowProgram(CODE_RUNS, compute)
