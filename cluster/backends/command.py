"""Commands of the machine and of Slurm, asked with patience."""

import subprocess


def ask(*command: str, timeout: float = 120.0) -> str | None:
    """What a command of Slurm answers within `timeout` seconds; None if it cannot tell."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
