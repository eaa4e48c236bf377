"""This machine's processor, and the dtype for generation on it. Works without torch, for the driver."""

import os
import platform
from pathlib import Path
from typing import Literal

_CPUINFO = Path("/proc/cpuinfo")
_BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last is Arm's
_ATEN_WITHOUT_BF16 = {"default", "avx2"}
_ONEDNN_WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}


def processor_name() -> str:
    """Return the processor's model name, as the system reports it."""
    return _cpuinfo("model name") or platform.processor()


def generation_dtype() -> Literal["bfloat16", "float32"]:
    """Return the dtype in which this processor generates faster.

    That is bfloat16, which halves the bytes to read, if the processor has instructions for it (AMX, AVX512-BF16, Arm's
    BF16). Other processors emulate it, several times slower than float32. ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA,
    which limit torch to older instructions, are respected.
    """
    limited = (
        os.environ.get("ATEN_CPU_CAPABILITY", "").lower() in _ATEN_WITHOUT_BF16
        or os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in _ONEDNN_WITHOUT_BF16
    )
    instructions = f"{_cpuinfo('flags')} {_cpuinfo('Features')}".split()
    return "float32" if limited or _BF16_INSTRUCTIONS.isdisjoint(instructions) else "bfloat16"


def _cpuinfo(field: str) -> str:
    """Return the field's first value in /proc/cpuinfo; empty if there is none, as on macOS."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")
