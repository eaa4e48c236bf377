"""Generation with transformers: the engine for CPUs and for experiments.

Continuous batching: a row that ends leaves the batch at once, and a waiting row takes its slot. The common prefix of all
prompts of a call is read once; a prompt with several continuations is read once, too. A model whose cache cannot do this
(RWKV, xLSTM, RecurrentGemma, MiniMax) generates row by row and reads the whole row for every token.

Shapes: [rows] continuations in the batch, [vocabulary] tokens of the model.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from montessori_core.config import Sampling
from montessori_core.models.control_tokens import encode_rendered
from montessori_core.models.load import load_merged
from montessori_core.models.prefix import common_prefix
from montessori_core.models.rendering import end_tokens
from montessori_core.processor import generation_dtype
from montessori_core.synthesis.engine import Generated, Progress, Request, Step
from montessori_core.synthesis.row_cache import SLACK, Reading, RowCache, cache_parameter, find_reading
from montessori_core.synthesis.sampler import SeededSampler

_MAX_ROWS = {"cpu": 64, "cuda": 512}  # of a batch. With 64, a token takes 18 % less time than with 32 (SmolLM2, AVX2)
_CACHE_BYTES = {"cpu": 2 * 2**30, "cuda": 8 * 2**30}  # limit of the cache of a batch; large models decode fewer rows
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
        self.positions: int | None = getattr(text_config, "max_position_embeddings", None)
        self._reading = find_reading(self._model)

    def generate(self, requests: Sequence[Request], sampling: Sampling, stop: str | None) -> Iterator[Step]:
        """See `Engine.generate`. A continuation ends at the model's last position, as with vLLM."""
        if not requests:
            return
        texts = {request.prompt for request in requests}
        prompts = {text: encode_rendered(self._tokenizer, text)[0] for text in texts}
        rows = [
            _Row(index, request.seed, prompts[request.prompt], list(request.drawn))
            for index, request in enumerate(requests)
        ]
        # Longest first: adjacent rows have similar lengths, and equal contexts are adjacent.
        waiting = sorted(rows, key=lambda row: (row.length, row.context), reverse=True)
        unfinished = {row.index: row for row in rows}
        counts = Counter(tuple(row.context) for row in rows)
        progress = Progress([_READ_COST * row.length / counts[tuple(row.context)] for row in rows], sampling.max_tokens)
        if self._reading == "again":
            batch: _Batch | _SingleRow = _SingleRow(self._model, rows, sampling)
        else:
            batch = _Batch(self._model, rows, sampling, self._reading)
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
        if len(row.prompt) + len(row.drawn) == self.positions:
            return True
        return stop is not None and stop in self._tokenizer.decode(row.drawn[-_STOP_WINDOW:], skip_special_tokens=True)

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

    Recurrent layers include padding in their states, and a state cannot be cut: for models that have them, only contexts of
    one length are read together.

    Attributes:
        rows: [slots in use].
    """

    @torch.inference_mode()
    def __init__(self, model: Any, rows: Sequence[_Row], sampling: Sampling, reading: Reading) -> None:
        """Read the common prefix of the contexts of `rows`, all rows that the batch will decode."""
        self.rows: list[_Row] = []
        self._ready: list[tuple[_Row, RowCache, int]] = []  # read, but without a slot; see `_read_group`
        self._model, self._device = model, model.device
        self._slots = min(_MAX_ROWS[self._device.type], len(rows))
        in_parts = reading == "in parts"
        self._cache_name, self._read_tokens = cache_parameter(model), _READ_TOKENS if in_parts else None
        contexts = [row.context for row in rows]
        shared = common_prefix(min(contexts), max(contexts)) if in_parts else 0  # of all contexts
        self._shared = self._width = 0  # length of the prefix; columns in use
        self._prefix = self._run([contexts[0][:shared] or [_PADDING]])
        self._shared = shared
        longest = max(len(row.prompt) for row in rows) + sampling.max_tokens + SLACK
        self._slots = max(1, min(self._slots, _CACHE_BYTES[self._device.type] // self._prefix.bytes_of_row(longest)))
        self._cache = RowCache(model.config, self._slots)
        self._sampler = SeededSampler(self._slots, _vocabulary(model), sampling, self._device)

    @torch.inference_mode()
    def read(self, waiting: list[_Row]) -> bool:
        """Move rows from the front of `waiting`, longest first, into the batch; return whether any row moved."""
        free = self._slots - len(self.rows)
        if not free or not (waiting or self._ready):
            return False
        if not self._ready:
            self._ready = self._read_group(waiting, free)
        joining, self._ready = self._ready[:free], self._ready[free:]
        slots = range(len(self.rows), len(self.rows) + len(joining))
        self.rows += [row for row, _, _ in joining]
        self._width = max(self._width, *(row.length for row, _, _ in joining))
        self._cache.use(len(self.rows), self._width)
        for slot, (row, cache, place) in zip(slots, joining, strict=True):
            self._sampler.place(slot, row.seed, row.prompt, row.drawn)
            self._cache.copy_row(cache, place, row.length, slot)
        return True

    def _read_group(self, waiting: list[_Row], free: int) -> list[tuple[_Row, RowCache, int]]:
        """Read contexts for about `free` rows; return all rows with these contexts, each with a cache and its row there.

        A context is read once, so more than `free` rows may be returned.
        """
        contexts: list[list[int]] = []
        places: list[int] = []
        for row in waiting:
            if contexts[-1:] != [row.context]:
                tokens = (len(contexts) + 1) * (len(waiting[0].context) - self._shared)
                if len(places) >= free or (contexts and tokens > _READ_TOKENS):
                    break
                if contexts and self._prefix.has_states and len(contexts[0]) != row.length:
                    break
                contexts.append(row.context)
            places.append(len(contexts) - 1)
        cache = self._run(contexts)
        group = [(row, cache, place) for row, place in zip(waiting, places, strict=False)]
        del waiting[: len(group)]
        return group

    @torch.inference_mode()
    def decode(self) -> None:
        """Draw a token for every row."""
        lengths = torch.tensor([row.length for row in self.rows], device=self._device)
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
                self._cache.copy_row(self._cache, source, self.rows[source].length, slot)
        self.rows = [self.rows[source] for source in order]

    def _run(self, contexts: Sequence[Sequence[int]]) -> RowCache:
        """Read contexts, the longest first; return their cache. The first `_shared` tokens of each are in the prefix.

        The same number of tokens is read of each: a shorter context reads the end of the prefix again, or is padded.
        """
        width, shared = len(contexts[0]), self._shared
        cache = RowCache(self._model.config, len(contexts))
        if shared:
            cache.use(len(contexts), shared)
            for row, context in enumerate(contexts):
                reread = min(shared, width - len(context))
                cache.copy_row(self._prefix, 0, shared - reread, row, skipped=reread)
        padded = [[_PADDING] * (width - len(context)) + list(context) for context in contexts]
        ids = torch.tensor(padded, device=self._device)
        lengths = torch.tensor([len(context) for context in contexts], device=self._device)
        positions = torch.arange(width, device=self._device) - (width - lengths[:, None])  # negative in the padding
        step = self._read_tokens or max(1, width)
        for start in range(shared, width, step):
            end = start + step
            mask = (positions[:, :end] >= 0).long()
            self._forward(ids[:, start:end], mask, positions[:, start:end].clamp(min=0), cache)
        return cache

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, cache: RowCache
    ) -> torch.Tensor:
        """Return [rows, vocabulary] logits of the next token. `ids`, `positions`: [rows, tokens]; `mask`: [rows, columns]."""
        if all(cache.is_linear):
            mask = None  # no columns to mask: contexts that are read together have one length
        output = self._model(
            input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1, **{self._cache_name: cache}
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits


class _SingleRow:
    """A batch of one row, read again for every token: for a model whose cache does not fit `RowCache`.

    Attributes:
        rows: the row that is decoded, if any.
    """

    def __init__(self, model: Any, rows: Sequence[_Row], sampling: Sampling) -> None:
        """`rows`: all rows that will be decoded."""
        self.rows: list[_Row] = []
        self._model = model
        self._sampler = SeededSampler(1, _vocabulary(model), sampling, model.device)

    def read(self, waiting: list[_Row]) -> bool:
        """Take the first row of `waiting` if no row is decoded; return whether one was taken."""
        if self.rows or not waiting:
            return False
        row = waiting.pop(0)
        self.rows = [row]
        self._sampler.place(0, row.seed, row.prompt, row.drawn)
        return True

    @torch.inference_mode()
    def decode(self) -> None:
        """Draw a token."""
        [row] = self.rows
        ids = torch.tensor([row.prompt + row.drawn], device=self._model.device)
        logits = self._model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        row.drawn.append(int(self._sampler.draw(logits, [len(row.drawn)])))

    def remove(self, slots: Sequence[int]) -> None:
        """Remove the row if `slots` has its slot."""
        if slots:
            self.rows = []


def _vocabulary(model: Any) -> int:
    """Return the number of a model's logits."""
    return int(model.get_output_embeddings().weight.shape[0])
