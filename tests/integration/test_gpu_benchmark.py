"""The GPU benchmark: it refuses to run without a GPU; its checks pass, and can fail, on the CPU."""

import importlib
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from montessori_core.influence import ResidentStudent
from support import ROOT

CPU = torch.device("cpu")


@pytest.mark.slow
def test_benchmark_without_gpu_prints_one_sentence() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    outcome = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert outcome.returncode == 1
    assert "start it on a machine with CUDA" in outcome.stderr
    assert "Traceback" not in outcome.stderr


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu")


def test_agreement_compares_values_and_ranks(gpu: Any) -> None:
    values = [0.0, 1.0, 2.0, 3.0]
    assert gpu.agreement("", [v + 0.01 for v in values], values, 3.0, 0.01).good
    assert not gpu.agreement("", [v + 0.1 for v in values], values, 3.0, 0.01).good
    assert not gpu.agreement("", [0.0, 2.0, 1.0, 3.0], values, 3.0, 0.5).good


@pytest.mark.slow
def test_checks_pass_and_are_written(gpu: Any, tiny_llama: Path, tmp_path: Path) -> None:
    warm = gpu.warm_up(tiny_llama, CPU, steps=4, references=5, probing=16)
    checks = [*gpu.check_influence(warm, CPU), gpu.check_sharded_training(tiny_llama, gpus=1)]
    assert [check.good for check in checks] == [True] * 5 + [None], checks
    gpu.append(tmp_path / "page.md", gpu.heading(gpu.hardware()))
    for check in checks:
        gpu.append(tmp_path / "page.md", check.row())
    section = (tmp_path / "page.md").read_text()
    assert section.startswith("\n## On a GPU\n")
    assert f"torch {version('torch')}" in section
    assert section.count("| yes |") == 5
    assert section.endswith("| not checked | needs two GPUs, 1 here |\n")


@pytest.mark.slow
def test_benchmark_yields_lines_as_they_are_printed(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)  # set by commands that other tests call in this process
    options = ["--shapes", "tiny", "--estimators", "linear", "first_order", "--dtypes", "float32", "--references", "4"]
    rows = [line for line in gpu.run_benchmark("influence_shapes.py", *options) if line.startswith("| tiny")]
    assert len(rows) == 2
    with pytest.raises(SystemExit, match="failed"):
        list(gpu.run_benchmark("influence_shapes.py", "--shapes", "huge"))


def test_unrestored_student_fails_checks(gpu: Any, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warm = gpu.warm_up(tiny_llama, CPU, steps=2, references=3, probing=3)
    monkeypatch.setattr(ResidentStudent, "restore", lambda self: None)
    assert next(iter(gpu.check_influence(warm, CPU))).good is False
