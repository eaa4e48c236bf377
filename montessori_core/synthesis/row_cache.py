"""A cache with exchangeable rows, for continuous batching with any attention and most recurrent layers of transformers.

Keys and values: rows are aligned at their ends, so the next column is the next position of every row, and a sliding window,
which transformers measures in columns, is correct for each row. Columns before a row's first token are finite and must be
masked. Tokens are appended in place; the cache of transformers copies all keys and values at every step.

Recurrent layers (Mamba, linear attention, short convolutions) have states of fixed size, one of each for a row. A state
cannot be cut: it includes all tokens that were read.

A trial finds models that keep their states elsewhere, and models that forget a state when several tokens follow it (Mamba's
first version, which transformers continues only by single tokens).

Shapes: [slots, heads, columns, size of a head] buffers of keys and values; [slots, ...] states. The first `rows` slots are in
use, and `width` columns of each.
"""

import inspect
import logging
from typing import Any, Literal

import torch
from transformers import Cache, DynamicCache, cache_utils
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

log = logging.getLogger(__name__)

Reading = Literal["in parts", "whole", "again"]
"""How a model reads a context: `in parts`; `whole`, because it forgets its state when several tokens follow; or without a
cache, `again` for every token."""

_EMPTY = getattr(cache_utils, "DummyLayer", None)
"""A layer without a cache; older releases of transformers have none."""
_STATES = ("conv_states", "recurrent_states")
SLACK = 128  # free columns after a reallocation


class RowCache(Cache):
    """Keys, values and states of up to `slots` rows; see the module."""

    def __init__(self, config: Any, slots: int) -> None:
        """Create an empty cache for a model.

        Raises:
            ValueError: a layer of the model keeps something else.
        """
        super().__init__(layers=[_row_layer(layer, slots) for layer in DynamicCache(config=config).layers])
        self._row_layers = [layer for layer in self.layers if isinstance(layer, _RowLayer)]
        self._state_layers = [layer for layer in self.layers if isinstance(layer, _StateLayer)]

    @property
    def has_states(self) -> bool:
        """Whether there are recurrent layers."""
        return bool(self._state_layers)

    @property
    def is_complete(self) -> bool:
        """Whether the model has written its states here; a model may keep them elsewhere."""
        return self.bytes_of_row(1) > 0 and all(layer.state_bytes for layer in self._state_layers)

    def bytes_of_row(self, length: int) -> int:
        """Return the bytes of a row of `length` tokens."""
        states = sum(layer.state_bytes for layer in self._state_layers)
        return states + length * sum(layer.token_bytes for layer in self._row_layers)

    def states(self, name: str) -> list[torch.Tensor]:
        """Return the states of all layers that have this name, of the rows in use."""
        return [state for layer in self._state_layers for state in getattr(layer, name).values() if state is not None]

    def use(self, rows: int, width: int) -> None:
        """Set the number of rows and columns in use. The caller must mask or write those that were not in use before."""
        for layer in self._row_layers:
            layer.reserve(width)
            layer.rows, layer.width = rows, width
        for states in self._state_layers:
            states.use(rows)

    def copy_row(self, source: "RowCache", row: int, length: int, slot: int, skipped: int = 0) -> None:
        """Copy `length` columns of a row of `source`, which precede its last `skipped` ones, to the end of a slot in use.

        States are copied as they are, so a model that has them needs `skipped` = 0.
        """
        for layer, other in zip(self._row_layers, source._row_layers, strict=True):
            layer.copy_row(other, row, length, slot, skipped)
        for states, others in zip(self._state_layers, source._state_layers, strict=True):
            states.copy_states(others, row, slot)


