"""One AdamW step as a function of immutable moments: nothing to rebuild, nothing to undo.

The operations and their order are those of `torch.optim.AdamW` (single-tensor), so that the result is the same to the
last bit in fp32. A tensor is worked through in pieces: on a CPU they stay in the cache from the first operation to the
last, on a GPU they bound what visits from host memory. All operations of a step are elementwise, so the pieces change no bit.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

_PIECE = {"cpu": 1 << 16, "cuda": 1 << 25}  # elements


class GradientTally:
    """Norm of an example's gradient, and in how many coordinates it decides AdamW's denominator.

    A step adds the pieces that it works through; neither number depends on their order.
    """

    def __init__(self) -> None:
        self._norms: list[torch.Tensor] = []
        self._dominated: list[torch.Tensor] = []

    def add(self, gradient: torch.Tensor, past: torch.Tensor, second: torch.Tensor) -> None:
        """Add a piece.

        Args:
            gradient: [piece], unweighted.
            past: beta2 v, [piece]; overwritten.
            second: beta2 v + (1 - beta2) (w g)^2, [piece].
        """
        self._norms.append(torch.linalg.vector_norm(gradient, dtype=torch.float64))
        self._dominated.append((second > past.mul_(2)).count_nonzero())

    @property
    def norm(self) -> float:
        """Euclidean norm of the unweighted gradient, its squares summed in fp64."""
        return math.sqrt(math.fsum(norm * norm for norm in _values(self._norms)))

    @property
    def dominated(self) -> int:
        """Coordinates in which (1 - beta2) (w g)^2 exceeds beta2 v."""
        return int(sum(_values(self._dominated)))


@dataclass(frozen=True)
class AdamW:
    """Hyper-parameters of one step, and the number of the step about to be taken (1 for a cold start).

    `example_weight` multiplies the gradient before all else: Eq. 1 to the letter has 1, a training batch of 32 gives each
    of its examples 1/32.
    """

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    step: int
    example_weight: float = 1.0

    def step_(
        self,
        weight: torch.Tensor,
        gradient: torch.Tensor | None,
        first: torch.Tensor,
        second: torch.Tensor,
        tally: GradientTally | None = None,
    ) -> None:
        """Move `weight` by one step, in place; `first` and `second` (the moments before it) stay as they are.

        Args:
            weight: [any shape].
            gradient: like `weight`; None is a zero gradient, the null step.
            first: exp_avg, like `weight`.
            second: exp_avg_sq, like `weight`.
            tally: counts the gradient.
        """
        for g, m, v, w in _pieces(weight.device, weight, gradient, first, second, weight):
            if self.weight_decay:
                w.mul_(1 - self.learning_rate * self.weight_decay)
            numerator, denominator = self._fraction(g, m, v, tally)
            w.addcdiv_(numerator, denominator, value=-self._rate)

    def project(
        self,
        directions: Sequence[torch.Tensor],
        gradient: torch.Tensor | None,
        first: torch.Tensor,
        second: torch.Tensor,
        device: torch.device,
        tally: GradientTally | None = None,
    ) -> list[float]:
        """<direction, the step `gradient` leads to> of each direction; weight decay, which no gradient changes, left out.

        Args:
            directions: [directions][any shape]. The first is summed in fp64; others, which may be of a smaller type, in the
                step's own type, piece by piece.
            gradient: like a direction; None is a zero gradient.
            first: exp_avg, like a direction.
            second: exp_avg_sq, like a direction.
            device: where to compute; the tensors may live elsewhere.
            tally: counts the gradient.
        """
        totals = torch.zeros(len(directions), dtype=torch.float64, device=device)
        for g, m, v, main, *others in _pieces(device, first, gradient, first, second, *directions):
            numerator, denominator = self._fraction(g, m, v, tally)
            step = numerator.div_(denominator)
            along = [torch.dot(step, d.to(step.dtype)).double() for d in others]
            totals += torch.stack([(step * main).sum(dtype=torch.float64), *along])
        return [-self._rate * total for total in totals.tolist()]

    @property
    def _rate(self) -> float:
        return self.learning_rate / (1 - self.beta1**self.step)

    def _fraction(
        self, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, tally: GradientTally | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weighted = g if self.example_weight == 1.0 else g * self.example_weight
        numerator = m.lerp(weighted, 1 - self.beta1)
        past = v * self.beta2
        denominator = past.addcmul(weighted, weighted, value=1 - self.beta2)
        if tally is not None:
            tally.add(g, past, denominator)
        return numerator, denominator.sqrt_().div_((1 - self.beta2**self.step) ** 0.5).add_(self.epsilon)


def _values(scalars: list[torch.Tensor]) -> list[float]:
    return torch.stack(scalars).tolist() if scalars else []


def _pieces(
    device: torch.device, like: torch.Tensor, gradient: torch.Tensor | None, *others: torch.Tensor
) -> Iterator[tuple[torch.Tensor, ...]]:
    """A gradient (None: zeros like `like`) and others, piece by piece on `device`; what lives there is not copied."""
    if gradient is None:
        gradient = torch.zeros_like(like)
    size = _PIECE[device.type]
    flat = gradient.reshape(-1), *(tensor.view(-1) for tensor in others)
    for pieces in zip(*(tensor.split(size) for tensor in flat), strict=True):
        yield tuple(piece.to(device, non_blocking=True) for piece in pieces)
