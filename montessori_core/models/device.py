"""The device that models compute on."""

import os

import torch


def compute_device() -> torch.device:
    """The GPU of this process if it has one, else the CPU. On a GPU, kernels are chosen that repeat to the last bit."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    return torch.device("cuda")
