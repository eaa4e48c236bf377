"""Losses of a causal language model at labelled positions: nothing else ever reaches the vocabulary.

Batches are padded on the right, so that causal attention needs no mask: what a token sees never includes padding.
Shapes: [batch, tokens]; [labelled] runs over the labelled positions of a batch, row by row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from montessori_core.errors import UserError
from montessori_core.models.chat import IGNORED, Encoded

LOGITS_AT_A_TIME = 1 << 26
"""Elements of the largest tensor of vocabulary size: 256 MB in fp32."""


@dataclass(frozen=True)
class Batch:
    """Examples that go through the model together.

    Attributes:
        indices: which examples, in the order of the rows.
        input_ids: [batch, tokens].
        positions: [labelled] where a response token is predicted, in the flattened batch.
        targets: [labelled], that token.
        rows: [labelled], its row.
        tokens: of all examples, without padding.
    """

    indices: list[int]
    input_ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor
    tokens: int


def make_batch(members: Sequence[tuple[int, Encoded]], device: torch.device) -> Batch:
    """Put examples, each with its index, into one batch."""
    width = max(len(example.input_ids) for _, example in members)
    ids = torch.zeros((len(members), width), dtype=torch.long)
    following = torch.full((len(members), width), IGNORED)
    for row, (_, example) in enumerate(members):
        length = len(example.input_ids)
        ids[row, :length] = torch.tensor(example.input_ids)
        following[row, : length - 1] = torch.tensor(example.labels[1:])
    positions = (following.flatten() != IGNORED).nonzero()[:, 0]
    return Batch(
        [index for index, _ in members],
        ids.to(device),
        positions.to(device),
        following.flatten()[positions].to(device),
        (positions // width).to(device),
        sum(len(example.input_ids) for _, example in members),
    )


class TokenLosses:
    """Loss of each response token of a batch under one model, which may change its weights between calls."""

    def __init__(self, model: Any) -> None:
        """Take `model` apart into its layers and its vocabulary projection.

        Raises:
            UserError: the model does something else to its logits, so that the parts are not the whole.
        """
        whole = model.get_base_model() if hasattr(model, "peft_config") else model
        self._layers, self._head = whole.base_model, whole.get_output_embeddings()
        text = whole.config.get_text_config()
        self._scale = float(getattr(text, "logit_scale", None) or 1.0) / float(
            getattr(text, "logits_scaling", None) or 1.0
        )
        self._softcap: float | None = getattr(text, "final_logit_softcapping", None)
        self._check(model)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """[labelled] loss in fp32 (fp64 for a model of fp64), nats."""
        hidden = self._layers(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1)[batch.positions]
        size = max(1, LOGITS_AT_A_TIME // self._head.weight.shape[0])
        pieces = list(zip(hidden.split(size), batch.targets.split(size), strict=True))
        if len(pieces) == 1 or not torch.is_grad_enabled():
            return torch.cat([self._predict(*piece) for piece in pieces])
        # Logits of one piece at a time: they are computed again on the way back.
        return torch.cat([checkpoint(self._predict, *piece, use_reentrant=False) for piece in pieces])

    def _predict(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self._logits(hidden)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return functional.cross_entropy(logits.to(wide), targets, reduction="none")

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._head(hidden)
        if self._scale != 1.0:
            logits = logits * self._scale
        return torch.tanh(logits / self._softcap) * self._softcap if self._softcap else logits

    @torch.no_grad()
    def _check(self, model: Any) -> None:
        ids = torch.arange(8, device=self._head.weight.device)[None]
        ours = self._logits(self._layers(input_ids=ids, use_cache=False).last_hidden_state).float()
        theirs = model(input_ids=ids, use_cache=False).logits.float()
        if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise UserError(
                f"{type(model).__name__}: this architecture changes its logits after the vocabulary projection in a way "
                "that montessori_core.influence.losses does not know; add it there"
            )


def example_loss(losses: TokenLosses, batch: Batch) -> torch.Tensor:
    """Mean loss over the response tokens of a batch of one example: what one training step minimises."""
    return losses(batch).mean()


def group_by_length(lengths: Sequence[int], order: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of examples that share a batch: neighbours in length, within the token budget, padding included.

    A longer example than the budget has a batch of its own.

    Args:
        lengths: of all examples, tokens.
        order: the examples to be grouped.
        batch_tokens: the budget.
    """
    groups: list[list[int]] = []
    for index in sorted(order, key=lambda index: (lengths[index], index)):
        longest = lengths[index]  # so far: they come in order of length
        if groups and longest * (len(groups[-1]) + 1) <= batch_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