class _RowLayer(DynamicLayer):
    def __init__(self, slots: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rows = self.width = 0
        self._slots, self._end = slots, 0
        self._buffers: list[torch.Tensor] = []  # keys and values

    @property
    def token_bytes(self) -> int:
        return sum(buffer[0, :, 0].nbytes for buffer in self._buffers)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._allocate_like(key_states, value_states)
        self.rows, appended = key_states.shape[0], key_states.shape[2]
        self.reserve(self.width, appended)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[: self.rows, :, self._end : self._end + appended] = states
        self._end += appended
        self.width += appended
        keys, values = (buffer[: self.rows, :, self._end - self.width : self._end] for buffer in self._buffers)
        return keys, values

    def get_seq_length(self) -> int:
        return self.width

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.width + query_length, 0

    def reserve(self, width: int, appended: int = 0) -> None:
        """Ensure `width` columns before the end of the rows, and `appended` free columns after it."""
        if not self._buffers:
            self._end = width
            return
        if self._end >= width and self._end + appended <= self._buffers[0].shape[2]:
            return
        width = max(width, self.width)
        for place, old in enumerate(self._buffers):
            new = old.new_zeros((*old.shape[:2], width + appended + SLACK, old.shape[3]))
            new[: self.rows, :, width - self.width : width] = old[: self.rows, :, self._end - self.width : self._end]
            self._buffers[place] = new
        self._end = width

    def copy_row(self, source: "_RowLayer", row: int, length: int, slot: int, skipped: int) -> None:
        if not length:
            return
        self._allocate_like(*source._buffers)
        end = source._end - skipped
        for buffer, other in zip(self._buffers, source._buffers, strict=True):
            buffer[slot, :, self._end - length : self._end] = other[row, :, end - length : end]

    def _allocate_like(self, *states: torch.Tensor) -> None:
        if not self._buffers:
            self._buffers = [s.new_zeros((self._slots, s.shape[1], self._end + SLACK, s.shape[3])) for s in states]


class _StateLayer(LinearAttentionLayer):
    """The states of a recurrent layer. `conv_states` and `recurrent_states` are the rows in use of the buffers."""

    def __init__(self, slots: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._state_slots, self._state_rows = slots, 0
        self._states: dict[tuple[str, int], torch.Tensor] = {}  # by the name and number of a state

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of a row."""
        return sum(buffer[0].nbytes for buffer in self._states.values())

    def lazy_initialization(self, *, state_idx: int = 0, **states: Any) -> None:
        """Allocate the buffer of a state; transformers calls it with the first states of the rows in use."""
        super().lazy_initialization(state_idx=state_idx, **states)
        for name in _STATES:
            if states.get(name) is not None:
                first = getattr(self, name)[state_idx]
                self._state_rows = len(first)
                self._states[name, state_idx] = first.new_zeros((self._state_slots, *first.shape[1:]))
        self.use(self._state_rows)

    def use(self, rows: int) -> None:
        """Set the number of rows in use."""
        self._state_rows = rows
        for (name, number), buffer in self._states.items():
            getattr(self, name)[number] = buffer[:rows]

    def copy_states(self, source: "_StateLayer", row: int, slot: int) -> None:
        """Copy the states of a row of `source` to a slot in use."""
        for key, other in source._states.items():
            name, number = key
            if key not in self._states:
                self._states[key] = other.new_zeros((self._state_slots, *other.shape[1:]))
                getattr(self, f"is_{name}_initialized")[number] = True
            self._states[key][slot] = other[row]
            self.has_previous_state[number] = True
        for name in ("dtype", "device", "conv_kernel_size"):
            setattr(self, name, getattr(source, name))
        self.use(self._state_rows)


class _HybridLayer(_StateLayer, _RowLayer):
    """A layer with attention and a recurrence, such as Falcon-H1's."""

    def __init__(self, slots: int, **kwargs: Any) -> None:
        _RowLayer.__init__(self, slots)
        _StateLayer.__init__(self, slots, **kwargs)


def _row_layer(layer: Any, slots: int) -> Any:
    """Return the layer with exchangeable rows that replaces a layer of a `DynamicCache`."""
    kind = type(layer)
    if kind is _EMPTY:
        return kind()
    if kind in (DynamicLayer, DynamicSlidingWindowLayer):
        return _RowLayer(slots)
    if kind is LinearAttentionLayer:
        return _StateLayer(slots, number_of_states=layer.number_of_states)
    if kind in (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer):
        return _HybridLayer(slots, number_of_states=layer.number_of_states)
    raise ValueError(f"the model's cache has layers of type {kind.__name__}")


def cache_parameter(model: Any) -> str:
    """Return the name of the cache's parameter; until transformers 5.23 it was past_key_values or cache_params."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), "cache_params")


def find_reading(model: Any) -> Reading:
    """Try how a model can read contexts with a `RowCache`; log a warning if it cannot."""
    try:
        cache, _ = _read_twice(model, 1)
        problem = "" if cache.is_complete else "it keeps states outside the cache"
    except (ValueError, TypeError, AttributeError, LookupError) as error:  # of a model with a cache of its own
        problem = str(error)
    if problem:
        log.warning("%s generates row by row and reads a row again for every token: %s", type(model).__name__, problem)
        return "again"
    if not cache.has_states:
        return "in parts"
    _, remembered = _read_twice(model, 2)
    forgets = any(torch.equal(_read_twice(model, 2, name)[1], remembered) for name in _STATES if cache.states(name))
    return "whole" if forgets else "in parts"


@torch.inference_mode()
def _read_twice(model: Any, tokens: int, cleared: str | None = None) -> tuple[RowCache, torch.Tensor]:
    """Read two tokens, then `tokens` more.

    Args:
        model: the model.
        tokens: number of tokens of the second read.
        cleared: name of states to clear between the reads.

    Returns:
        The cache and the logits of the second read.
    """
    cache = RowCache(model.config, 1)
    ids = torch.arange(2 + tokens, device=model.device)[None]
    options = {cache_parameter(model): cache}
    model(input_ids=ids[:, :2], position_ids=torch.arange(2, device=model.device)[None], **options)
    for state in cache.states(cleared) if cleared else ():
        state.zero_()
    positions = torch.arange(2, 2 + tokens, device=model.device)[None]
    return cache, model(input_ids=ids[:, 2:], position_ids=positions, **options).logits
