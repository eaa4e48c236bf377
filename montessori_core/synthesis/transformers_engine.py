"""Generation with transformers: the engine for CPUs and for experiments.

Continuous batching: a row that ends leaves the batch at once, and a waiting row takes its slot. The common prefix of all
prompts of a call is read once; a prompt with several continuations is read once, too.

Shapes: [rows] continuations in the batch, [vocabulary] tokens of the model.
"""

import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from montessori_core.config import Sampling
from montessori_core.errors import UserError
from montessori_core.models.chat import encode_rendered, end_tokens
from montessori_core.models.load import load_merged
from montessori_core.processor import generation_dtype
from montessori_core.synthesis.generation import Generated, Progress, Request, Step
from montessori_core.synthesis.row_cache import SLACK, RowCache, fits_row_cache

_MAX_ROWS = 32  # of a batch: on CPUs a decoding step costs little more for 32 rows than for 8
_CACHE_BYTES = 2 * 2**30  # limit of the keys and values of a batch; large models decode fewer rows
_READ_TOKENS = 512  # per forward pass: enough to keep a CPU busy, few enough to report progress
_READ_COST = 0.3  # of a token read, in tokens written; measured with SmolLM2
_PADDING = 0  # a masked token id; the tokenizer's padding token may be missing in the model
_STOP_WINDOW = 16  # last tokens of a continuation in which the stop string is searched


class TransformersEngine:
    """A model in bfloat16 on the GPU if there is one, else on the CPU in its fastest dtype."""

    def __init__(self, model: str, tokenizer: Any) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if self._device.type == "cuda" else getattr(torch, generation_dtype())
        self._model = load_merged(model, dtype).to(self._device).eval()
        self._tokenizer = tokenizer
        self._ends = end_tokens(tokenizer, self._model.generation_config)
        text_config = self._model.config.get_text_config()
        self._positions: int | None = getattr(text_config, "max_position_embeddings", None)

    def generate(self, requests: Sequence[Request], sampling: Sampling, stop: str | None) -> Iterator[Step]:
        """See `Engine.generate`. A continuation ends at the model's last position, as with vLLM.

        Raises:
            UserError: a prompt is too long for the model's positions.
        """
        if not requests:
            return
        texts = {request.prompt for request in requests}
        prompts = {text: encode_rendered(self._tokenizer, text)[0] for text in texts}
        longest = max(map(len, prompts.values()))
        if self._positions is not None and longest >= self._positions:
            raise UserError(
                f"a prompt has {longest} tokens, and the model has {self._positions} positions for prompt and output; use "
                "fewer demonstrations (synthesis.seed_demonstrations) or a model with more positions"
            )
        rows = [
            _Row(index, request.seed, prompts[request.prompt], list(request.drawn))
            for index, request in enumerate(requests)
        ]
        # Longest first: adjacent rows have similar lengths, and equal contexts are adjacent.
        waiting = sorted(rows, key=lambda row: (row.length, row.context), reverse=True)
        unfinished = {row.index: row for row in rows}
        counts = Counter(tuple(row.context) for row in rows)
        progress = Progress([_READ_COST * row.length / counts[tuple(row.context)] for row in rows], sampling.max_tokens)
        batch = _Batch(self._model, rows, sampling)
        while unfinished:
            finished: dict[int, Generated] = {}
            if not batch.read(waiting):
                batch.decode()
                slots = [slot for slot, row in enumerate(batch.rows) if self._has_ended(row, sampling, stop)]
                for slot in slots:
                    row = unfinished.pop(batch.rows[slot].index)
                    finished[row.index] = self._finish(row, stop)
                    progress.end(finished[row.index].tokens)
                batch.remove(slots)
            yield Step(
                finished,
                lambda: {row.index: list(row.drawn) for row in unfinished.values() if row.drawn},
                progress.done((row.index, len(row.drawn)) for row in batch.rows),
            )

    def _has_ended(self, row: "_Row", sampling: Sampling, stop: str | None) -> bool:
        if row.drawn[-1] in self._ends or len(row.drawn) >= sampling.max_tokens:
            return True
        if len(row.prompt) + len(row.drawn) == self._positions:
            return True
        return stop is not None and stop in self._tokenizer.decode(row.drawn[-_STOP_WINDOW:])

    def _finish(self, row: "_Row", stop: str | None) -> Generated:
        ended = row.drawn[-1] in self._ends
        tokens = row.drawn[:-1] if ended else row.drawn
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        if stop and stop in text:
            return Generated(text[: text.index(stop) + len(stop)], len(tokens), "stop", row.drawn)
        return Generated(text, len(tokens), "stop" if ended else "length", row.drawn)


