"""AdamW's moments after a training, per parameter, in safetensors; influence of a warm student starts from them."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from montessori_core.config import Optimization
from montessori_core.errors import DataError
from montessori_core.files import hash_json
from montessori_core.layout import MOMENTS_FILE
from montessori_core.models.fingerprints import moments_state
from montessori_core.training.masters import full_fp32, trained_parameters

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


@dataclass(frozen=True)
class Moments:
    """AdamW's state.

    Attributes:
        first, second: moments of the trained parameters, by name.
        step: number of steps taken.
        weights: checksums of the weights after these steps, see `weights_checksums`; None if there are none.
        path: the file that they were read from, for errors; None if they were not read from a file.
    """

    first: Mapping[str, torch.Tensor]
    second: Mapping[str, torch.Tensor]
    step: int
    weights: Mapping[str, str] | None = None
    path: Path | None = None


def weights_checksums(weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """Return checksums of weights, by the dtype in which they are loaded.

    'float32' identifies the fp32 masters; 'bfloat16' identifies their bf16 copies.

    Args:
        weights: names and tensors; only one is in memory at a time.
    """
    sums: dict[torch.dtype, dict[str, int]] = {dtype: {} for dtype in _BITS}
    for name, tensor in weights:
        for dtype, bits in _BITS.items():
            sums[dtype][name] = int(tensor.detach().to(dtype).view(bits).sum(dtype=torch.int64))
    return {number_type(dtype): hash_json(sums[dtype]) for dtype in sums}


def number_type(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as 'float32'."""
    return str(dtype).removeprefix("torch.")


def gather_moments(engine: Any, step: int) -> Moments | None:
    """Gather the moments in rank 0's host memory; other ranks return None. All processes must call it."""
    first, second = {}, {}
    if engine.zero_optimization_stage() in (1, 2):
        # DeepSpeed (0.19) links the moments after a step; a training that resumes from its last step takes none.
        engine.optimizer._lazy_init_hp_params_optimizer_state()

    def masters() -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in trained_parameters(engine):
            m, v = (full_fp32(engine, parameter, state) for state in ("exp_avg", "exp_avg_sq"))
            if torch.distributed.get_rank() == 0:
                first[name], second[name] = m.cpu().clone(), v.cpu().clone()
            yield name, full_fp32(engine, parameter)

    checksums = weights_checksums(masters())
    return Moments(first, second, step, checksums) if first else None


def cold_moments(model: Any) -> Moments:
    """Return the moments of a model before its first step: all zero."""
    zeros = {
        name: torch.zeros_like(parameter, device="cpu")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return Moments(zeros, zeros, 0)


def save_moments(moments: Moments, folder: Path, recipe: Optimization | None = None) -> None:
    """Write the moments next to a model's weights; `moments_recipe` and `moments_rate` read the recipe's settings."""
    tensors = {f"{name}.first": tensor.contiguous() for name, tensor in moments.first.items()}
    tensors |= {f"{name}.second": tensor.contiguous() for name, tensor in moments.second.items()}
    # One entry: safetensors writes several in a random order.
    adamw = recipe and recipe.model_dump(include={"learning_rate", "beta1", "beta2", "epsilon", "weight_decay"})
    state = json.dumps({"step": moments.step, "weights": moments.weights, "recipe": adamw}, sort_keys=True)
    save_file(tensors, folder / MOMENTS_FILE, metadata={"adamw": state})


def load_moments(folder: Path) -> Moments:
    """Read the moments that `save_moments` wrote.

    Raises:
        DataError: the folder has no moments, or their file is damaged.
    """
    path = folder / MOMENTS_FILE
    if not path.exists():
        raise DataError(
            f"{path}: not found: this folder is not a warmed-up student; give the folder of a student that a run "
            "trained with its AdamW moments, such as iteration-1/warmup/part-00000"
        )
    state = moments_state(folder)
    first: dict[str, torch.Tensor] = {}
    second: dict[str, torch.Tensor] = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            name, _, moment = key.rpartition(".")
            (first if moment == "first" else second)[name] = file.get_tensor(key)
    return Moments(first, second, state["step"], state["weights"], path)
