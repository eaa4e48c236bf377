"""What `montessori doctor` has nodes do: say what they see, and add up a number together."""

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
    """Report host, versions, packages that cannot be imported or do not fit, GPUs, and what the driver wrote to a file.

    Settings: `packages` to import, with the range of versions that fits. Inputs: `token`, a file.
    """

    def compute(rows: list[Row], output: Path, report: Report) -> None:
        found: dict[str, Any] = {"host": platform.node(), "python": platform.python_version(), "versions": {}}
        wrong: dict[str, str] = {}
        for package, fit in settings["packages"].items():
            try:
                importlib.import_module(package)
                found["versions"][package] = version(package)
                unfit = misfit(package, fit)
                if unfit is not None:
                    wrong[package] = unfit
            except PackageNotFoundError:
                found["versions"][package] = "?"
            except Exception as error:  # a broken CUDA library raises many kinds
                wrong[package] = f"{type(error).__name__}: {error}"
        found["wrong"] = wrong
        found["token"] = inputs["token"].read_text() if inputs["token"].exists() else None
        found["gpus"] = 0
        if "torch" in found["versions"]:
            import torch

            found["gpus"] = torch.cuda.device_count()
        output.write_text(json.dumps(found))

    return compute


def open_all_reduce(settings: Mapping[str, Any], inputs: Mapping[str, Path]) -> Compute[Any]:
    """Sum a one of every process over the job's processes."""

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
