"""Matrix-multiplication speed of this machine, the basis for time estimates."""

import os
import subprocess
import sys
import time

_SIZE = 1024
_SECONDS = 0.7


def measure_gflops(threads: int) -> float | None:
    """Return torch's GFLOP/s in a 1024 x 1024 fp32 matrix product on `threads` cores; None if torch is missing.

    The measurement runs in a separate process, like local jobs: the driver does not load torch.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    outcome = subprocess.run(
        [sys.executable, "-P", "-m", __name__], env=environment, capture_output=True, text=True, check=False
    )
    return float(outcome.stdout) if outcome.returncode == 0 else None


def usable_cores() -> int:
    """Return how many of this machine's cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _measure() -> float:
    """Return the rate of the fastest tenth of products: the warm process imports its libraries at the same time."""
    import torch

    left, right = torch.rand(2, _SIZE, _SIZE)
    seconds = []
    started = time.perf_counter()
    while time.perf_counter() < started + _SECONDS:
        before = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - before)
    return 2 * _SIZE**3 / sorted(seconds)[len(seconds) // 10] / 1e9


if __name__ == "__main__":
    sys.stdout.write(str(_measure()))
