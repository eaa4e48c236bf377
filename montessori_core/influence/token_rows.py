"""The step on an example's own rows of the embeddings and of the vocabulary projection, which is never linear.

A token that no training example has had leaves AdamW's second moment near zero in its row. An example with this token
dominates the denominator there, however small its weight: the step is bounded, and a linear one is not.
"""

from dataclasses import dataclass

import torch

from montessori_core.influence.adamw import AdamW


@dataclass(frozen=True)
class TokenRows:
    """What the influence of a step on single rows of a parameter depends on: tensors [tokens, columns].

    AdamW divides numerator and denominator by the factors of the gradient, see `AdamW.project`.

    Attributes:
        past: what momentum adds to the gradient.
        past_square: what the second moment adds to the squared gradient.
        full, half: gradients of the reference loss and of half of it, times the length of the step.
        epsilon: of the denominator, [].
    """

    past: torch.Tensor
    past_square: torch.Tensor
    full: torch.Tensor
    half: torch.Tensor
    epsilon: torch.Tensor

    @staticmethod
    def of(
        adamw: AdamW, first: torch.Tensor, second: torch.Tensor, full: torch.Tensor, half: torch.Tensor
    ) -> "TokenRows":
        """Return the rows of a parameter, given its moments and reference gradients, in host memory."""
        past, past_square, epsilon, length = adamw.scaled(*(moment.cpu().float() for moment in (first, second)))
        full, half = (gradient.cpu().float() * length for gradient in (full, half))
        return TokenRows(past, past_square, full, half, torch.tensor(epsilon))

    def to(self, device: torch.device, dtype: torch.dtype) -> "TokenRows":
        """Return the rows on a device; bf16 is precise enough, like for the directions."""
        return TokenRows(**{name: tensor.to(device, dtype) for name, tensor in vars(self).items()})

    def influence(self, tokens: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Return the influence of the step on these rows against the null step's, by each reference gradient.

        Args:
            tokens: [rows] token ids.
            gradient: [rows, columns] of the example, unweighted.
        """
        past, past_square, full, half = (
            tensor[tokens].to(gradient.dtype) for tensor in (self.past, self.past_square, self.full, self.half)
        )
        step = (past + gradient) / ((past_square + gradient.square()).sqrt() + self.epsilon)
        step -= past / (past_square.sqrt() + self.epsilon)
        return torch.stack([(part * step).sum(dtype=torch.float64) for part in (full, half)])
