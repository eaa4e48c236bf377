"""The reference set on a device, and its loss (Eq. 2): only labelled positions ever reach the vocabulary.

Shapes: [batch, tokens] padded on the right; [examples] in the order the reference set was given.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from montessori_core.chat import IGNORED, Encoded


@dataclass(frozen=True)
class Batch:
    """Reference examples evaluated together.

    Attributes:
        indices: which examples, in the order of the rows.
        input_ids, mask: [batch, tokens].
        kept: [positions] where some row predicts a response token; logits are computed there alone.
        targets: [batch, positions], the token after each kept position, or IGNORED.
    """

    indices: list[int]
    input_ids: torch.Tensor
    mask: torch.Tensor
    kept: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True)
class Loss:
    """Loss of every reference example: summed over its response tokens, and how many there are. Both [examples]."""

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


def influence_of(before: Loss, after: Loss, reduction: str) -> tuple[float, float]:
    """Influence of what lies between two losses, and its standard error over the reference examples."""
    if reduction == "example":
        differences = before.per_example() - after.per_example()
    else:
        # Linearised: each example's share of the token mean.
        differences = (before.summed - after.summed) / before.tokens.mean()
    count = len(differences)
    error = float(differences.std(unbiased=True)) / count**0.5 if count > 1 else float("nan")
    return before.reduce(reduction) - after.reduce(reduction), error


class ReferenceSet:
    """Encoded reference examples in length-sorted batches, resident on a device."""

    def __init__(self, examples: Sequence[Encoded], batch_tokens: int, pad_id: int, device: torch.device) -> None:
        """`batch_tokens` bounds a batch, padding included; a longer example has a batch of its own."""
        self._count = len(examples)
        self._batches = [
            _batch([(i, examples[i]) for i in members], pad_id, device) for members in _groups(examples, batch_tokens)
        ]
        self.tokens = torch.tensor([example.response_tokens for example in examples], dtype=torch.float64)

    def __len__(self) -> int:
        return self._count

    @torch.no_grad()
    def evaluate(self, model: Any, report: Callable[[int], None] = lambda done: None) -> Loss:
        """Loss of every example, summed in fp64."""
        summed = torch.zeros(self._count, dtype=torch.float64)
        done = 0
        for batch in self._batches:
            summed[batch.indices] = _token_losses(model, batch).double().sum(1).cpu()
            done += len(batch.indices)
            report(done)
        return Loss(summed, self.tokens)

    def accumulate_gradient(self, model: Any, reduction: str) -> Loss:
        """Add the gradient of the reference loss to every parameter's `.grad`; also return the loss."""
        summed = torch.zeros(self._count, dtype=torch.float64)
        for batch in self._batches:
            losses = _token_losses(model, batch).sum(1)
            tokens = self.tokens[batch.indices].to(losses)
            if reduction == "example":
                (losses / tokens / self._count).sum().backward()
            else:
                (losses.sum() / float(self.tokens.sum())).backward()
            summed[batch.indices] = losses.detach().double().cpu()
        return Loss(summed, self.tokens)


def example_loss(model: Any, example: Encoded, device: torch.device) -> torch.Tensor:
    """Mean loss of one example over its response tokens, with gradient; what one training step minimises."""
    batch = _batch([(0, example)], 0, device)
    return _token_losses(model, batch).sum() / example.response_tokens


def _token_losses(model: Any, batch: Batch) -> torch.Tensor:
    """[batch, positions] loss in fp32; 0 where there is no target."""
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.mask, logits_to_keep=batch.kept, use_cache=False
    ).logits
    losses = functional.cross_entropy(
        logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(batch.targets)


def _groups(examples: Sequence[Encoded], batch_tokens: int) -> list[list[int]]:
    """Indices of examples that share a batch: neighbours in length, within the token budget."""
    order = sorted(range(len(examples)), key=lambda index: (len(examples[index].input_ids), index))
    groups: list[list[int]] = []
    for index in order:
        longest = len(examples[index].input_ids)  # so far: they come in order of length
        if groups and longest * (len(groups[-1]) + 1) <= batch_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _batch(members: list[tuple[int, Encoded]], pad_id: int, device: torch.device) -> Batch:
    width = max(len(example.input_ids) for _, example in members)
    ids = torch.full((len(members), width), pad_id)
    mask = torch.zeros((len(members), width), dtype=torch.long)
    targets = torch.full((len(members), width), IGNORED)
    for row, (_, example) in enumerate(members):
        length = len(example.input_ids)
        ids[row, :length] = torch.tensor(example.input_ids)
        mask[row, :length] = 1
        targets[row, : length - 1] = torch.tensor(example.labels[1:])
    kept = (targets != IGNORED).any(0).nonzero()[:, 0]
    return Batch(
        [index for index, _ in members], ids.to(device), mask.to(device), kept.to(device), targets[:, kept].to(device)
    )
