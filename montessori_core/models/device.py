"""The device for computation."""

import os

import torch


def check_gpus(wanted: int) -> None:
    """Check that a job that asked for GPUs sees one: on a node with a broken driver, torch would use the CPU for days.

    A build of torch without CUDA is left alone, because `doctor` reports it.

    Raises:
        RuntimeError: torch is built for CUDA, and sees no GPU.
    """
    if torch.backends.cuda.is_built() and not torch.cuda.is_available():
        raise RuntimeError(
            f"No CUDA GPUs are available, although the job asked for {wanted} on each node "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}); see nvidia-smi there"
        )


def compute_device() -> torch.device:
    """Return the GPU of this process, or the CPU. On a GPU, enable deterministic kernels."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    return torch.device("cuda")
