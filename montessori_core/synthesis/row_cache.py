"""A cache of keys and values with exchangeable rows, for continuous batching with any attention of transformers.

Rows are aligned at their ends, so the next column is the next position of every row, and a sliding window, which
transformers measures in columns, is correct for each row. Columns before a row's first token are finite and must be masked.
Tokens are appended in place; the cache of transformers copies all keys and values at every step.

Shapes: [slots, heads, columns, size of a head] buffers. The first `rows` slots are in use, and `width` columns of each.
"""

from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

SLACK = 128  # free columns after a reallocation


def fits_row_cache(config: Any) -> bool:
    """Return whether a model's cache has keys and values only; Mamba's has other states."""
    types = {type(layer) for layer in DynamicCache(config=config).layers}
    return types <= {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}


class RowCache(Cache):
    """Keys and values of up to `slots` rows; see the module."""

    def __init__(self, config: Any, slots: int) -> None:
        layers = DynamicCache(config=config).layers
        super().__init__(
            layers=[_RowLayer(slots) if isinstance(layer, DynamicLayer) else DummyLayer() for layer in layers]
        )
        self._row_layers = [layer for layer in self.layers if isinstance(layer, _RowLayer)]

    @property
    def token_bytes(self) -> int:
        """Bytes per token of a row."""
        return sum(layer.token_bytes for layer in self._row_layers)

    def use(self, rows: int, width: int) -> None:
        """Set the number of rows and columns in use. The caller must mask or write those that were not in use before."""
        for layer in self._row_layers:
            layer.reserve(width)
            layer.rows, layer.width = rows, width

    def copy_row(self, source: "RowCache", row: int, length: int, slot: int, skipped: int = 0) -> None:
        """Copy `length` columns of a row of `source`, which precede its last `skipped` ones, to the end of a slot in use."""
        for layer, other in zip(self._row_layers, source._row_layers, strict=True):
            layer.copy_row(other, row, length, slot, skipped)


class _RowLayer(DynamicLayer):
    def __init__(self, slots: int) -> None:
        super().__init__()
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
