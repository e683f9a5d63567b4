"""One step as one flat forward pass: `T` tokens of many sequences side by side, without padding.

First the sequences that compute a single token, in order of their rows, then longer chunks of prompts, one after the
other. Attention is split into jobs: neighbouring rows of similar length share one call, each chunk has its own.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from server.engine.backends.hf.kv_store import KvStore

LENGTH_STEP = 16  # attention lengths are rounded up to this, so that shapes repeat
CALL_CELLS = 1024  # one more attention call costs about as much as reading this many cells in vain
HIDDEN = float("-inf")


@dataclass(frozen=True)
class Part:
    """Tokens of one sequence: `token_ids` go into the cells from `start` on of `row`."""

    row: int
    start: int
    token_ids: Seq[int]
    slot: int = -1  # adapter
    wants_all: bool = False  # logits after every token, not only after the last

    @property
    def cells(self) -> range:
        return range(self.start, self.start + len(self.token_ids))


@dataclass
class _Job:
    """Queries `first..end` of the batch against the first `length` cells of `rows`: either one query for each row, or
    all queries for one row."""

    first: int
    end: int
    rows: slice
    length: int
    positions: Tensor  # [queries]
    _masks: dict[int | None, Tensor] = field(default_factory=dict)
    _bias: Tensor | None = None

    @property
    def is_decode(self) -> bool:
        return bool(self.end - self.first == self.rows.stop - self.rows.start)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """0 for what a query sees, -inf for the rest: `[queries, length]`. Made once, used by all layers."""
        if window not in self._masks:
            distance = self._distance()
            hidden = distance > 0 if window is None else (distance > 0) | (distance <= -window)
            visible = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            self._masks[window] = visible.masked_fill_(hidden, HIDDEN)
        return self._masks[window]

    def bias(self, slopes: Tensor, dtype: torch.dtype) -> Tensor:
        """The mask with ALiBi's distances in it, `[heads, queries, length]`; all layers have the same slopes."""
        if self._bias is None:
            distances = slopes.float()[:, None, None] * self._distance()
            self._bias = (distances + self.mask(None, torch.float32)).to(dtype)
        return self._bias

    def _distance(self) -> Tensor:
        """Cell minus query position, `[queries, length]`."""
        return torch.arange(self.length, device=self.positions.device) - self.positions[:, None]


class Batch:
    """What a forward pass needs to know: `token_ids`, `positions` and `rows` are `[T]`, `wanted` is `[W]`."""

    def __init__(self, parts: Seq[Part], store: KvStore) -> None:
        singles = sorted((i for i, part in enumerate(parts) if len(part.token_ids) == 1), key=lambda i: parts[i].row)
        self.order = [*singles, *(i for i, part in enumerate(parts) if len(part.token_ids) > 1)]  # places in `parts`
        self.parts = [parts[i] for i in self.order]
        self.store = store
        device = store.shape.device
        self.token_ids = torch.tensor([token for part in self.parts for token in part.token_ids], device=device)
        self.positions = torch.tensor([place for part in self.parts for place in part.cells], device=device)
        self.rows = torch.tensor([part.row for part in self.parts for _ in part.token_ids], device=device)
        self.slots = [part.slot for part in self.parts for _ in part.token_ids]
        wanted = _wanted(self.parts)
        self.wanted = torch.tensor(wanted, device=device)
        self.wanted_slots = [self.slots[index] for index in wanted]
        self._jobs = self._decode_jobs(len(singles)) + self._chunk_jobs(len(singles))

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store the tokens' `keys` and `values` (`[T, kv_heads, head_dim]`) in their cells."""
        self.store.write(layer, self.rows, self.positions, keys, values)

    def attend(
        self,
        layer: int,
        queries: Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
        slopes: Tensor | None = None,
    ) -> Tensor:
        """Attend with `queries` (`[T, heads, head_dim]`) to cells that hold these tokens' keys and values already.

        A query sees its own row's cells up to its own, at most the last `window` of them. `slopes` (`[heads]`) are
        ALiBi's, https://arxiv.org/abs/2108.12409.
        """
        outs = [self._run(job, layer, queries[job.first : job.end], scale, window, slopes) for job in self._jobs]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _run(
        self, job: _Job, layer: int, queries: Tensor, scale: float | None, window: int | None, slopes: Tensor | None
    ) -> Tensor:
        keys = self.store.keys[layer][job.rows, :, : job.length]
        values = self.store.values[layer][job.rows, :, : job.length]
        num, heads, size = queries.shape
        bias = job.mask(window, queries.dtype)[None] if slopes is None else job.bias(slopes, queries.dtype)
        if job.is_decode:
            # The query heads of one KV head stand in the query axis: keys are read once, and not repeated.
            grouped = queries.reshape(num, keys.shape[1], -1, size)
            bias = bias.transpose(0, 1)[:, :, None]
            out = scaled_dot_product_attention(grouped, keys, values, attn_mask=bias, scale=scale)
            return out.reshape(num, heads, size)
        out = scaled_dot_product_attention(
            queries.transpose(0, 1)[None], keys, values, attn_mask=bias[None], scale=scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    def _decode_jobs(self, num_singles: int) -> list[_Job]:
        """Runs of neighbouring rows; a row that is much longer than the others gets a call of its own."""
        jobs = []
        first = 0
        for index in range(1, num_singles + 1):
            if index == num_singles or not self._belongs(first, index):
                jobs.append(self._job(first, index, first, index))
                first = index
        return jobs

    def _belongs(self, first: int, index: int) -> bool:
        """True if one call for parts `first..index` is cheaper than a call more."""
        parts = self.parts[first : index + 1]
        if parts[-1].row != parts[-2].row + 1:
            return False
        longest = max(part.start for part in parts)
        before = max(part.start for part in parts[:-1])
        wasted = longest * len(parts) - before * (len(parts) - 1) - parts[-1].start
        return wasted <= CALL_CELLS

    def _chunk_jobs(self, first: int) -> list[_Job]:
        jobs, token = [], first
        for index in range(first, len(self.parts)):
            end = token + len(self.parts[index].token_ids)
            jobs.append(self._job(token, end, index, index + 1))
            token = end
        return jobs

    def _job(self, first: int, end: int, first_part: int, end_part: int) -> _Job:
        parts = self.parts[first_part:end_part]
        length = max(part.start + len(part.token_ids) for part in parts)
        length = min(-(-length // LENGTH_STEP) * LENGTH_STEP, self.store.capacity)
        rows = slice(parts[0].row, parts[-1].row + 1)
        return _Job(first, end, rows, length, self.positions[first:end])


def _wanted(parts: Seq[Part]) -> list[int]:
    indices: list[int] = []
    end = 0
    for part in parts:
        start, end = end, end + len(part.token_ids)
        indices += range(start, end) if part.wants_all else [end - 1]
    return indices
