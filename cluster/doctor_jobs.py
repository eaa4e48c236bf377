"""Diagnostic jobs of `montessori doctor`: report a node's environment; run an all-reduce."""

import importlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from montessori_core.program import Compute, Report, Row
from montessori_core.versions import misfit


def open_node_report(settings: Mapping[str, Any], inputs: Mapping[str, Path]) -> Compute[Any]:
    """Report host, versions, packages that fail to import or have the wrong version, GPUs, and the driver's token.

    Settings: `packages` to import, with their ranges of versions. Inputs: `token`, a file that the driver wrote.
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
        output.write_text(json.dumps(node))

    return compute


def open_all_reduce(settings: Mapping[str, Any], inputs: Mapping[str, Path]) -> Compute[Any]:
    """Sum 1 over the processes of the job."""

    def compute(rows: list[Row], output: Path, report: Report) -> None:
        import torch
        from torch import distributed

        cuda = torch.cuda.is_available()
        distributed.init_process_group("nccl" if cuda else "gloo")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()) if cuda else "cpu"
        ones = torch.ones(1, device=device)
        distributed.all_reduce(ones)
        output.write_text(json.dumps({"processes": distributed.get_world_size(), "sum": float(ones)}))
        distributed.destroy_process_group()

    return compute
