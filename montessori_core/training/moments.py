"""AdamW's moments after a training, per parameter, in safetensors: what a warm one-step influence starts from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from montessori_core.atomic import hash_json
from montessori_core.errors import DataError
from montessori_core.training.files import MOMENTS_FILE


@dataclass(frozen=True)
class Moments:
    """AdamW's state.

    Attributes:
        first, second: the moments of each parameter that is trained, by its name.
        step: steps taken.
        weights: checksum of the weights they were left with; None if it is not known.
    """

    first: Mapping[str, torch.Tensor]
    second: Mapping[str, torch.Tensor]
    step: int
    weights: str | None = None


def weights_checksum(parameters: Mapping[str, torch.Tensor]) -> str:
    """What tells weights from others of the same shapes: the same for fp32 weights and for their bf16 copy."""
    sums = {}
    for name, parameter in sorted(parameters.items()):
        bits = parameter.detach().to(torch.bfloat16).view(torch.int16)
        sums[name] = int(bits.sum(dtype=torch.int64))
    return hash_json(sums)


def gather_moments(engine: Any, step: int) -> Moments:
    """Collect the moments from a DeepSpeed engine, whatever its ZeRO stage. All processes must call it."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    first, second, weights = {}, {}, {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if engine.zero_optimization_stage() > 0 or hasattr(parameter, "_hp_mapping"):
            m, v = (safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq"))
            w = safe_get_full_fp32_param(parameter)
        else:
            state = engine.optimizer.state[parameter]
            m, v, w = state["exp_avg"], state["exp_avg_sq"], parameter
        if m is None or v is None:
            raise RuntimeError(f"DeepSpeed holds no AdamW state for {name}")
        first[name], second[name] = (t.detach().float().cpu().reshape(m.shape).clone() for t in (m, v))
        weights[name] = w
    return Moments(first, second, step, weights_checksum(weights))


def cold_moments(model: Any) -> Moments:
    """The moments of a model that no optimizer has touched: all zero."""
    zeros = {
        name: torch.zeros_like(parameter, device="cpu")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return Moments(zeros, zeros, 0)


def save_moments(moments: Moments, folder: Path) -> None:
    """Write the moments beside a model's weights."""
    tensors = {f"{name}.first": tensor.contiguous() for name, tensor in moments.first.items()}
    tensors |= {f"{name}.second": tensor.contiguous() for name, tensor in moments.second.items()}
    # One entry: safetensors writes several in an order that changes from run to run.
    state = json.dumps({"step": moments.step, "weights": moments.weights})
    save_file(tensors, folder / MOMENTS_FILE, metadata={"adamw": state})


def load_moments(folder: Path) -> Moments:
    """Read what `save_moments` wrote.

    Raises:
        DataError: the folder holds no moments.
    """
    path = folder / MOMENTS_FILE
    if not path.exists():
        raise DataError(
            f"{path}: not found; the folder is not a warmed-up student (it has weights but no AdamW moments)"
        )
    first: dict[str, torch.Tensor] = {}
    second: dict[str, torch.Tensor] = {}
    with safe_open(path, framework="pt") as file:
        state = json.loads(file.metadata()["adamw"])
        for key in file.keys():  # noqa: SIM118 - not a mapping
            name, _, which = key.rpartition(".")
            (first if which == "first" else second)[name] = file.get_tensor(key)
    return Moments(first, second, state["step"], state["weights"])
