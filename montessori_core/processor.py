"""The processor of this machine and the number type it generates in. Needs no torch: the driver records both."""

import os
import platform
from pathlib import Path
from typing import Literal

_CPUINFO = Path("/proc/cpuinfo")
_BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last is Arm's
_ATEN_WITHOUT_BF16 = {"default", "avx2"}
_ONEDNN_WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}


def processor_name() -> str:
    """Return the processor's model name, as far as the system tells it."""
    return _cpuinfo("model name") or platform.processor()


def generation_dtype() -> Literal["bfloat16", "float32"]:
    """Return the number type that this processor generates faster in.

    That is bfloat16, half the bytes, where the processor multiplies it (AMX, AVX512-BF16, Arm's BF16). Others emulate it,
    several times slower than float32. ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA, which limit torch to older
    instructions, are taken into account.
    """
    limited = (
        os.environ.get("ATEN_CPU_CAPABILITY", "").lower() in _ATEN_WITHOUT_BF16
        or os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in _ONEDNN_WITHOUT_BF16
    )
    instructions = f"{_cpuinfo('flags')} {_cpuinfo('Features')}".split()
    return "float32" if limited or _BF16_INSTRUCTIONS.isdisjoint(instructions) else "bfloat16"


def _cpuinfo(field: str) -> str:
    """The field's first value in /proc/cpuinfo; empty where there is none, as on macOS."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")
