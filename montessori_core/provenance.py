"""Provenance of a run: versions, revision, machine, models."""

import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from montessori_core import layout
from montessori_core.files import read_json, write_json
from montessori_core.processor import generation_dtype, processor_name

_PACKAGES = ("montessori", "torch", "transformers", "trl", "deepspeed", "vllm", "submitit", "prefect", "pyarrow")


def write_provenance(folder: Path, models: dict[str, str]) -> None:
    """Write `provenance.json` into a run's folder, each time the run is opened.

    Args:
        folder: the run's folder. A speed recorded there is kept.
        models: hashes of the initial models, by role.
    """
    driver = (read_json(folder / layout.PROVENANCE) or {}).get("driver", {})
    write_json(_provenance(models, driver.get("gflops")), folder / layout.PROVENANCE)


def record_speed(folder: Path, gflops: float) -> None:
    """Add this machine's speed, see `montessori_core.speed`, to a run's provenance."""
    provenance = read_json(folder / layout.PROVENANCE)
    provenance["driver"]["gflops"] = round(gflops, 1)
    write_json(provenance, folder / layout.PROVENANCE)


def _provenance(models: dict[str, str], gflops: float | None) -> dict[str, Any]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "opened": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions,
        "python": platform.python_version(),
        "git_revision": _git_revision(),
        "driver": {
            "system": platform.platform(),
            "processor": processor_name(),
            "generation_dtype": generation_dtype(),
            "cores": os.cpu_count(),
            "gflops": gflops,
            "directory": os.getcwd(),
        },
        **{f"{role}_sha256": sha256 for role, sha256 in models.items()},
    }


def _git_revision() -> str | None:
    """Return the commit of the checkout of this package; None if it is an installed copy, or git is missing."""
    checkout = Path(__file__).parents[1]
    if not (checkout / ".git").exists() or not shutil.which("git"):
        return None
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
