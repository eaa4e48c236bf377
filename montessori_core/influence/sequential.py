"""Sequential evaluation: stop reading the reference set once the sign of an influence is decided.

Reference examples are read in blocks of a fixed random order. After each block (an interim *look*) a t-test on the paired
differences decides whether the mean over the *full* set can still have the other sign. The error rate is divided evenly
among the interim looks (Bonferroni). The last look has the full set: it is exact and needs no share of the error rate.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy.special import stdtrit

from montessori_core.influence.losses import Batch, TokenLosses
from montessori_core.influence.reference import Loss, ReferenceSet, random_order


@dataclass(frozen=True)
class Look:
    """One look: the batches of its block, and the indices of all examples read so far."""

    batches: list[Batch]
    seen: list[int]


class SequentialReference:
    """The reference set, split into looks.

    Attributes:
        looks: looks in order; the last one has seen the full set.
        look_error_rate: error rate of each interim look.
    """

    def __init__(self, reference: ReferenceSet, block: int, error_rate: float) -> None:
        """Split into blocks of `block` examples; `error_rate` bounds the share of wrong signs."""
        order = random_order(len(reference))
        ends = [*range(block, len(order), block), len(order)]
        starts = [0, *ends[:-1]]
        self._reference, self._count = reference, len(order)
        self.looks = [
            Look(reference.batched(order[start:end]), sorted(order[:end]))
            for start, end in zip(starts, ends, strict=True)
        ]
        self.look_error_rate = error_rate / max(1, len(self.looks) - 1)

    def evaluate(
        self, losses: TokenLosses, differences: Callable[[Loss, Sequence[int]], torch.Tensor]
    ) -> tuple[Loss, list[int], int]:
        """Evaluate until the sign is decided.

        Args:
            losses: token losses of the student after the step.
            differences: maps losses of examples, and their indices, to [examples] values whose mean has the sign.

        Returns:
            The losses of the examples seen, their indices, and the number of tokens read.
        """
        summed = torch.full((self._count,), torch.nan, dtype=torch.float64)
        tokens = 0
        for look in self.looks:
            block = self._reference.sum_losses(losses, look.batches)
            summed = torch.where(block.isnan(), summed, block)
            tokens += sum(batch.tokens for batch in look.batches)
            loss = Loss(summed, self._reference.tokens).of(look.seen)
            if is_decided(differences(loss, look.seen), self._count, self.look_error_rate):
                break
        return loss, look.seen, tokens


def is_decided(differences: torch.Tensor, count: int, error_rate: float) -> bool:
    """Return whether the mean over all `count` examples has the sign of the mean so far, with error `error_rate`.

    Args:
        differences: [seen] differences of the examples drawn so far, without replacement.
        count: examples in the full set.
        error_rate: two-sided error rate.
    """
    seen = len(differences)
    if seen >= count:
        return True
    if seen < 2:
        return False
    mean, deviation = float(differences.mean()), float(differences.std(unbiased=True))
    error = deviation * ((1 - seen / count) / seen) ** 0.5
    return bool(abs(mean) > error * stdtrit(seen - 1, 1 - error_rate / 2))
