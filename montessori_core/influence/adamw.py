"""One AdamW step as a function of immutable moments: nothing to rebuild, nothing to undo.

The operations and their order are those of `torch.optim.AdamW` (single-tensor), so that the result is the same to the
last bit in fp32.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AdamW:
    """Hyper-parameters of one step, and the number of the step about to be taken (1 for a cold start)."""

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    step: int

    def stepped_(
        self, weight: torch.Tensor, gradient: torch.Tensor | None, first: torch.Tensor, second: torch.Tensor
    ) -> None:
        """Move `weight` by one step, in place; `first` and `second` (the moments before it) stay as they are.

        Args:
            weight: [any shape].
            gradient: like `weight`; None is a zero gradient, the null step.
            first: exp_avg, like `weight`.
            second: exp_avg_sq, like `weight`.
        """
        if self.weight_decay:
            weight.mul_(1 - self.learning_rate * self.weight_decay)
        if gradient is None:
            gradient = torch.zeros_like(weight)
        first = first.lerp(gradient, 1 - self.beta1)
        second = (second * self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        correction1 = 1 - self.beta1**self.step
        correction2 = 1 - self.beta2**self.step
        denominator = (second.sqrt_() / correction2**0.5).add_(self.epsilon)
        weight.addcdiv_(first, denominator, value=-(self.learning_rate / correction1))
