"""The dtype of generation depends on the processor's instructions; choosing it needs no torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from montessori_core import processor


@pytest.mark.parametrize(
    ("cpuinfo", "limit", "expected"),
    [
        ("flags : fpu avx2 avx512f avx512_bf16", {}, "bfloat16"),
        ("flags : fpu avx512f amx_bf16", {}, "bfloat16"),
        ("Features : fp asimd bf16 sve", {}, "bfloat16"),
        ("flags : fpu avx2 avx512f", {}, "float32"),
        ("flags : avx512_bf16", {"ATEN_CPU_CAPABILITY": "avx2"}, "float32"),
        ("flags : avx512_bf16", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "float32"),
        ("flags : avx512_bf16", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "bfloat16"),
        ("", {}, "float32"),
    ],
)
def test_generation_dtype_follows_instructions(
    cpuinfo: str, limit: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in limit.items():
        monkeypatch.setenv(variable, value)
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nmodel name : A Processor\n{cpuinfo}\n")
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "cpuinfo")
    assert processor.generation_dtype() == expected
    assert processor.processor_name() == "A Processor"


def test_generation_dtype_needs_no_torch() -> None:
    program = (
        "import sys; from montessori_core.processor import generation_dtype; generation_dtype(); print(*sys.modules)"
    )
    modules = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "montessori_core.processor" in modules
    assert "torch" not in modules
