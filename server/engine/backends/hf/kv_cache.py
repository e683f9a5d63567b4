"""The KV store: one row per running sequence, in the shape that a transformers model writes to and reads from.

Per layer there are two tensors `[rows, kv_heads, capacity, head_dim]`. Rows are always used from 0 on without holes, so
attention reads plain views. Cells nobody uses are always zero: attention gives them weight 0, and 0 times a stray NaN
would still be NaN. It knows nothing about requests: who owns which row, and how many cells are enough, is
the scheduler's business.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

CELL_STEP = 16  # attention lengths are rounded up to this, so that shapes repeat
SMALLEST_CAPACITY = 64


@dataclass(frozen=True)
class KvShape:
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_cell(self) -> int:
        """Keys and values of one token, all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class Span:
    """The cells one forward pass writes: rows `first_row..` each at `positions[row]` (`[B, q]`), and reads up to
    `length`."""

    first_row: int
    positions: Tensor
    length: int

    def mask(self) -> Tensor:
        """Which cells each query sees: bool `[B, 1, q, length]`, true up to and including its own."""
        cells = torch.arange(self.length, device=self.positions.device)
        return cells <= self.positions[:, None, :, None]


class SlotCache(Cache):
    """transformers' cache interface over the store. Set `span` before each forward pass.

    `max_cells` bounds rows x capacity for good; callers keep `rows x longest reservation` below it.
    """

    def __init__(self, shape: KvShape, max_rows: int, max_cells: int) -> None:
        self._slots = [_SlotLayer(shape) for _ in range(shape.num_layers)]
        super().__init__(layers=list(self._slots))
        self.shape = shape
        self.max_rows = max_rows
        self.max_cells = max_cells
        self.num_rows = 0
        self.capacity = 0

    def set_span(self, first_row: int, positions: Tensor, length: int) -> Span:
        """The next forward pass computes `positions` (`[B, q]`, all below `length`) of rows `first_row ..`."""
        span = Span(first_row, positions, min(_round_up(length, CELL_STEP), self.capacity))
        for layer in self._slots:
            layer.span = span
        return span

    def reserve(self, rows: int, cells: int, longest: int) -> None:
        """Make room for `rows` rows of `cells` cells now. `longest` is the most cells any live row may ever need;
        `rows * longest <= max_cells` must hold, so later growth always has room."""
        if rows <= self.num_rows and cells <= self.capacity:
            return
        capacity = self.capacity if cells <= self.capacity else max(cells, 2 * self.capacity, SMALLEST_CAPACITY)
        capacity = max(cells, min(_round_up(capacity, CELL_STEP), longest))
        num_rows = self.num_rows if rows <= self.num_rows else max(rows, 2 * self.num_rows)
        self._resize(max(rows, min(num_rows, self.max_rows, self.max_cells // capacity)), capacity)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` cells of a row."""
        for layer in self._slots:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy a row's cells and clear where they were."""
        self.copy_row(source, target, length)
        self.clear_row(source, length)

    def clear_row(self, row: int, length: int) -> None:
        for layer in self._slots:
            layer.keys[row, :, :length] = 0
            layer.values[row, :, :length] = 0

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.capacity * self.shape.bytes_per_cell

    def release(self) -> None:
        """Let go of the whole store."""
        self._resize(0, 0)

    def _resize(self, num_rows: int, capacity: int) -> None:
        """Layer by layer, so that at most one layer exists twice. Fresh cells are zero."""
        rows, cells = min(num_rows, self.num_rows), min(capacity, self.capacity)
        for layer in self._slots:
            layer.keys = _resized(layer.keys, num_rows, capacity, rows, cells)
            layer.values = _resized(layer.values, num_rows, capacity, rows, cells)
        self.num_rows, self.capacity = num_rows, capacity


class _SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    def __init__(self, shape: KvShape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        empty = torch.empty((0, shape.num_kv_heads, 0, shape.head_dim), dtype=shape.dtype, device=shape.device)
        self.keys: Tensor = empty
        self.values: Tensor = empty.clone()
        self.is_initialized = True
        self.span: Span | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write `[B, kv_heads, q, head_dim]` at the span's cells; return what attention reads, without a copy."""
        assert self.span is not None, "set_span() comes before the forward pass"
        first, end = self.span.first_row, self.span.first_row + key_states.shape[0]
        rows = torch.arange(first, end, device=key_states.device)[:, None]
        self.keys[rows, :, self.span.positions] = key_states.transpose(1, 2)
        self.values[rows, :, self.span.positions] = value_states.transpose(1, 2)
        length = self.span.length
        return self.keys[first:end, :, :length], self.values[first:end, :, :length]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: SlotCache sizes the store."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        assert self.span is not None
        return self.span.length, 0

    def get_seq_length(self) -> int:
        return 0 if self.span is None else self.span.length

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])


def _resized(old: Tensor, num_rows: int, capacity: int, rows: int, cells: int) -> Tensor:
    new = old.new_zeros((num_rows, old.shape[1], capacity, old.shape[3]))
    new[:rows, :, :cells] = old[:rows, :, :cells]
    return new


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
