"""Reading only as much of the reference set as the sign of an influence needs.

Reference examples are read in blocks of one fixed random order. After each block a t-test on the paired differences asks
whether the mean over the *whole* set can still have the other sign. The allowed error is spent evenly over the looks, so
that their union stays within it (Bonferroni); the whole set, read to its end, decides exactly and spends nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy.special import stdtrit

from montessori_core.influence.losses import Batch, TokenLosses
from montessori_core.influence.reference import Loss, ReferenceSet, random_order


@dataclass(frozen=True)
class Look:
    """One more block of reference examples: its batches, and all examples seen once it is read."""

    batches: list[Batch]
    seen: list[int]


class SequentialReference:
    """The reference set, cut into looks.

    Attributes:
        looks: in their order; the last has seen the whole set.
        look_error_rate: what each look but the last may spend.
    """

    def __init__(self, reference: ReferenceSet, block: int, error_rate: float) -> None:
        """`block` examples at a look; `error_rate` bounds the share of wrong signs."""
        order = random_order(len(reference))
        ends = [*range(block, len(order), block), len(order)]
        starts = [0, *ends[:-1]]
        self._reference, self._count = reference, len(order)
        self.looks = [
            Look(reference.batched(order[start:end], reference.batch_tokens), sorted(order[:end]))
            for start, end in zip(starts, ends, strict=True)
        ]
        self.look_error_rate = error_rate / max(1, len(self.looks) - 1)

    def evaluate(
        self, losses: TokenLosses, differences: Callable[[Loss, Sequence[int]], torch.Tensor]
    ) -> tuple[Loss, list[int], int]:
        """Evaluate until the sign is decided.

        Args:
            losses: of the stepped student.
            differences: from the losses of some examples, and which they are, [examples] whose mean has the sign.

        Returns:
            The losses of the examples seen, which they are, and how many tokens were read.
        """
        summed = torch.full((self._count,), torch.nan, dtype=torch.float64)
        tokens = 0
        for look in self.looks:
            found = self._reference.sum_losses(losses, look.batches)
            summed = torch.where(found.isnan(), summed, found)
            tokens += sum(batch.tokens for batch in look.batches)
            loss = Loss(summed, self._reference.tokens).of(look.seen)
            if is_decided(differences(loss, look.seen), self._count, self.look_error_rate):
                break
        return loss, look.seen, tokens


def is_decided(differences: torch.Tensor, count: int, error_rate: float) -> bool:
    """Whether the mean over all `count` examples has the sign of the mean seen so far, but for `error_rate`.

    Args:
        differences: [seen] of the examples drawn so far, without replacement.
        count: examples in the whole set.
        error_rate: two-sided.
    """
    seen = len(differences)
    if seen >= count:
        return True
    if seen < 2:
        return False
    mean, deviation = float(differences.mean()), float(differences.std(unbiased=True))
    error = deviation * ((1 - seen / count) / seen) ** 0.5
    return bool(abs(mean) > error * stdtrit(seen - 1, 1 - error_rate / 2))
