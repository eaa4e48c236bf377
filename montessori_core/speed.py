"""How fast this machine multiplies matrices: what the seconds of a run are estimated from."""

import os
import subprocess
import sys
import time

_SIZE = 1024
_SECONDS = 0.7


def measure_gflops(threads: int) -> float | None:
    """Return the GFLOP/s of torch in a 1024 x 1024 fp32 matrix product on `threads` cores; None where there is no torch.

    A process of its own measures, as local jobs are started: the driver has no torch.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    outcome = subprocess.run(
        [sys.executable, "-m", __name__], env=environment, capture_output=True, text=True, check=False
    )
    return float(outcome.stdout) if outcome.returncode == 0 else None


def _measure() -> float:
    """Return the rate of the fastest tenth: the warm process imports its libraries at the same time."""
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
