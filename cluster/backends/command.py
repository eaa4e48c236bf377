"""Run a command of the machine or of Slurm."""

import subprocess


def run_command(*command: str, timeout: float = 120.0) -> str | None:
    """Return the output of a command; None if it fails or takes longer than `timeout` seconds."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
