"""The reference set on a device, and its loss (Eq. 2).

Shapes: [examples] in the order the reference set was given.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from montessori_core.influence.losses import Batch, TokenLosses, group_by_length, make_batch
from montessori_core.models.chat import Encoded
from montessori_core.program import Report

_ORDER_SEED = 20250211  # any; the order must be the same for every worker


@dataclass(frozen=True)
class Loss:
    """Loss of each of some reference examples: summed over its response tokens, and how many there are. Both [examples]."""

    summed: torch.Tensor
    tokens: torch.Tensor

    def per_example(self) -> torch.Tensor:
        """[examples] mean loss over the response tokens of each, nats per token."""
        return self.summed / self.tokens

    def reduce(self, reduction: str) -> float:
        """The reference loss: mean over examples ('example', Eq. 2) or over all tokens ('token')."""
        if reduction == "example":
            return float(self.per_example().mean())
        return float(self.summed.sum() / self.tokens.sum())

    def of(self, indices: Sequence[int]) -> "Loss":
        """The same of fewer examples."""
        return Loss(self.summed[list(indices)], self.tokens[list(indices)])


def influence_by_example(before: Loss, after: Loss, reduction: str) -> torch.Tensor:
    """[examples] what each reference example says of an influence; their mean is the influence itself."""
    if reduction == "example":
        return before.per_example() - after.per_example()
    return (before.summed - after.summed) / before.tokens.mean()


def influence_of(before: Loss, after: Loss, reduction: str) -> tuple[float, float]:
    """Influence of what lies between two losses, and its standard error over the reference examples."""
    differences = influence_by_example(before, after, reduction)
    count = len(differences)
    error = float(differences.std(unbiased=True)) / count**0.5 if count > 1 else float("nan")
    return float(differences.mean()), error


def error_by_halves(first: float, second: float, sizes: tuple[int, int]) -> float:
    """Standard error of first + second, where random halves of the reference set, of these sizes, add these.

    It has one degree of freedom; its square is right in the mean. NaN for an empty half.
    """
    if 0 in sizes:
        return math.nan
    weight = math.sqrt(sizes[1] / sizes[0])
    return abs(first * weight - second / weight)


def rounding_noise(student: Loss, perturbed: Loss, reduction: str) -> float:
    """Two standard deviations of what rounding adds to an influence, nats.

    Args:
        student: the loss of some weights.
        perturbed: the loss after these weights moved by their rounding error, which renews the rounding of all that is
            computed from them as well. Each reference example is a draw of that noise; what all of them share is the
            weights' own.
        reduction: of the reference loss.
    """
    differences = influence_by_example(student, perturbed, reduction)
    independent = float(differences.square().mean().sqrt()) / math.sqrt(len(differences))
    return 2.0 * max(abs(float(differences.mean())), independent)


def random_order(count: int) -> list[int]:
    """One fixed random order of the reference examples, the same for every worker."""
    order = list(range(count))
    random.Random(_ORDER_SEED).shuffle(order)
    return order


class ReferenceSet:
    """Encoded reference examples in length-sorted batches, resident on a device."""

    def __init__(self, examples: Sequence[Encoded], batch_tokens: int, device: torch.device) -> None:
        """`batch_tokens` bounds a batch, padding included; a longer example has a batch of its own."""
        self._examples, self._device, self.batch_tokens = examples, device, batch_tokens
        self.batches = self.batched(range(len(examples)), batch_tokens)
        self.tokens = torch.tensor([example.response_tokens for example in examples], dtype=torch.float64)

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def input_tokens(self) -> int:
        """Tokens that one evaluation reads, without padding."""
        return sum(batch.tokens for batch in self.batches)

    def batched(self, indices: Sequence[int], batch_tokens: int) -> list[Batch]:
        """Some of the examples, in batches of their own."""
        lengths = [len(example.input_ids) for example in self._examples]
        groups = group_by_length(lengths, indices, batch_tokens)
        return [make_batch([(i, self._examples[i]) for i in group], self._device) for group in groups]

    def evaluate(self, losses: TokenLosses, report: Report = lambda done: None) -> Loss:
        """Loss of every example."""
        return Loss(self.sum_losses(losses, self.batches, report), self.tokens)

    @torch.no_grad()
    def sum_losses(
        self, losses: TokenLosses, batches: Sequence[Batch], report: Report = lambda done: None
    ) -> torch.Tensor:
        """[examples] summed loss in fp64; NaN for examples that are in none of the batches."""
        summed = torch.full((len(self),), torch.nan, dtype=torch.float64)
        done = 0
        for batch in batches:
            summed[batch.indices] = _by_row(losses(batch), batch).cpu()
            done += len(batch.indices)
            report(done)
        return summed

    def halves(self) -> tuple[list[int], list[int]]:
        """The examples, divided at random; of an odd number the second half has one more."""
        order = random_order(len(self))
        middle = len(order) // 2
        return order[:middle], order[middle:]

    def backward(self, losses: TokenLosses, reduction: str, indices: Sequence[int]) -> None:
        """Backward passes, one a batch, whose gradients sum to what these examples add to that of the reference loss."""
        for batch in self.batched(indices, self.batch_tokens):
            tokens = self.tokens[batch.indices].to(self._device)
            whole = float(self.tokens.sum())
            share = 1 / (tokens * len(self)) if reduction == "example" else torch.full_like(tokens, 1 / whole)
            values = losses(batch)
            (values * share.to(values.dtype)[batch.rows]).sum().backward()


def _by_row(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[batch] sums of [labelled] values in fp64."""
    return torch.zeros(len(batch.indices), dtype=torch.float64, device=values.device).index_add_(
        0, batch.rows, values.double()
    )
