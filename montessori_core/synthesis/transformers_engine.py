"""Generation with transformers: the engine for CPUs and for trying things out.

Shapes: [rows] continuations in a batch, [vocabulary] tokens of the model.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from montessori_core.config import Sampling
from montessori_core.models import load_model
from montessori_core.synthesis.generation import Generated, Request

_ROWS = 32  # continuations decoded together: on CPUs a decoding step costs little more for 32 rows than for 8
_STOP_WINDOW = 16  # tokens at the end of a continuation in which a stop string is looked for


class TransformersEngine:
    """A model in bfloat16 on the GPU if there is one, else on the CPU."""

    def __init__(self, model: str, tokenizer: Any) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = load_model(model, torch.bfloat16).to(self._device).eval()
        self._tokenizer = tokenizer

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, stop: str | None, report: Callable[[int], None]
    ) -> list[list[Generated]]:
        """See `Engine.generate`. Requests of similar length share a batch; a prompt is read once for all its seeds."""
        ids = [self._tokenizer(request.prompt, add_special_tokens=False)["input_ids"] for request in requests]
        by_samples: dict[int, list[int]] = {}
        for index in sorted(range(len(requests)), key=lambda i: len(ids[i])):
            by_samples.setdefault(len(requests[index].seeds), []).append(index)
        results: dict[int, list[Generated]] = {}
        for samples, members in by_samples.items():
            size = max(1, _ROWS // samples)
            for start in range(0, len(members), size):
                batch = members[start : start + size]
                seeds = [seed for index in batch for seed in requests[index].seeds]
                rows = self._continue([ids[index] for index in batch], seeds, sampling, stop)
                for position, index in enumerate(batch):
                    results[index] = rows[position * samples : (position + 1) * samples]
                report(len(results))
        return [results[index] for index in range(len(requests))]

    @torch.inference_mode()
    def _continue(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling, stop: str | None
    ) -> list[Generated]:
        samples = len(seeds) // len(prompts)
        width = max(map(len, prompts))
        pad = self._tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=self._device)
        mask = torch.tensor(
            [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self._device
        )

        cache = DynamicCache(config=self._model.config)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        self._model(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=positions[:, :-1],
            past_key_values=cache,
            logits_to_keep=1,
        )
        cache.batch_repeat_interleave(samples)
        ids, mask = ids.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)

        sampler = SeededSampler(ids, mask, seeds, sampling)
        stopping = [_StopString(self._tokenizer, stop, width)] if stop else []
        output = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            do_sample=False,  # the sampler leaves one token to choose from
            max_new_tokens=sampling.max_tokens,
            pad_token_id=pad,
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList(stopping),
        )
        return [self._read(row, sampling.max_tokens, stop) for row in output[:, width:].tolist()]

    def _read(self, tokens: list[int], limit: int, stop: str | None) -> Generated:
        end_ids = self._model.generation_config.eos_token_id
        ends = {end_ids} if isinstance(end_ids, int) else set(end_ids or [])
        length = next((position for position, token in enumerate(tokens) if token in ends), len(tokens))
        ended = length < len(tokens)
        text = self._tokenizer.decode(tokens[:length], skip_special_tokens=True)
        if stop and stop in text:
            return Generated(text[: text.index(stop) + len(stop)], length, "stop")
        return Generated(text, length, "stop" if ended or length < limit else "length")


class SeededSampler(LogitsProcessor):
    """Temperature, nucleus and penalties as vLLM applies them, then one draw per row from the row's own seed.

    The presence penalty counts generated tokens, the repetition penalty those of the prompt as well. All tokens but the
    drawn one get minus infinity.
    """

    def __init__(self, prompt_ids: torch.Tensor, mask: torch.Tensor, seeds: Sequence[int], sampling: Sampling) -> None:
        """`prompt_ids`, `mask`: [rows, prompt tokens], padded on the left; `seeds`: [rows]."""
        self._prompt_ids, self._mask, self._sampling = prompt_ids, mask, sampling
        draws = [np.random.Generator(np.random.Philox(seed)).random(sampling.max_tokens) for seed in seeds]
        self._draws = torch.tensor(np.stack(draws), device=prompt_ids.device)  # [rows, tokens], float64
        self._generated: torch.Tensor | None = None  # [rows, vocabulary]
        self._in_prompt: torch.Tensor | None = None  # [rows, vocabulary]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`input_ids`: [rows, tokens so far]; `scores`: [rows, vocabulary]."""
        step = input_ids.shape[1] - self._prompt_ids.shape[1]
        scores = scores.float()
        self._remember(input_ids, step, scores)
        scores = self._penalize(scores) / self._sampling.temperature
        chosen = draw_from_nucleus(scores.softmax(-1), self._sampling.top_p, self._draws[:, step])
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)

    def _remember(self, input_ids: torch.Tensor, step: int, scores: torch.Tensor) -> None:
        if self._generated is None or self._in_prompt is None:
            self._generated = torch.zeros_like(scores, dtype=torch.bool)
            self._in_prompt = (
                torch.zeros_like(scores, dtype=torch.int32)
                .scatter_add_(1, self._prompt_ids, self._mask.to(torch.int32))
                .bool()
            )
        if step:
            self._generated.scatter_(1, input_ids[:, -1:], True)

    def _penalize(self, scores: torch.Tensor) -> torch.Tensor:
        assert self._generated is not None
        assert self._in_prompt is not None
        factor = self._sampling.repetition_penalty
        if factor != 1.0:
            scaled = torch.where(scores > 0, scores / factor, scores * factor)
            scores = torch.where(self._generated | self._in_prompt, scaled, scores)
        return scores - self._sampling.presence_penalty * self._generated


def draw_from_nucleus(
    probabilities: torch.Tensor, top_p: float, draws: torch.Tensor, sorted_tokens: int = 1024
) -> torch.Tensor:
    """Pick a token from the smallest set of most probable tokens whose mass reaches `top_p`.

    Args:
        probabilities: [rows, vocabulary].
        top_p: mass of the nucleus; 1.0 for all tokens.
        draws: [rows], uniform in [0, 1): where in the nucleus's mass the pick lies.
        sorted_tokens: how many of the most probable tokens are sorted first. Only rows that need more sort all of them.

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


class _StopString(StoppingCriteria):
    """Ends a row once the string stands at the end of what it generated."""

    def __init__(self, tokenizer: Any, stop: str, prompt_width: int) -> None:
        self._tokenizer, self._stop, self._prompt_width = tokenizer, stop, prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        start = max(self._prompt_width, input_ids.shape[1] - _STOP_WINDOW)
        tails = self._tokenizer.batch_decode(input_ids[:, start:])
        return torch.tensor([self._stop in tail for tail in tails], device=input_ids.device)
