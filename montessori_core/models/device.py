"""The device for computation."""

import os
from typing import Any

import torch

from montessori_core.errors import UserError
from montessori_core.models.shape import GB


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
    deterministic in torch's strict mode alone; that mode would refuse models with any other such kernel. Memory that no
    kernel has written is not filled with NaN, which would write it twice: nothing reads it.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if not torch.cuda.is_available():
        return torch.device("cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property of the module
    return torch.device("cuda")


def take_gpu() -> None:
    """Make one of the GPUs that this process sees its own, for torch and for DeepSpeed, which reads LOCAL_RANK.

    The scheduler may show each process all GPUs of the job on its node, or only one, which then is number 0.
    """
    number = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
    os.environ["LOCAL_RANK"] = str(number)
    torch.cuda.set_device(number)


def check_memory(model: Any, bytes_per_weight: int, work: str) -> None:
    """Check that a GPU has memory for work that keeps so much of each trained weight there.

    Args:
        model: on its device; the check is for GPUs only.
        bytes_per_weight: of a trained weight, with the weight; others have their 4 bytes alone.
        work: what needs it.

    Raises:
        UserError: it has not.
    """
    if model.device.type != "cuda":
        return
    needed = sum(p.numel() * (bytes_per_weight if p.requires_grad else 4) for p in model.parameters())
    _, memory = torch.cuda.mem_get_info(model.device)
    if needed > memory:
        raise UserError(
            f"{work} keeps {needed / GB:.0f} GB on the GPU, {bytes_per_weight} bytes a trained weight, and the GPU has "
            f"{memory / GB:.0f} GB; use a GPU with more memory, a smaller student, or a LoRA student"
        )
