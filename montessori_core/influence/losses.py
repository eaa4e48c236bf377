"""Losses of a causal language model at labelled positions; only these are projected onto the vocabulary.

Batches are padded on the right, so causal attention needs no mask: no response token attends to padding.
Shapes: [batch, tokens]; [labelled] runs over the labelled positions of a batch, row by row.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from montessori_core.errors import UserError
from montessori_core.models.chat import IGNORED, Encoded

_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
LOGITS_AT_A_TIME = 1 << 26
"""Elements of the largest tensor of vocabulary size: 256 MB in fp32."""


@dataclass(frozen=True)
class Batch:
    """Examples of one forward pass.

    Attributes:
        indices: [batch] index of each row's example.
        input_ids: [batch, tokens].
        positions: [labelled] positions in the flattened batch that predict a response token.
        targets: [labelled] the predicted token ids.
        rows: [labelled] the row of each position.
        lengths: number of tokens of each example; the rest of its row is padding.
    """

    indices: list[int]
    input_ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor
    lengths: list[int]

    @property
    def tokens(self) -> int:
        """Number of tokens of all examples, without padding."""
        return sum(self.lengths)


def make_batch(members: Sequence[tuple[int, Encoded]], device: torch.device) -> Batch:
    """Return a batch of examples, each given with its index."""
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
        [len(example.input_ids) for _, example in members],
    )


class TokenLosses:
    """Loss of each response token of a batch under one model, whose weights may change between calls."""

    def __init__(self, model: Any) -> None:
        """Split `model` into its layers and its vocabulary projection.

        Raises:
            UserError: the model changes its logits in an unsupported way.
        """
        causal_lm = model.get_base_model() if hasattr(model, "peft_config") else model
        self._layers, self._head = causal_lm.base_model, causal_lm.get_output_embeddings()
        config = causal_lm.config.get_text_config()
        self._scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        self._softcap = next((cap for name in _SOFTCAPS if (cap := getattr(config, name, None))), None)
        self._check_logits(model)
        self.token_tables = [causal_lm.get_input_embeddings().weight, self._head.weight]

    def __call__(
        self,
        batch: Batch,
        recompute: AbstractContextManager[Any] | None = None,
        projecting: Callable[[slice], AbstractContextManager[Any]] = lambda part: nullcontext(),
    ) -> torch.Tensor:
        """Return [labelled] losses in fp32 (fp64 for an fp64 model), nats.

        Args:
            batch: the examples.
            recompute: context in which the backward pass recomputes logits.
            projecting: returns a context in which some of the labelled positions are projected onto the vocabulary.
        """
        hidden = self._layers(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1)[batch.positions]
        size = max(1, LOGITS_AT_A_TIME // self._head.weight.shape[0])
        parts = [slice(start, start + size) for start in range(0, max(1, len(hidden)), size)]

        def cross_entropy(part: slice, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            with projecting(part):
                return self._cross_entropy(hidden, targets)

        chunks = [(part, hidden[part], batch.targets[part]) for part in parts]
        if len(chunks) == 1 or not torch.is_grad_enabled():
            return torch.cat([cross_entropy(*chunk) for chunk in chunks])
        # Only one chunk's logits are in memory: the backward pass recomputes them.

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            return nullcontext(), recompute or nullcontext()

        return torch.cat(
            [checkpoint(cross_entropy, *chunk, use_reentrant=False, context_fn=contexts) for chunk in chunks]
        )

    def _cross_entropy(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self._logits(hidden)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return functional.cross_entropy(logits.to(dtype), targets, reduction="none")

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._head(hidden)
        if self._scale != 1.0:
            logits = logits * self._scale
        return torch.tanh(logits / self._softcap) * self._softcap if self._softcap else logits

    @torch.no_grad()
    def _check_logits(self, model: Any) -> None:
        ids = torch.arange(8, device=self._head.weight.device)[None]
        logits = self._logits(self._layers(input_ids=ids, use_cache=False).last_hidden_state).float()
        expected = model(input_ids=ids, use_cache=False).logits.float()
        if not torch.allclose(logits, expected, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise UserError(
                f"{type(model).__name__}: this architecture changes its logits after the vocabulary projection in a way "
                "that montessori_core.influence.losses does not support; add it there"
            )


def example_loss(
    losses: TokenLosses, batch: Batch, recompute: AbstractContextManager[Any] | None = None
) -> torch.Tensor:
    """Return the training loss of a batch of one example: the mean over its response tokens."""
    return losses(batch, recompute).mean()


def group_by_length(lengths: Sequence[int], order: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group examples of similar length into batches within a token budget; return their indices.

    An example that exceeds the budget is alone in its batch.

    Args:
        lengths: [examples] tokens of each example.
        order: indices of the examples to group.
        batch_tokens: most tokens of a batch, padding included.
    """
    groups: list[list[int]] = []
    for index in sorted(order, key=lambda index: (lengths[index], index)):
        longest = lengths[index]  # of the group: indices are sorted by length
        if groups and longest * (len(groups[-1]) + 1) <= batch_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
