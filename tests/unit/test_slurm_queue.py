"""How the answers of squeue are read."""

import os
from pathlib import Path

import pytest

from cluster.backends.slurm import SlurmBackend
from montessori_core.config import Resources, Slurm
from support.slurm_lab import put_command


@pytest.mark.parametrize(
    ("reason", "alive"),
    [
        ("launch failed requeued held", False),
        ("launch_failed_requeued_held", False),
        ("launch failure limit exceeded requeued held", False),
        ("launch_failure_limit_exceeded_requeued_held", False),
        ("user env retrieval failed requeued held", False),
        ("JobHoldMaxRequeue", False),
        ("job requeued in held state", True),
        ("JobHeldUser", True),
        ("Priority", True),
        ("None", True),
    ],
)
def test_alive_leaves_out_jobs_that_slurm_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str, alive: bool
) -> None:
    """The reason differs between versions of Slurm. A job that its owner holds will run."""
    put_command(tmp_path / "bin" / "squeue", f"echo '17_0|{reason}'")
    put_command(tmp_path / "bin" / "sbatch", "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    backend = SlurmBackend(Slurm(), Resources(), None)
    assert backend.alive("name", ["17_0"]) == ({"17_0"} if alive else set())
