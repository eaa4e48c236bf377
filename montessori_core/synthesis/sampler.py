"""Draw tokens from the logits of a batch: penalties, temperature and nucleus as in vLLM, and a seed for every row.

Shapes: [rows] continuations in the batch, [vocabulary] tokens of the model.
"""

from collections.abc import Sequence

import numpy as np
import torch

from montessori_core.config import Sampling


class SeededSampler:
    """Apply temperature, nucleus and penalties like vLLM, then draw a token per row with the row's seed.

    The presence penalty counts generated tokens; the repetition penalty counts tokens of the prompt as well.
    """

    def __init__(self, slots: int, vocabulary: int, sampling: Sampling, device: torch.device) -> None:
        self._sampling = sampling
        self._draws = torch.zeros((slots, sampling.max_tokens), dtype=torch.float64, device=device)
        self._in_prompt = torch.zeros((slots, vocabulary), dtype=torch.bool, device=device)
        self._generated = torch.zeros_like(self._in_prompt)

    def place(self, slot: int, seed: int, prompt: Sequence[int], drawn: Sequence[int]) -> None:
        """Put a row into a slot, given its seed and the token ids of its prompt and those drawn so far."""
        draws = np.random.Generator(np.random.Philox(seed)).random(self._sampling.max_tokens)
        self._draws[slot] = torch.from_numpy(draws)
        for seen, tokens in ((self._in_prompt, prompt), (self._generated, drawn)):
            seen[slot] = False
            seen[slot, torch.tensor(tokens, dtype=torch.long)] = True

    def move(self, source: int, slot: int) -> None:
        """Move a row to another slot."""
        for state in (self._draws, self._in_prompt, self._generated):
            state[slot] = state[source]

    def draw(self, logits: torch.Tensor, steps: Sequence[int]) -> torch.Tensor:
        """Draw a token for the row in each of the first slots.

        Args:
            logits: [rows, vocabulary].
            steps: [rows] number of tokens drawn before.

        Returns:
            [rows] token ids.
        """
        slots = torch.arange(len(steps), device=logits.device)
        scores = self._penalize(logits.float())
        if self._sampling.temperature == 0.0:
            chosen = scores.argmax(-1)
        else:
            probabilities = (scores / self._sampling.temperature).softmax(-1)
            draws = self._draws[slots, torch.tensor(steps, device=logits.device)]
            chosen = draw_from_nucleus(probabilities, self._sampling.top_p, draws)
        self._generated[slots, chosen] = True
        return chosen

    def _penalize(self, scores: torch.Tensor) -> torch.Tensor:
        generated, in_prompt = self._generated[: len(scores)], self._in_prompt[: len(scores)]
        factor, presence = self._sampling.repetition_penalty, self._sampling.presence_penalty
        if factor != 1.0:
            scaled = torch.where(scores > 0, scores / factor, scores * factor)
            scores = torch.where(generated | in_prompt, scaled, scores)
        return scores - presence * generated if presence else scores


def draw_from_nucleus(
    probabilities: torch.Tensor, top_p: float, draws: torch.Tensor, sorted_tokens: int = 1024
) -> torch.Tensor:
    """Draw a token from the nucleus: the smallest set of most probable tokens whose mass reaches `top_p`.

    Args:
        probabilities: [rows, vocabulary].
        top_p: mass of the nucleus; 1.0 for all tokens.
        draws: [rows] uniform in [0, 1): position in the mass of the nucleus.
        sorted_tokens: number of most probable tokens to sort first. All tokens are sorted only for rows that need more.

    Returns:
        [rows] token ids.
    """
    vocabulary = probabilities.shape[1]
    if sorted_tokens < vocabulary:
        top, order = probabilities.topk(sorted_tokens, dim=1)
    else:
        top, order = probabilities.sort(dim=1, descending=True)
    size = order.shape[1]
    mass = top.double().cumsum(1)  # [rows, size]
    if top_p < 1.0:
        before = (mass < top_p).sum(1, keepdim=True)
        last = before.clamp(max=size - 1)
        target = draws[:, None] * mass.gather(1, last)
        beyond = (before == size)[:, 0]
    else:
        last = torch.full_like(order[:, :1], size - 1)
        target = draws[:, None] * probabilities.sum(1, keepdim=True, dtype=torch.float64)
        beyond = (target >= mass[:, -1:])[:, 0]
    chosen = order.gather(1, torch.searchsorted(mass, target, right=True).clamp(max=last))[:, 0]
    if size < vocabulary and beyond.any():
        chosen[beyond] = draw_from_nucleus(probabilities[beyond], top_p, draws[beyond], vocabulary)
    return chosen
