"""Run a command of the machine or of Slurm."""

import os
import subprocess

_OPTIONS = ("SACCT_", "SCANCEL_", "SCONTROL_", "SINFO_", "SQUEUE_")
"""Prefixes of variables that are options of Slurm's commands: SQUEUE_PARTITION hides jobs, SCANCEL_INTERACTIVE asks."""


def run_command(*command: str, timeout: float = 120.0) -> str | None:
    """Return the output of a command; None if it fails or takes longer than `timeout` seconds."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_OPTIONS)}
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=True, env=environment
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
