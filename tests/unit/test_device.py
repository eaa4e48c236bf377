"""The device for computation."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from montessori_core.errors import UserError
from montessori_core.models.device import check_memory, take_gpu
from support import ROOT

PROGRAM = """
import torch
from montessori_core.models.device import compute_device

def flags():
    matmul = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32
    return *matmul, torch.backends.cudnn.allow_tf32

assert flags() == ("high", True, True), flags()
compute_device()
assert flags() == ("highest", False, False), flags()
"""


def test_compute_device_turns_tf32_off() -> None:
    """Images of NVIDIA set this variable; torch reads it when it is imported."""
    environment = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, check=True)


DETERMINISTIC = """
import torch
from montessori_core.models.device import compute_device
torch.cuda.is_available = lambda: True
assert compute_device().type == "cuda"
assert torch.are_deterministic_algorithms_enabled()
assert not torch.empty(100000).isnan().all()
"""


def test_deterministic_mode_does_not_fill_new_tensors() -> None:
    subprocess.run([sys.executable, "-c", DETERMINISTIC], cwd=ROOT, check=True)


def test_work_that_does_not_fit_the_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [torch.nn.Parameter(torch.empty(n, device="meta"), requires_grad=n == 10**9) for n in (10**9, 10**8)]
    model = SimpleNamespace(device=torch.device("cuda"), parameters=lambda: weights)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 12_400_000_000))
    check_memory(model, 12, "the work")
    with pytest.raises(
        UserError, match="the work keeps 13 GB on the GPU, 13 bytes a trained weight, and the GPU has 12 GB"
    ):
        check_memory(model, 13, "the work")


@pytest.mark.parametrize(("visible", "rank", "number"), [(8, 3, 3), (1, 3, 0)], ids=["GPUs of the job", "own GPU"])
def test_training_takes_visible_gpu(visible: int, rank: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed takes the GPU of the number LOCAL_RANK."""
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    take_gpu()
    assert [int(os.environ["LOCAL_RANK"])] == taken == [number]
