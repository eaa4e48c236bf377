"""The device for computation."""

import os
import subprocess
import sys

import pytest
import torch

from montessori_core.training.engine import take_gpu
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


@pytest.mark.parametrize(("visible", "rank", "number"), [(8, 3, 3), (1, 3, 0)], ids=["GPUs of the job", "own GPU"])
def test_training_takes_visible_gpu(visible: int, rank: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed takes the GPU of the number LOCAL_RANK."""
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    take_gpu()
    assert [int(os.environ["LOCAL_RANK"])] == taken == [number]
