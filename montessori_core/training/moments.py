"""AdamW's moments after a training, per parameter, in safetensors: what a warm one-step influence starts from."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from montessori_core.errors import DataError
from montessori_core.files import hash_json
from montessori_core.layout import MOMENTS_FILE
from montessori_core.training.masters import trained_parameters, whole

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


@dataclass(frozen=True)
class Moments:
    """AdamW's state.

    Attributes:
        first, second: the moments of each parameter that is trained, by its name.
        step: steps taken.
        weights: checksums of the weights they were left with, see `weights_checksums`; None if they are not known.
    """

    first: Mapping[str, torch.Tensor]
    second: Mapping[str, torch.Tensor]
    step: int
    weights: Mapping[str, str] | None = None


def weights_checksums(weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """Return what tells weights from others of the same shapes, by the number type they are loaded in.

    Of fp32 masters, the checksum 'float32' is theirs alone; 'bfloat16' is that of every copy rounded to bf16.

    Args:
        weights: names and tensors, one after the other; none is kept.
    """
    sums: dict[torch.dtype, dict[str, int]] = {dtype: {} for dtype in _BITS}
    for name, tensor in weights:
        for dtype, bits in _BITS.items():
            sums[dtype][name] = int(tensor.detach().to(dtype).view(bits).sum(dtype=torch.int64))
    return {number_type(dtype): hash_json(sums[dtype]) for dtype in sums}


def number_type(dtype: torch.dtype) -> str:
    """Return the name of a number type, as 'float32'."""
    return str(dtype).removeprefix("torch.")


def gather_moments(engine: Any, step: int) -> Moments | None:
    """Collect the moments from a DeepSpeed engine on rank 0's host; None elsewhere. All processes must call it."""
    first, second = {}, {}

    def masters() -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in trained_parameters(engine):
            m, v = (whole(engine, parameter, state) for state in ("exp_avg", "exp_avg_sq"))
            if torch.distributed.get_rank() == 0:
                first[name], second[name] = m.cpu().clone(), v.cpu().clone()
            yield name, whole(engine, parameter)

    checksums = weights_checksums(masters())
    return Moments(first, second, step, checksums) if first else None


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
    state = json.dumps({"step": moments.step, "weights": moments.weights}, sort_keys=True)
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
