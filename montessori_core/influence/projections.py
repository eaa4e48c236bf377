"""What steps are projected onto: reference gradients, or random directions, whose numbers can be kept.

To first order, influence is the inner product of a step and the gradient of the reference loss. The step does not depend on
the reference set. So its projection onto random directions is kept once for every example of a pool; another reference set
then costs a projection of its gradient and a matrix product. Inner products of such projections have the right mean, and an
error that falls with the root of their size.

A parameter, seen as a matrix, is projected from both sides, A S B, with random signs in A and B, as TRAK and LoGra project
gradients. Steps are large where gradients are small: both are scaled by a root of AdamW's denominator first, in opposite
directions, which lowers the error and changes no inner product.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

Direction = Mapping[str, torch.Tensor]
_SHARE_OF_MEAN = 0.1
"""Of the mean denominator of a parameter, added to each: a token that no training example had has none."""
_ROWS_OF_PRODUCT = {"cpu": 4, "cuda": 2}
"""Directions of one matrix-vector product, by type of device. On a CPU four take the time of one."""


class Projection(Protocol):
    """What the steps of all parameters are projected onto."""

    @property
    def size(self) -> int:
        """How many numbers a projection has."""

    def place(self, name: str) -> slice:
        """Where a parameter's numbers are added."""

    def onto(self, name: str, rows: slice, second: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return what projects a block of steps, rows of a parameter flattened, onto the numbers of the parameter.

        Args:
            name: of the parameter.
            rows: of the block.
            second: its exp_avg_sq, [rows, columns].
        """


@dataclass(frozen=True)
class AlongDirections:
    """The inner products with given directions, by parameter name.

    Each has the same bits whatever the others are: every product has the same number of rows, of zeros where none is left.
    """

    directions: Sequence[Direction]

    @property
    def size(self) -> int:
        """How many directions there are."""
        return len(self.directions)

    def place(self, name: str) -> slice:
        """All parameters add to the same numbers."""
        return slice(0, self.size)

    def onto(self, name: str, rows: slice, second: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """See `Projection`."""
        together = _ROWS_OF_PRODUCT[second.device.type]
        parts = second.new_zeros((math.ceil(self.size / together) * together, second.numel()))
        for part, direction in zip(parts, self.directions, strict=False):
            part.view_as(second).copy_(as_matrix(direction[name])[rows], non_blocking=True)
        products = parts.split(together)
        return lambda step: torch.cat([product @ step for product in products])[: self.size]


class _Signs(NamedTuple):
    """Random signs of one parameter, [height, rows] and [columns, width]; where its numbers are; the floor of its scale."""

    left: torch.Tensor
    right: torch.Tensor
    place: slice
    floor: float


class RandomDirections:
    """Random directions of each parameter.

    Attributes:
        size: how many numbers all parameters have together.
    """

    def __init__(self, second: Direction, size: int, device: torch.device) -> None:
        """Draw the signs.

        Args:
            second: exp_avg_sq by parameter name. A parameter's share of the numbers is that of its scaled gradients' squared
                norm in training, which is the sum of the roots of these. Parameters that were not trained are like the mean.
            size: about how many numbers a projection has. With more than the parameters have, it loses nothing.
            device: of the steps.
        """
        means = {name: float(second[name].float().sqrt().mean(dtype=torch.float64)) for name in sorted(second)}
        untrained = sum(means.values()) / len(means) or 1.0
        means = {name: mean or untrained for name, mean in means.items()}
        total = sum(mean * second[name].numel() for name, mean in means.items())
        self._signs: dict[str, _Signs] = {}
        self.size = 0
        for number, (name, mean) in enumerate(means.items()):
            rows, columns = as_matrix(second[name]).shape
            side = max(1, round(math.sqrt(size * mean * second[name].numel() / total)))
            left, right = _draw(2 * number, side, rows), _draw(2 * number + 1, side, columns)
            place = slice(self.size, self.size + len(left) * len(right))
            right = right.t().contiguous()
            self._signs[name] = _Signs(left.to(device), right.to(device), place, _SHARE_OF_MEAN * mean)
            self.size = place.stop

    def place(self, name: str) -> slice:
        """Every parameter has its own numbers."""
        return self._signs[name].place

    def onto(self, name: str, rows: slice, second: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """See `Projection`."""
        scale, left, right = self._factors(name, rows, second)
        return lambda step: (left @ ((step.view(scale.shape) * scale) @ right)).flatten()

    def gradient(self, name: str, rows: slice, gradient: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Return the projection of rows of a gradient; its inner product with that of a step has the right mean."""
        scale, left, right = self._factors(name, rows, second)
        return (left @ ((gradient / scale) @ right)).flatten()

    def _factors(self, name: str, rows: slice, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the scale of steps in some rows of a parameter, and the signs on both sides of them."""
        left, right, _, floor = self._signs[name]
        scale = (second.sqrt() + floor).sqrt_()
        return scale, left[:, rows].to(scale), right.to(scale)


def as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """Return a parameter, or a tensor of its shape, as a matrix whose columns are its last dimension."""
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() else tensor.reshape(1, 1)


def _draw(seed: int, height: int, width: int) -> torch.Tensor:
    """Return [height, width] random signs over the root of the height; the identity if the height is not smaller.

    NumPy promises the bits of a generator for all versions.
    """
    if width <= height:
        return torch.eye(width)
    bits = np.random.Philox(seed).random_raw(math.ceil(height * width / 64)).view(np.uint8)
    signs = np.unpackbits(bits)[: height * width].reshape(height, width).astype(np.float32) * 2 - 1
    return torch.from_numpy(signs / np.float32(math.sqrt(height)))