@dataclass
class _Row:
    """A continuation: the index of its request, its seed, and the token ids of its prompt and those drawn so far."""

    index: int
    seed: int
    prompt: list[int]
    drawn: list[int]

    @property
    def context(self) -> list[int]:
        """Tokens to read before decoding; the decoding step reads the last token."""
        return (self.prompt + self.drawn)[:-1]

    @property
    def length(self) -> int:
        """Length of the context."""
        return len(self.prompt) + len(self.drawn) - 1


class _Batch:
    """Rows that a model decodes together.

    Models with states other than keys and values (Mamba and other recurrent layers) use the cache of transformers: rows
    leave one by one, but new rows enter only an empty batch.

    Attributes:
        rows: [slots in use].
    """

    @torch.inference_mode()
    def __init__(self, model: Any, rows: Sequence[_Row], sampling: Sampling) -> None:
        """Read the common prefix of the contexts of `rows`, all rows that the batch will decode."""
        self.rows: list[_Row] = []
        self._ready: list[tuple[_Row, Any, int]] = []  # read, but without a slot; see `_read_group`
        self._model, self._device = model, model.device
        self._slots, self._joins = min(_MAX_ROWS, len(rows)), fits_row_cache(model.config)
        parameters = inspect.signature(getattr(model, "get_base_model", lambda: model)().forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"  # until transformers 5.23
        self._prefix: Any = None
        self._shared = self._width = 0  # length of the prefix; columns in use
        if self._joins:
            contexts = [row.context for row in rows]
            self._shared = _common_length(min(contexts), max(contexts))  # their common prefix is that of all contexts
            self._prefix = self._run([contexts[0][: self._shared] or [_PADDING]], 0)
            longest = max(len(row.prompt) for row in rows) + sampling.max_tokens + SLACK
            self._slots = max(1, min(self._slots, _CACHE_BYTES // (self._prefix.token_bytes * longest)))
        self._cache: Any = self._new_cache(self._slots)
        self._sampler = SeededSampler(
            self._slots, model.get_output_embeddings().weight.shape[0], sampling, self._device
        )

    @torch.inference_mode()
    def read(self, waiting: list[_Row]) -> bool:
        """Move rows from the front of `waiting`, longest first, into the batch; return whether any row moved."""
        free = self._slots - len(self.rows) if self._joins or not self.rows else 0
        if not free or not (waiting or self._ready):
            return False
        if not self._ready:
            self._ready = self._read_group(waiting, free)
        joining, self._ready = self._ready[:free], self._ready[free:]
        slots = range(len(self.rows), len(self.rows) + len(joining))
        self.rows += [row for row, _, _ in joining]
        if self._joins:
            self._width = max(self._width, *(row.length for row, _, _ in joining))
            self._cache.use(len(self.rows), self._width)
        else:
            self._cache, self._width = joining[0][1], joining[0][0].length
            self._cache.reorder_cache(torch.tensor([place for _, _, place in joining], device=self._device))
        for slot, (row, cache, place) in zip(slots, joining, strict=True):
            self._sampler.place(slot, row.seed, row.prompt, row.drawn)
            if self._joins:
                self._cache.copy_row(cache, place, row.length, slot)
        return True

    def _read_group(self, waiting: list[_Row], free: int) -> list[tuple[_Row, Any, int]]:
        """Read contexts for about `free` rows; return all rows with these contexts, each with a cache and its row there.

        A context is read once, so more than `free` rows may be returned.
        """
        contexts: list[list[int]] = []
        places: list[int] = []
        for row in waiting:
            if contexts[-1:] != [row.context]:
                tokens = (len(contexts) + 1) * (len(waiting[0].context) - self._shared)
                if len(places) >= free or (self._joins and contexts and tokens > _READ_TOKENS):
                    break
                contexts.append(row.context)
            elif len(places) >= free and not self._joins:
                break  # the cache of transformers cannot keep rows outside the batch
            places.append(len(contexts) - 1)
        cache = self._run(contexts, self._shared)
        group = [(row, cache, place) for row, place in zip(waiting, places, strict=False)]
        del waiting[: len(group)]
        return group

    @torch.inference_mode()
    def decode(self) -> None:
        """Draw a token for every row."""
        lengths = torch.tensor([row.length for row in self.rows], device=self._device)
        if self._joins:
            self._width = int(lengths.max())  # longer rows may have left
            self._cache.use(len(self.rows), self._width)
        columns = torch.arange(self._width + 1, device=self._device)
        mask = (columns >= self._width - lengths[:, None]).long()
        ids = torch.tensor([[(row.drawn or row.prompt)[-1]] for row in self.rows], device=self._device)
        logits = self._forward(ids, mask, lengths[:, None], self._cache)
        self._width += 1
        drawn = self._sampler.draw(logits, [len(row.drawn) for row in self.rows])
        for row, token in zip(self.rows, drawn.tolist(), strict=True):
            row.drawn.append(token)

    @torch.inference_mode()
    def remove(self, slots: Sequence[int]) -> None:
        """Remove rows; the last rows take their slots."""
        order = list(range(len(self.rows)))
        for slot in sorted(slots, reverse=True):
            order[slot] = order[-1]
            order.pop()
        for slot, source in enumerate(order):
            if slot != source:
                self._sampler.move(source, slot)
                if self._joins:
                    self._cache.copy_row(self._cache, source, self.rows[source].length, slot)
        if order and slots and not self._joins:
            self._cache.reorder_cache(torch.tensor(order, device=self._device))
        self.rows = [self.rows[source] for source in order]

    def _run(self, contexts: Sequence[Sequence[int]], shared: int) -> Any:
        """Read contexts, the longest first; return their cache. The first `shared` tokens of each are in the prefix.

        The same number of tokens is read of each: a shorter context reads the end of the prefix again, or is padded.
        """
        width = len(contexts[0])
        cache = self._new_cache(len(contexts))
        if shared:
            cache.use(len(contexts), shared)
            for row, context in enumerate(contexts):
                reread = min(shared, width - len(context))
                cache.copy_row(self._prefix, 0, shared - reread, row, skipped=reread)
        padded = [[_PADDING] * (width - len(context)) + list(context) for context in contexts]
        ids = torch.tensor(padded, device=self._device)
        lengths = torch.tensor([len(context) for context in contexts], device=self._device)
        positions = torch.arange(width, device=self._device) - (width - lengths[:, None])  # negative in the padding
        for start in range(shared, width, _READ_TOKENS if self._joins else max(1, width)):
            end = start + _READ_TOKENS if self._joins else width
            mask = (positions[:, :end] >= 0).long()
            self._forward(ids[:, start:end], mask, positions[:, start:end].clamp(min=0), cache)
        return cache

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        """Return [rows, vocabulary] logits of the next token. `ids`, `positions`: [rows, tokens]; `mask`: [rows, columns]."""
        if all(cache.is_linear) and cache.has_previous_state():
            mask = None  # without attention there are no columns to mask
        output = self._model(
            input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1, **{self._cache_name: cache}
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _new_cache(self, rows: int) -> Any:
        config = self._model.config
        return RowCache(config, rows) if self._joins else DynamicCache(config=config)


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the common prefix of two sequences."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))


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
