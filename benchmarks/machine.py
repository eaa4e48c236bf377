"""Describe the machine of a measurement, and measure its speed: `python benchmarks/machine.py`."""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from montessori_core.processor import generation_dtype, processor_name

_SIZE = 1024
_SECONDS = 1.0
_PACKAGES = ("torch", "transformers", "trl", "deepspeed", "vllm")


@dataclass(frozen=True)
class Speed:
    """Speed of a device: FLOP/s of a large matrix product, bytes per second of a large copy (read and written)."""

    flops: float
    bytes: float

    @staticmethod
    def of(device: torch.device, dtype: torch.dtype) -> "Speed":
        """Measure both."""
        return Speed(matmul_peak(device, dtype), copy_peak(device))


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a large matrix product."""
    size = 2048 if device.type == "cpu" else 8192
    left, right, product = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))
    return 2 * size**3 / min(timed(lambda: torch.mm(left, right, out=product), device) for _ in range(5))


def copy_peak(device: torch.device) -> float:
    """Measure the bytes per second, read and written, of a large copy within a device's memory."""
    source, target = torch.zeros(2, 1 << (28 if device.type == "cuda" else 22), device=device)
    # Not a clone: in deterministic mode torch fills a new tensor before the copy.
    seconds = min(timed(lambda: target.copy_(source), device) for _ in range(5))
    return float(2 * source.nbytes / seconds)


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one call."""
    started = now(device)
    function()
    return now(device) - started


def now(device: torch.device) -> float:
    """Return the time in seconds, after all work of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def describe_machine() -> str:
    """Return one line: processor, torch's threads and instruction set, speed of one core, dtype of generation."""
    instructions = torch.backends.cpu.get_cpu_capability()
    return (
        f"{processor_name()}, {torch.get_num_threads()} threads, {instructions}, {core_gflops():.0f} GFLOP/s in fp32 on "
        f"one core, generates in {generation_dtype()}"
    )


def describe_gpus() -> str:
    """Return one line: GPUs, and versions of CUDA, Python and the packages that are installed."""
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    gpu_text = f"{len(gpus)} x {gpus[0].name} of {gpus[0].total_memory / 2**30:.0f} GiB" if gpus else "no GPU"
    return f"{gpu_text}, CUDA {torch.version.cuda}, Python {platform.python_version()}, {', '.join(_versions())}"


def _versions() -> list[str]:
    versions = []
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return versions


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
    print(f"{describe_gpus()}; {describe_machine()}")  # noqa: T201
