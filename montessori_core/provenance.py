"""Where the results of a run come from: versions, revision, machine, models."""

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from montessori_core.atomic import read_json, write_json
from montessori_core.processor import generation_dtype, processor_name
from tasks.run import Run

_PROVENANCE = "provenance.json"
_PACKAGES = ("montessori", "torch", "transformers", "trl", "deepspeed", "vllm", "submitit", "prefect", "pyarrow")


def provenance_of(run: Run) -> dict[str, Any]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    revision = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    before = (read_json(run.folder / _PROVENANCE) or {}).get("driver", {})
    return {
        "opened": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions,
        "python": platform.python_version(),
        "git_revision": revision.stdout.strip() or None,
        "driver": {
            "system": platform.platform(),
            "processor": processor_name(),
            "generation_dtype": generation_dtype(),
            "cores": os.cpu_count(),
            "gflops": before.get("gflops"),
        },
        "teacher_sha256": run.first_teacher().sha256,
        "student_sha256": run.first_student().sha256,
    }


def record_speed(run: Run, gflops: float) -> None:
    """Add to the provenance how fast this machine multiplies matrices, see `montessori_core.speed`."""
    provenance = read_json(run.folder / _PROVENANCE)
    provenance["driver"]["gflops"] = round(gflops, 1)
    write_json(provenance, run.folder / _PROVENANCE)
