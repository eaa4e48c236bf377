"""The device for computation."""

import os
import subprocess
import sys

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
