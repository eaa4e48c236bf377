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
    """Return the GPU of this process, or the CPU; multiply fp32 numbers in fp32, and choose deterministic kernels.

    TF32 keeps 10 bits of a number. cuDNN uses it by default, and cuBLAS if an image sets TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, as
    NVIDIA's do.

    Kernels without a deterministic alternative only cause a warning. So does the backward pass of fused attention, which is
    deterministic in torch's strict mode alone; that mode would refuse models with any other such kernel.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if not torch.cuda.is_available():
        return torch.device("cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    return torch.device("cuda")
