"""Describe the machine of a measurement: `python benchmarks/machine.py`."""

import time

import torch

from montessori_core.processor import generation_dtype, processor_name

_SIZE = 1024
_SECONDS = 1.0


def describe_machine() -> str:
    """Return one line: processor, torch's threads and instruction set, speed of one core, dtype of generation."""
    instructions = torch.backends.cpu.get_cpu_capability()
    return (
        f"{processor_name()}, {torch.get_num_threads()} threads, {instructions}, {core_gflops():.0f} GFLOP/s in fp32 on "
        f"one core, generates in {generation_dtype()}"
    )


def core_gflops() -> float:
    """Return the best GFLOP/s of fp32 products of 1024 x 1024 matrices on one core, measured for a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    left, right = torch.randn(2, _SIZE, _SIZE).unbind()
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < _SECONDS:
        started = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - started)
    torch.set_num_threads(threads)
    return 2 * _SIZE**3 / best / 1e9


if __name__ == "__main__":
    print(describe_machine())  # noqa: T201
