"""The device for computation."""

import os

import torch


def compute_device() -> torch.device:
    """Return the GPU of this process, or the CPU. On a GPU, enable deterministic kernels."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    return torch.device("cuda")
