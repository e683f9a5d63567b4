"""Which adapter each token of a batch has, in the forms in which linear maps ask for it.

The columns of a LoRA are what its rank counts: a row of A with a column of B. Those of all adapters on one linear map
lie side by side, `Columns`, and each token owns its adapter's.
"""

import itertools
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

Columns = tuple[tuple[int, int], ...]  # (owning slot, number of columns) of every LoRA, side by side
BASE = -1  # the slot of a token without an adapter
BLOCK = 32  # columns that compiled kernels take at a time
MAX_GAP = 64  # computing this many columns for nothing costs less than the three calls of another span


@dataclass(frozen=True)
class Span:
    """Columns `start` to `end` of a projection; `others [T, end - start]` is True where a column is not the token's."""

    start: int
    end: int
    others: Tensor | None  # None: all columns are every token's own

    def own(self, hidden: Tensor) -> Tensor:
        """`[..., T, end - start]` with zeros where a column is not the token's, in place."""
        if self.others is not None:
            hidden.view(-1, *self.others.shape).masked_fill_(self.others, 0)
        return hidden


@dataclass(frozen=True)
class Blocks:
    """The `BLOCK`s of columns that a batch needs."""

    own: Tensor  # int32 [T, 2]: a token's own columns, first and end; equal if it has none
    live: Tensor  # int32: the blocks that hold some token's columns, ascending


class SlotMap:
    """Which adapter slot each token of the current batch has; shared by all projections, which ask alike questions.

    `slots` is `[T]`, or None when the whole batch is for the base model.
    """

    def __init__(self) -> None:
        self.slots: Tensor | None = None
        self._list: Sequence[int] = []
        self._spans: dict[Columns, tuple[Span, ...]] = {}
        self._blocks: dict[Columns, Blocks] = {}
        self._rows: dict[tuple[int, ...], Tensor | None] = {}

    def set(self, slots: Sequence[int], device: torch.device) -> None:
        """The slot of each token of the next forward pass. What is known of an equal batch is kept."""
        if self._list == slots:
            return
        self.clear()
        if any(slot != BASE for slot in slots):
            self._list = list(slots)
            self.slots = torch.tensor(self._list, device=device)

    def clear(self) -> None:
        """No batch: what its slots meant may change now."""
        self.slots = None
        self._list = []
        self._spans.clear()
        self._blocks.clear()
        self._rows.clear()

    def spans(self, columns: Columns) -> tuple[Span, ...]:
        """Which of the columns this batch needs."""
        if columns not in self._spans:
            self._spans[columns] = tuple(self._cut(columns))
        return self._spans[columns]

    def blocks(self, columns: Columns) -> Blocks:
        """The same in blocks."""
        found = self._blocks.get(columns)
        if found is None:
            ends = list(itertools.accumulate(count for _, count in columns))
            ranges = {slot: (end - count, end) for (slot, count), end in zip(columns, ends, strict=True)}
            own = [ranges.get(slot, (0, 0)) for slot in self._list]
            live = {block for start, end in {*own} for block in range(start // BLOCK, -(-end // BLOCK))}
            found = Blocks(torch.tensor(own, dtype=torch.int32), torch.tensor(sorted(live), dtype=torch.int32))
            self._blocks[columns] = found
        return found

    def rows(self, owners: tuple[int, ...]) -> Tensor | None:
        """Index `[T]`: 1 + the place of the token's slot in `owners`, 0 if absent. None if no token's slot is there."""
        if owners not in self._rows:
            places = {slot: place for place, slot in enumerate(owners, start=1)}
            rows = [places.get(slot, 0) for slot in self._list]
            assert self.slots is not None
            self._rows[owners] = self.slots.new_tensor(rows) if any(rows) else None
        return self._rows[owners]

    def _cut(self, columns: Columns) -> Iterator[Span]:
        present = {*self._list}
        owners = [slot for slot, count in columns for _ in range(count)]
        bounds: list[tuple[int, int]] = []
        end = 0
        for slot, count in columns:
            start, end = end, end + count
            if slot not in present:
                continue
            if bounds and start - bounds[-1][1] <= MAX_GAP:
                start = bounds.pop()[0]
            bounds.append((start, end))
        for start, end in bounds:
            yield Span(start, end, self._others(owners[start:end], present))

    def _others(self, owners: list[int], present: Set[int]) -> Tensor | None:
        if present == {*owners} and len(present) == 1:
            return None
        assert self.slots is not None
        return self.slots[:, None] != self.slots.new_tensor(owners)
