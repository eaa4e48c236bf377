"""The Slurm cluster of the tests: `docker/slurm/lab.sh` runs two nodes on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT

LAB = ROOT / "docker" / "slurm"


def call_lab(*arguments: str) -> str:
    call = subprocess.run([LAB / "lab.sh", *arguments], capture_output=True, text=True)
    assert call.returncode == 0, call.stderr
    return call.stdout


def command_of(module: str, call: str) -> list[str]:
    """Return the command of a new Python process that evaluates a call in a module of Slurm's tests, named `t`."""
    folders = [str(ROOT / "tests"), str(ROOT / "tests" / "system" / "slurm")]
    code = f"import sys; sys.path[:0] = {folders!r}\nfrom pathlib import Path; import {module} as t\n{call}"
    return [sys.executable, "-c", code]


def queued(*options: str) -> list[str]:
    return subprocess.run(
        ["squeue", "--noheader", "--array", "--me", *options], capture_output=True, text=True, check=True
    ).stdout.split()


def are_idle() -> bool:
    """Whether both nodes are idle; drained ones are resumed first."""
    command = ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T"]
    states = dict(line.split() for line in subprocess.run(command, capture_output=True, text=True).stdout.splitlines())
    for node in states:
        if states[node] == "drained":
            subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], check=True)
    return states == {"node1": "idle", "node2": "idle"}


def preempt() -> None:
    """Submit a job for both nodes to the partition of higher priority."""
    command = ["sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    subprocess.run(command, check=True, capture_output=True)


def put_command(path: Path, line: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def become_login_node(monkeypatch: pytest.MonkeyPatch, folder: Path, **commands: str) -> None:
    """Put Slurm's commands first in PATH; sbatch and srun, which the driver looks for, fail if they are not given."""
    for name, script in {"sbatch": "exit 1", "srun": "exit 1", **commands}.items():
        put_command(folder / "bin" / name, script)
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)
