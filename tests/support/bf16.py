"""Trainings whose forward and backward passes use bf16 copies of the weights, as on a GPU."""

from collections.abc import Mapping
from pathlib import Path

from montessori_core import programs
from montessori_core.program import Compute
from montessori_core.training import dpo, engine, sft


def open_sft(settings: programs.Sft, inputs: Mapping[str, Path]) -> Compute:
    """Train a student, see `montessori_core.training.sft`."""
    engine.computes_in_bf16 = lambda: True
    return sft.open_sft(settings, inputs)


def open_dpo(settings: programs.Dpo, inputs: Mapping[str, Path]) -> Compute:
    """Update a teacher, see `montessori_core.training.dpo`."""
    engine.computes_in_bf16 = lambda: True
    return dpo.open_dpo(settings, inputs)
