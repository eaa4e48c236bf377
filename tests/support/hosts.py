"""Two hosts on this machine: Linux namespaces give each a host name and processes of its own; they share files."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from support import ROOT, wait_until

_ISOLATED = ["--user", "--map-current-user", "--keep-caps", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
_INIT = """
import ctypes, os, socket, sys, time
_, name, hosts = sys.argv
socket.sethostname(name)
with open(hosts, "w") as file:
    file.write(f"127.0.0.1 localhost {name}\\n")
bind = 4096
if ctypes.CDLL(None, use_errno=True).mount(hosts.encode(), b"/etc/hosts", None, bind, None):  # srun looks its host up
    raise OSError(ctypes.get_errno(), "mount")
print("up", flush=True)
while True:
    try:
        os.wait()
    except ChildProcessError:
        time.sleep(0.1)
"""


class Host:
    """A host on which tests start commands, until it crashes."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        init = [sys.executable, "-c", _INIT, name, str(folder / f"hosts-{name}")]
        self._outer = subprocess.Popen(["unshare", *_ISOLATED, *init], stdout=subprocess.PIPE, text=True)
        assert self._outer.stdout is not None
        assert self._outer.stdout.readline() == "up\n"
        [init] = psutil.Process(self._outer.pid).children()
        self._init = init.pid
        self._enter = [
            "nsenter",
            f"--target={init.pid}",
            "--user",
            "--uts",
            "--pid",
            "--mount",
            "--preserve-credentials",
        ]

    def start(self, command: list[str], cwd: Path, **options: Any) -> "subprocess.Popen[str]":
        """Start a command, as Popen does."""
        inside = ["sh", "-c", 'cd "$0" && exec "$@"', str(cwd), *command]
        return subprocess.Popen([*self._enter, *inside], text=True, start_new_session=True, **options)

    def montessori(self, *arguments: str, cwd: Path, **environment: str) -> "subprocess.Popen[str]":
        """Start a command line of ours."""
        return self.start(
            [sys.executable, "-m", "flows.cli", *arguments],
            cwd,
            env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def call(self, *arguments: str, cwd: Path, seconds: float = 600, **environment: str) -> tuple[int, str]:
        """Run a command line of ours; return its exit status and output."""
        process = self.montessori(*arguments, cwd=cwd, **environment)
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, " ".join(output.split())

    def kill(self, process: int) -> None:
        """Kill a process by its id on this host."""
        subprocess.run([*self._enter, "sh", "-c", f"kill -KILL {process}"], check=True)

    def crash(self) -> None:
        """End the host and all its processes at once."""
        self._outer.kill()
        self._outer.wait()
        wait_until(lambda: not psutil.pid_exists(self._init), 30)


def _can_isolate() -> bool:
    if not all(map(shutil.which, ("unshare", "nsenter"))):
        return False
    return subprocess.run(["unshare", *_ISOLATED, "true"], capture_output=True, check=False).returncode == 0


@pytest.fixture
def logins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    """Two login nodes."""
    if not _can_isolate():
        pytest.skip("this system has no namespaces for users without privileges")
    folder = tmp_path_factory.mktemp("hosts")
    hosts = Host("login1", folder), Host("login2", folder)
    yield hosts
    for host in hosts:
        host.crash()
