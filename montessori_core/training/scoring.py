"""Faster log-probabilities for TRL's trainers, with the same results.

TRL calls `model(..., labels=labels, fused_lm_head=True)` for per-token log-probabilities. On CPUs it projects every position
onto the vocabulary, and for DPO the model reads each prompt twice, before the chosen and before the rejected output.

Shapes: [rows] sequences of a batch, chosen ones first; [tokens] of the longest of them; [packed] tokens of a prompt, its
chosen output, the prompt's last token again, and the rejected output; [positions] whose next token has a label.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from montessori_core.errors import UserError
from montessori_core.models import flops
from montessori_core.models.chat import IGNORED

log = logging.getLogger(__name__)

_PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# Tolerances in nats per token, by the dtype of the weights; the second constant is for other dtypes.
_TOLERANCES = {torch.float32: 1e-4}
_TOLERANCE = 0.05  # rounding costs a few hundredths, an ignored attention mask more than one nat
_HEAD_TOLERANCES = {torch.float32: 1e-3}  # logits may be large
_HEAD_TOLERANCE = 0.5
_CHECKED_TOKENS = 16


@dataclass(frozen=True)
class Packed:
    """Pairs of sequences that share a prompt, packed into one row per pair.

    Attributes:
        input_ids: [pairs, packed].
        attention_mask: [pairs, 1, packed, packed], added to attention scores.
        position_ids: [pairs, packed], as in the separate sequences.
        scored: [rows, tokens - 1], index in the flattened [pairs * packed] of each position that predicts a label; -1 for
            other positions.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    scored: torch.Tensor


def pack_pairs(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype
) -> Packed:
    """Pack sequences 0 and n, 1 and n + 1, ... of 2n sequences; the two sequences of a pair start with the same prompt.

    The prompt's last token is repeated before the rejected output, to predict the first token of that output. Outputs attend
    to the prompt and to themselves.

    Args:
        input_ids: [rows, tokens], padded on the right.
        attention_mask: [rows, tokens], 0 for padding.
        labels: [rows, tokens], `IGNORED` in the prompt and the padding. A pair without labels has two empty outputs.
        dtype: dtype of the mask.
    """
    pairs, device = len(input_ids) // 2, input_ids.device
    labelled = labels != IGNORED
    ends = attention_mask.sum(1)
    prompts = torch.where(labelled.any(1), labelled.int().argmax(1), ends)[:pairs]  # number of tokens of each prompt
    outputs = (ends - prompts.repeat(2)).tolist()
    width = max(int(p) + outputs[i] + 1 + outputs[pairs + i] for i, p in enumerate(prompts))
    ids = input_ids.new_zeros(pairs, width)
    positions = torch.zeros(pairs, width, dtype=torch.long, device=device)
    segments = torch.full((pairs, width), -1, device=device)  # 0 prompt, 1 chosen, 2 the repeated token, 3 rejected
    scored = torch.full((len(labels), labels.shape[1] - 1), -1, device=device)
    for pair, prompt in enumerate(prompts.tolist()):
        chosen, rejected = outputs[pair], outputs[pairs + pair]
        end, start = prompt + chosen, prompt + chosen + 1
        ids[pair, :end] = input_ids[pair, :end]
        ids[pair, end : start + rejected] = input_ids[pairs + pair, prompt - 1 : prompt + rejected]
        positions[pair, :end] = torch.arange(end, device=device)
        positions[pair, end : start + rejected] = torch.arange(prompt - 1, prompt + rejected, device=device)
        for segment, first, last in ((0, 0, prompt), (1, prompt, end), (2, end, start), (3, start, start + rejected)):
            segments[pair, first:last] = segment
        offset = pair * width
        scored[pair, prompt - 1 : end - 1] = torch.arange(offset + prompt - 1, offset + end - 1, device=device)
        scored[pairs + pair, prompt - 1 : prompt + rejected - 1] = torch.arange(
            offset + end, offset + end + rejected, device=device
        )
    scored = scored.masked_fill(~labelled[:, 1:], -1)
    query, key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    attends = causal & ((query == key) | ((key == 0) & (query != 2)))
    # The repeated token attends to itself and to the tokens before the original.
    before = torch.arange(width, device=device)[None, None, :] < (prompts - 1)[:, None, None]
    attends |= (query == 2) & (key == 0) & before
    mask = torch.zeros(attends.shape, dtype=dtype, device=device).masked_fill(~attends, torch.finfo(dtype).min)
    return Packed(ids, mask[:, None], positions, scored)


