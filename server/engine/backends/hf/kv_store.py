"""The KV store: one row of cells per sequence, `[layers, 2, rows, kv_heads, capacity, head_dim]`.

On Linux CPUs the store is one lazy mapping: every row may grow to the model's whole context, memory is used only where
cells were written, and trimming a row gives its pages back. The kernel's page table is the block table, so attention
reads plain views and nothing is ever moved to make room. Elsewhere the store is an ordinary tensor.

Cells that were never written are zero. It knows nothing about sequences: who owns which row is `rows.py`'s business.
"""

import math
import mmap
import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.errors import ConfigError

PAGE_BYTES = mmap.PAGESIZE
MAP_NORESERVE = 0x4000  # Linux's value; mmap names it from Python 3.13 on


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

    @property
    def page_cells(self) -> int:
        """Cells of one head that together fill whole pages: memory is taken and given back in these steps."""
        return PAGE_BYTES // math.gcd(PAGE_BYTES, self.head_dim * self.dtype.itemsize)

    def round_up(self, cells: int) -> int:
        return -(-cells // self.page_cells) * self.page_cells


def kv_shape(model: PreTrainedModel) -> KvShape:
    """The shape of a model's keys and values, by its config; dtype and device are the model's."""
    config = model.config
    num_heads = config.num_attention_heads
    return KvShape(
        num_layers=config.num_hidden_layers,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        dtype=model.dtype,
        device=model.device,
    )


class KvStore:
    """`keys[layer]` and `values[layer]` are views `[rows, kv_heads, capacity, head_dim]`."""

    def __init__(self, shape: KvShape, num_rows: int, capacity: int) -> None:
        self.shape = shape
        self.num_rows = num_rows
        self.capacity = shape.round_up(capacity)
        sizes = (shape.num_layers, 2, num_rows, shape.num_kv_heads, self.capacity, shape.head_dim)
        self._map = _lazy_map(math.prod(sizes) * shape.dtype.itemsize) if is_lazy(shape) else None
        with torch.inference_mode(False):  # such a tensor may be written in either mode
            if self._map is None:
                self._cells = torch.zeros(sizes, dtype=shape.dtype, device=shape.device)
            else:
                self._cells = torch.frombuffer(self._map, dtype=shape.dtype).view(sizes)
        self.keys = [self._cells[layer, 0] for layer in range(shape.num_layers)]
        self.values = [self._cells[layer, 1] for layer in range(shape.num_layers)]

    def write(self, layer: int, rows: Tensor, cells: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store `keys` and `values` (`[T, kv_heads, head_dim]`) at `cells[t]` of `rows[t]`."""
        self.keys[layer][rows, :, cells] = keys
        self.values[layer][rows, :, cells] = values

    def put(self, row: int, block: Tensor) -> None:
        """Write a row's first cells, all layers: `[layers, 2, n, kv_heads, head_dim]`."""
        self._cells[:, :, row, :, : block.shape[2]] = block.transpose(2, 3)

    def take(self, row: int, length: int) -> Tensor:
        """A copy of a row's first cells, in `put`'s shape."""
        return self._cells[:, :, row, :, :length].transpose(2, 3).clone()

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """Copy the cells `start..end` of a row, all layers."""
        self._cells[:, :, target, :, start:end] = self._cells[:, :, source, :, start:end]

    def trim(self, row: int, kept: int, held: int) -> None:
        """Forget the cells from `kept` on, of which those below `held` may have been written."""
        assert held <= self.capacity, "those beyond are another head's, or another row's"
        first = min(self.shape.round_up(kept), held)
        self._cells[:, :, row, :, kept:first] = 0
        if first >= held:
            return
        if self._map is None:
            self._cells[:, :, row, :, first:held] = 0
            return
        cell_bytes = self.shape.head_dim * self.shape.dtype.itemsize
        head_bytes = self.capacity * cell_bytes
        row_bytes = head_bytes * self.shape.num_kv_heads
        length = (self.shape.round_up(held) - first) * cell_bytes
        for plane in range(2 * self.shape.num_layers):
            begin = (plane * self.num_rows + row) * row_bytes + first * cell_bytes
            for head in range(self.shape.num_kv_heads):
                self._map.madvise(mmap.MADV_DONTNEED, begin + head * head_bytes, length)


def is_lazy(shape: KvShape) -> bool:
    """True where address space costs nothing until it is written."""
    return shape.device.type == "cpu" and sys.platform == "linux"


def _lazy_map(num_bytes: int) -> mmap.mmap:
    """Address space without memory behind it: pages come, zeroed, when they are first written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    try:
        mapping = mmap.mmap(-1, num_bytes, flags=flags)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The system refuses {num_bytes / 2**30:.0f} GiB of address space for the KV store ({error}). "
            "Lower QLOOP_MAX_NUM_SEQS or QLOOP_MAX_MODEL_LEN, or lift the limit (ulimit -v)."
        ) from error
    mapping.madvise(mmap.MADV_NOHUGEPAGE)  # a huge page per head would be mostly empty
    return mapping
