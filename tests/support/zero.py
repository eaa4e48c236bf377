"""Trainings that fail if ZeRO-3 has not partitioned the weights when they are loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from montessori_core import programs
from montessori_core.program import Compute
from montessori_core.training import dpo, sft


def _check_loading(module: Any) -> None:
    load = module.load_model

    def load_partitioned(*args: Any) -> Any:
        model = load(*args)
        assert all(hasattr(parameter, "ds_id") for parameter in model.parameters()), "weights are not partitioned"
        return model

    module.load_model = load_partitioned


def open_sft(settings: programs.Sft, inputs: Mapping[str, Path]) -> Compute[Any]:
    """Train a student, see `montessori_core.training.sft`."""
    _check_loading(sft)
    return sft.open_sft(settings, inputs)


def open_dpo(settings: programs.Dpo, inputs: Mapping[str, Path]) -> Compute[Any]:
    """Update a teacher, see `montessori_core.training.dpo`."""
    _check_loading(dpo)
    return dpo.open_dpo(settings, inputs)