def speed_up_scoring(model: Any, pairs: bool = False) -> None:
    """Patch a model with TRL's fused head: project only labelled positions and, for `pairs`, read each prompt once.

    Call it between TRL's `add_fused_lm_head` and the first forward pass. Models without support for a two-dimensional mask
    (sliding windows, recurrent states, special attention kernels) still read prompts twice: the first batch is computed
    both ways and compared. TRL's head is compared once with the model's.
    """
    causal_lm = model.get_base_model() if hasattr(model, "peft_config") else model
    fused = causal_lm.forward
    packs: bool | None = None if pairs and _has_full_attention(causal_lm) else False
    head_checked = False

    @functools.wraps(fused)  # transformers inspects the signature
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal packs, head_checked
        if not kwargs.get("fused_lm_head") or args or kwargs.get("labels") is None:
            return fused(*args, **kwargs)
        if not head_checked:
            _check_head(causal_lm, fused, kwargs["input_ids"][:1, :_CHECKED_TOKENS])
            head_checked = True
        if packs is None:
            packs = _packing_is_exact(causal_lm, fused, kwargs)
        return _score_packed(causal_lm, fused, kwargs) if packs else _score_rows(causal_lm, fused, kwargs)

    causal_lm.forward = forward


def _has_full_attention(model: Any) -> bool:
    """Return whether no layer has a sliding window or a recurrent state, which a short first batch may not reveal."""
    config = model.config.get_text_config()
    if getattr(model, "_is_stateful", False):  # RWKV and xLSTM have no layer types
        return False
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        # GPT-Neo has window_size.
        return not any(getattr(config, name, None) for name in ("sliding_window", "window_size"))
    return set(layer_types) == {"full_attention"}


@torch.no_grad()
def _check_head(model: Any, fused: Callable[..., Any], ids: torch.Tensor) -> None:
    """Compare the log-probabilities of TRL's fused head with those of the model's logits. `ids`: [1, tokens].

    Raises:
        UserError: the model changes its logits in a way that TRL does not support, such as a soft cap.
    """
    training = model.training
    model.eval()  # no dropout
    logits = fused(input_ids=ids, use_cache=False).logits[:, :-1].float()
    expected = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    difference = float((fused(input_ids=ids, labels=ids, fused_lm_head=True).log_probs - expected).abs().mean())
    model.train(training)
    if difference > _HEAD_TOLERANCES.get(model.dtype, _HEAD_TOLERANCE):
        raise UserError(
            f"{type(model).__name__} changes its logits in a way that TRL's fused head does not support: log-probabilities "
            f"differ by {difference:.3g}; use another model"
        )


def _packing_is_exact(model: Any, fused: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Return whether packed pairs have the same log-probabilities in all processes.

    A model that refuses packed pairs, in every process, reads prompts twice. A process whose GPU fails or is full ends:
    under ZeRO-3 the others wait for its part of the weights.
    """
    with torch.no_grad():
        separate = _score_rows(model, fused, kwargs).log_probs
        try:
            packed = _score_packed(model, fused, kwargs).log_probs
            scored = (kwargs["labels"][:, 1:] != IGNORED).sum().clamp(min=1)
            difference = float((separate - packed).abs().sum() / scored)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (RuntimeError, ValueError, TypeError) as error:
            log.info("prompts are read twice: %s", error)
            difference = math.inf
    worst = torch.tensor(math.inf if math.isnan(difference) else difference, device=separate.device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
    exact = float(worst) < _TOLERANCES.get(model.dtype, _TOLERANCE)
    if not exact:
        log.info("prompts are read twice: log-probabilities of this model differ by %.3g if pairs are packed", worst)
    return exact


def _score_rows(model: Any, fused: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    labels = kwargs["labels"]
    scored = torch.arange(labels.numel(), device=labels.device).view(labels.shape)[:, :-1]
    return _score(model, fused, kwargs, {}, scored.masked_fill(labels[:, 1:] == IGNORED, -1))


def _score_packed(model: Any, fused: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    packed = pack_pairs(kwargs["input_ids"], kwargs["attention_mask"], kwargs["labels"], model.dtype)
    inputs = {
        "input_ids": packed.input_ids,
        "attention_mask": packed.attention_mask,
        "position_ids": packed.position_ids,
    }
    return _score(model, fused, kwargs, inputs, packed.scored)


def _score(
    model: Any, fused: Callable[..., Any], kwargs: dict[str, Any], inputs: dict[str, Any], scored: torch.Tensor
) -> Any:
    """Project only the positions in `scored`; return per-token results as [rows, tokens - 1], zero where it is -1."""
    labelled = scored >= 0
    next_tokens = kwargs["labels"][:, 1:][labelled][None]  # [1, positions]
    with _select_positions(model.base_model, scored[labelled]):
        output = fused(**kwargs | inputs | {"labels": None, "shift_labels": next_tokens})
    flops.record_pass([model.get_output_embeddings().weight], next_tokens.numel())
    for name in (*_PER_TOKEN, "label_mask"):
        values = getattr(output, name)
        if values is not None:
            setattr(output, name, values.new_zeros(labelled.shape).masked_scatter(labelled, values))
    return output


@contextmanager
def _select_positions(backbone: Any, positions: torch.Tensor) -> Iterator[None]:
    """Make a backbone return the hidden states at `positions` of the flattened batch: [1, positions, hidden]."""

    def select(module: Any, args: Any, output: Any) -> Any:
        hidden = output.last_hidden_state
        output.last_hidden_state = hidden.reshape(-1, hidden.shape[-1])[positions][None]
        return output

    handle = backbone.register_forward_hook(select)
    try:
        yield
    finally:
        handle.remove()
