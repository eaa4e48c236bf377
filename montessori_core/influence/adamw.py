"""One AdamW step as a function of immutable moments: nothing to rebuild, nothing to undo.

The operations and their order are those of `torch.optim.AdamW` (single-tensor), so that the result is the same to the
last bit in fp32. A tensor is worked through in pieces: on a CPU they stay in the cache from the first operation to the
last, on a GPU they bound what visits from host memory. All operations are elementwise, so the pieces change no bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

_PIECE = {"cpu": 1 << 16, "cuda": 1 << 25}  # elements


@dataclass(frozen=True)
class AdamW:
    """Hyper-parameters of one step, and the number of the step about to be taken (1 for a cold start)."""

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    step: int

    def step_(
        self, weight: torch.Tensor, gradient: torch.Tensor | None, first: torch.Tensor, second: torch.Tensor
    ) -> None:
        """Move `weight` by one step, in place; `first` and `second` (the moments before it) stay as they are.

        Args:
            weight: [any shape].
            gradient: like `weight`; None is a zero gradient, the null step.
            first: exp_avg, like `weight`.
            second: exp_avg_sq, like `weight`.
        """
        for w, g, m, v in _pieces(weight.device, weight, gradient, first, second):
            if self.weight_decay:
                w.mul_(1 - self.learning_rate * self.weight_decay)
            numerator, denominator = self._fraction(g, m, v)
            w.addcdiv_(numerator, denominator, value=-self._rate)

    def project(
        self,
        direction: torch.Tensor,
        gradient: torch.Tensor | None,
        first: torch.Tensor,
        second: torch.Tensor,
        device: torch.device,
    ) -> float:
        """<direction, the step `gradient` leads to>, summed in fp64; weight decay, which no gradient changes, left out.

        Args:
            direction: [any shape].
            gradient: like `direction`; None is a zero gradient.
            first: exp_avg, like `direction`.
            second: exp_avg_sq, like `direction`.
            device: where to compute; the tensors may live elsewhere.
        """
        total = torch.zeros((), dtype=torch.float64, device=device)
        for d, g, m, v in _pieces(device, direction, gradient, first, second):
            numerator, denominator = self._fraction(g, m, v)
            total += numerator.div_(denominator).mul_(d).sum(dtype=torch.float64)
        return -self._rate * float(total)

    @property
    def _rate(self) -> float:
        return self.learning_rate / (1 - self.beta1**self.step)

    def _fraction(self, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        numerator = m.lerp(g, 1 - self.beta1)
        denominator = (v * self.beta2).addcmul_(g, g, value=1 - self.beta2).sqrt_()
        return numerator, denominator.div_((1 - self.beta2**self.step) ** 0.5).add_(self.epsilon)


def _pieces(
    device: torch.device, like: torch.Tensor, gradient: torch.Tensor | None, first: torch.Tensor, second: torch.Tensor
) -> Iterator[tuple[torch.Tensor, ...]]:
    """All four, piece by piece on `device`; those that live there already are not copied."""
    if gradient is None:
        gradient = torch.zeros_like(like)
    size = _PIECE[device.type]
    flat = like.view(-1), gradient.reshape(-1), first.view(-1), second.view(-1)
    for pieces in zip(*(tensor.split(size) for tensor in flat), strict=True):
        yield tuple(piece.to(device, non_blocking=True) for piece in pieces)
