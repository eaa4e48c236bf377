"""Pad an epoch so that every example counts once, for any number of processes.

If processes x micro_batch_size does not divide the number of examples, accelerate fills the last step of an epoch with
examples from its beginning, which then count twice. We fill it with rows without loss, at the end of the epoch.
"""

import math
import os
from collections.abc import Iterator
from typing import Any

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Sampler

from montessori_core.config import Optimization, TeacherUpdate


def padding_rows(examples: int, recipe: Optimization) -> int:
    """Return the number of rows to add to `examples` so that all processes have full micro-batches."""
    return -examples % (recipe.micro_batch_size * int(os.environ["WORLD_SIZE"]))


class PaddedSampler(Sampler[int]):
    """Yield the examples in random order, different in each epoch; then the padding, the last rows of the data set."""

    def __init__(self, examples: int, padding: int, seed: int) -> None:
        self._shuffled = SeedableRandomSampler(range(examples), data_seed=seed)
        self._padding = range(examples, examples + padding)

    def __len__(self) -> int:
        return len(self._shuffled) + len(self._padding)

    def __iter__(self) -> Iterator[int]:
        yield from self._shuffled
        yield from self._padding

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; accelerate calls it."""
        self._shuffled.set_epoch(epoch)


class EvenSteps:
    """Mixin for a trainer whose data set ends with rows of padding.

    Attributes:
        padding: number of these rows.
    """

    padding = 0

    def _get_train_sampler(self, train_dataset: Any = None) -> PaddedSampler:
        arguments, rows = self.args, self.train_dataset  # type: ignore[attr-defined]
        return PaddedSampler(len(rows) - self.padding, self.padding, arguments.data_seed)


class EvenPairs(EvenSteps):
    """Mixin for a DPO trainer. The padding has empty outputs: the loss of its pairs is a constant, its gradient zero.

    Attributes:
        recipe: recipe of the training.
    """

    recipe: TeacherUpdate

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Remove the padding's part from the loss and metrics of the last step, which TRL averages over all rows."""
        self._choose_losses(inputs)
        loss = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        rows, batch_size = len(self.train_dataset), self.recipe.batch_size  # type: ignore[attr-defined]
        steps = math.ceil(rows / batch_size)
        if not self.padding or (self.state.global_step + 1) % steps:  # type: ignore[attr-defined]
            return loss
        rows -= (steps - 1) * batch_size  # of the last step
        pairs = rows - self.padding
        metrics = self._metrics["train"]  # type: ignore[attr-defined]
        for name in metrics:
            if name.startswith(("rewards/", "logps/")):
                metrics[name][-1] *= rows / pairs
        recipe = self.recipe
        without_margin = (2 * recipe.beta) ** -2 if recipe.loss == "ipo" else math.log(2)
        return (loss * rows - without_margin * self.padding) / pairs

    def _choose_losses(self, inputs: Any) -> None:
        """Set TRL's losses for a micro-batch. Its likelihood counts by its share of pairs: TRL averages over their tokens."""
        weights: dict[str, float] = {self.recipe.loss: 1.0}
        if self.recipe.sft_weight and (share := float(inputs["completion_mask"].any(1).float().mean())):
            weights["sft"] = self.recipe.sft_weight * share
        self.loss_types, self.loss_weights = list(weights), list(weights.values())
