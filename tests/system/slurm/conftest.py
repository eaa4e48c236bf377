"""A Slurm cluster for each file of tests in this folder."""

import os
import shlex
import subprocess
from collections.abc import Iterator

import pytest

from support import wait_until
from support.slurm_lab import LAB, are_idle, call_lab


@pytest.fixture(scope="module", autouse=True)
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A running cluster for Slurm's commands. Tests fail if Slurm is missing and cannot be installed."""
    installation = subprocess.run([LAB / "install.sh"], capture_output=True, text=True)
    if installation.returncode:
        pytest.fail(f"these tests need Slurm:\n{installation.stderr.strip()}", pytrace=False)
    with pytest.MonkeyPatch.context() as environment:
        for name in list(os.environ):
            if name.startswith(("SLURM", "SBATCH", "SRUN", "SQUEUE", "SCANCEL")):
                environment.delenv(name)  # if this machine belongs to a cluster
        settings = {"LAB": tmp_path_factory.mktemp("slurm"), "NODES": 2, "CPUS": 8, "MEMORY": 16000, "GPUS": 2}
        for name, value in settings.items():
            environment.setenv(name, str(value))
        try:
            call_lab("start")
            name, _, path = shlex.split(call_lab("env"))[1].partition("=")
            environment.setenv(name, path)
            yield
        finally:
            call_lab("stop")


@pytest.fixture(autouse=True)
def empty_queue(lab: None) -> Iterator[None]:
    """Empty the queue after each test."""
    yield
    subprocess.run(["scancel", "--me"], check=True)
    wait_until(are_idle, 60)
