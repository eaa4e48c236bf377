"""The reference set on a device, and its loss (Eq. 2).

Shapes: [examples] in the order of the reference set.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from montessori_core.data.sources import load_tasks
from montessori_core.influence.losses import Batch, TokenLosses, group_by_length, make_batch
from montessori_core.models.chat import Encoded
from montessori_core.models.examples import encode_tasks
from montessori_core.program import Report

_ORDER_SEED = 20250211  # arbitrary, but equal for all workers


@dataclass(frozen=True)
class Loss:
    """Losses of reference examples: the sum over the response tokens, and their number. Both [examples]."""

    summed: torch.Tensor
    tokens: torch.Tensor

    def per_example(self) -> torch.Tensor:
        """Return [examples] mean losses over the response tokens, nats per token."""
        return self.summed / self.tokens

    def reduce(self, reduction: str) -> float:
        """Return the reference loss: the mean over examples ('example', Eq. 2) or over all tokens ('token')."""
        if reduction == "example":
            return float(self.per_example().mean())
        return float(self.summed.sum() / self.tokens.sum())

    def of(self, indices: Sequence[int]) -> "Loss":
        """Return the losses of these examples."""
        return Loss(self.summed[list(indices)], self.tokens[list(indices)])


def influence_by_example(before: Loss, after: Loss, reduction: str) -> torch.Tensor:
    """Return [examples] the influence measured on each reference example; the mean is the influence."""
    if reduction == "example":
        return before.per_example() - after.per_example()
    return (before.summed - after.summed) / before.tokens.mean()


def influence_of(before: Loss, after: Loss, reduction: str) -> tuple[float, float]:
    """Return the influence of a step, from the losses before and after it, and its standard error over the examples.

    The error of a single example is NaN.
    """
    differences = influence_by_example(before, after, reduction)
    count = len(differences)
    error = float(differences.std(unbiased=True)) / count**0.5 if count > 1 else math.nan
    return float(differences.mean()), error


def random_order(count: int) -> list[int]:
    """Return a fixed random order of the reference examples, the same for all workers."""
    order = list(range(count))
    random.Random(_ORDER_SEED).shuffle(order)
    return order


class ReferenceSet:
    """Encoded reference examples in length-sorted batches, resident on a device.

    Attributes:
        batches: of all examples.
        batch_tokens: limit of a batch, padding included; a longer example is alone in its batch.
        tokens: response tokens of each example, in fp64.
    """

    def __init__(self, examples: Sequence[Encoded], batch_tokens: int, device: torch.device) -> None:
        """Batch the examples; see the attributes."""
        self._examples, self._device, self.batch_tokens = examples, device, batch_tokens
        self.batches = self.batched(range(len(examples)))
        self.tokens = torch.tensor([example.response_tokens for example in examples], dtype=torch.float64)

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def input_tokens(self) -> int:
        """Number of tokens of one evaluation, without padding."""
        return sum(batch.tokens for batch in self.batches)

    @property
    def truncated(self) -> int:
        """Number of examples whose end is cut."""
        return sum(example.truncated for example in self._examples)

    def batched(self, indices: Sequence[int]) -> list[Batch]:
        """Return batches of the examples at `indices`."""
        lengths = [len(example.input_ids) for example in self._examples]
        groups = group_by_length(lengths, indices, self.batch_tokens)
        return [make_batch([(i, self._examples[i]) for i in group], self._device) for group in groups]

    def evaluate(self, losses: TokenLosses, report: Report = lambda done: None) -> Loss:
        """Return the losses of all examples."""
        return Loss(self.sum_losses(losses, self.batches, report), self.tokens)

    @torch.no_grad()
    def sum_losses(
        self, losses: TokenLosses, batches: Sequence[Batch], report: Report = lambda done: None
    ) -> torch.Tensor:
        """Return [examples] summed losses in fp64; NaN for examples outside the batches."""
        summed = torch.full((len(self),), torch.nan, dtype=torch.float64)
        done = 0
        for batch in batches:
            summed[batch.indices] = _sum_by_row(losses(batch), batch).cpu()
            done += len(batch.indices)
            report(done)
        return summed

    def halves(self) -> tuple[list[int], list[int]]:
        """Split the examples at random; for an odd number the second half has one more."""
        order = random_order(len(self))
        middle = len(order) // 2
        return order[:middle], order[middle:]

    def backward(self, losses: TokenLosses, reduction: str, indices: Sequence[int]) -> torch.Tensor:
        """Run a backward pass per batch; the gradients add up to these examples' part of the reference loss gradient.

        Returns:
            [examples] summed losses in fp64; zero for examples outside `indices`.
        """
        summed = torch.zeros(len(self), dtype=torch.float64)
        total = float(self.tokens.sum())
        for batch in self.batched(indices):
            tokens = self.tokens[batch.indices].to(self._device)
            share = 1 / (tokens * len(self)) if reduction == "example" else torch.full_like(tokens, 1 / total)
            values = losses(batch)
            (values * share.to(values.dtype)[batch.rows]).sum().backward()
            summed[batch.indices] = _sum_by_row(values.detach(), batch).cpu()
        return summed


def open_reference(
    tokenizer: Any, file: Path, max_length: int, batch_tokens: int, device: torch.device
) -> ReferenceSet:
    """Read the tasks of a reference set and tokenize them; see `ReferenceSet`.

    Raises:
        DataError: a task has no response token within `max_length`.
    """
    encoded = encode_tasks(tokenizer, load_tasks(file), max_length, "reference")
    return ReferenceSet(encoded, batch_tokens, device)


def _sum_by_row(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sum [labelled] values by row, in fp64: [batch]."""
    return torch.zeros(len(batch.indices), dtype=torch.float64, device=values.device).index_add_(
        0, batch.rows, values.double()
    )
