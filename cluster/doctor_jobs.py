"""Diagnostic jobs of `montessori doctor`: report a node's environment; run an all-reduce."""

import importlib
import json
import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from montessori_core.program import Compute, Report, Row
from montessori_core.versions import misfit


def open_node_report(settings: Mapping[str, Any], inputs: Mapping[str, Path]) -> Compute[Any]:
    """Report host, versions, packages that fail to import or have the wrong version, GPUs, compiler, and the driver's token.

    Settings: `packages` to import, with their ranges of versions; `compiler`, whether the stage needs one. Inputs: `token`, a
    file that the driver wrote.
    """

    def compute(rows: list[Row], output: Path, report: Report) -> None:
        node: dict[str, Any] = {"host": platform.node(), "python": platform.python_version(), "versions": {}}
        wrong: dict[str, str] = {}
        for package, versions in settings["packages"].items():
            try:
                importlib.import_module(package)
                node["versions"][package] = version(package)
                problem = misfit(package, versions)
                if problem is not None:
                    wrong[package] = problem
            except PackageNotFoundError:
                node["versions"][package] = "?"
            except Exception as error:  # a broken CUDA library raises errors of many types
                wrong[package] = f"{type(error).__name__}: {error}"
        node["wrong"] = wrong
        node["token"] = inputs["token"].read_text() if inputs["token"].exists() else None
        node["gpus"] = 0
        if "torch" in node["versions"]:
            import torch

            node["gpus"] = torch.cuda.device_count()
        if settings["compiler"]:
            node["compiler"], node["cannot_compile"] = _try_compiler()
        output.write_text(json.dumps(node))

    return compute


def _try_compiler() -> tuple[str | None, str | None]:
    """Return the C compiler that Triton uses here, and why it cannot compile an extension of Python, as Triton does."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None, "no gcc or clang on PATH, and CC is not set"
    command = [compiler, "-x", "c", "-fsyntax-only", f"-I{sysconfig.get_paths()['include']}", "-"]
    try:
        outcome = subprocess.run(command, input="#include <Python.h>\n", capture_output=True, text=True, check=False)
    except OSError as error:
        return compiler, f"{compiler}: {error.strerror}"
    return compiler, outcome.stderr.partition("\n")[0] if outcome.returncode else None


def open_all_reduce(settings: Mapping[str, Any], inputs: Mapping[str, Path]) -> Compute[Any]:
    """Sum 1 over the processes of the job."""

    def compute(rows: list[Row], output: Path, report: Report) -> None:
        import torch
        from torch import distributed

        from montessori_core.models.device import take_gpu

        cuda = torch.cuda.is_available()
        if cuda:
            take_gpu()
        distributed.init_process_group("nccl" if cuda else "gloo")
        ones = torch.ones(1, device="cuda" if cuda else "cpu")
        distributed.all_reduce(ones)
        output.write_text(json.dumps({"processes": distributed.get_world_size(), "sum": float(ones)}))
        distributed.destroy_process_group()

    return compute
