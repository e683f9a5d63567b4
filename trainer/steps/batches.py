"""Which examples make up which optimizer step, and how a step is cut into forward passes over ranks.

A step's examples depend on seed and epoch alone: not on the number of ranks, on accumulation, or on packing. So those
change speed and nothing else. Examples of similar length are brought together within a step, never across steps, which
would make steps of short texts and steps of long ones. Knows lengths only.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainer.steps.packing import balance

PLANNED_EPOCHS = 4  # looked at to find how few forward passes are enough


@dataclass(frozen=True)
class Layout:
    """How one optimizer step is spread. `max_tokens` is set when packing: the most tokens of one forward pass."""

    batch_size: int  # examples of one forward pass, when not packing
    accumulation: int = 1
    num_ranks: int = 1
    rank: int = 0
    max_tokens: int | None = None

    @property
    def window(self) -> int:
        """Examples of one optimizer step, over all ranks."""
        return self.batch_size * self.accumulation * self.num_ranks


class BatchPlan(torch.utils.data.Sampler[list[int]]):
    """One rank's forward passes, epoch after epoch: lists of indices, possibly empty in an epoch's last step.

    All ranks get the same number of passes. `accumulation` passes make a step, fewer only at the end of an epoch. When
    packing, `accumulation` is as small as `max_tokens` allows.
    """

    def __init__(self, lengths: Sequence[int], layout: Layout, seed: int = 0) -> None:
        self._lengths = lengths
        self._layout = layout
        self._seed = seed
        self.epoch = 0
        self.accumulation = self._least_passes() if layout.max_tokens else layout.accumulation

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        full, left = divmod(len(self._lengths), self._layout.window)
        return full * self.accumulation + (self._passes_for(left) if left else 0)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._lengths) // self._layout.window)

    def __iter__(self) -> Iterator[list[int]]:
        for window in self.windows(self.epoch):
            yield from self.mine(window)

    def windows(self, epoch: int) -> list[list[int]]:
        """The steps of an epoch: every index once, the last step perhaps smaller."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        order: list[int] = torch.randperm(len(self._lengths), generator=generator).tolist()
        size = self._layout.window
        return [order[start : start + size] for start in range(0, len(order), size)]

    def mine(self, window: list[int]) -> list[list[int]]:
        num_passes = self.accumulation if len(window) == self._layout.window else self._passes_for(len(window))
        groups = self._groups(window, num_passes * self._layout.num_ranks)
        return groups[self._layout.rank :: self._layout.num_ranks]

    def _groups(self, window: list[int], num_groups: int) -> list[list[int]]:
        lengths = [self._lengths[index] for index in window]
        if self._layout.max_tokens:
            return [[window[n] for n in sorted(group)] for group in balance(lengths, num_groups)]
        # Neighbours in length share a pass and need little padding, and the ranks of a pass wait little.
        order = sorted(window, key=lambda index: (-self._lengths[index], index))
        edges = [len(order) * n // num_groups for n in range(num_groups + 1)]
        return [order[start:end] for start, end in itertools.pairwise(edges)]

    def _passes_for(self, num_examples: int) -> int:
        """Passes of a step that is not full; for every rank, so that none is left out of a collective call."""
        return min(self.accumulation, -(-num_examples // (self._layout.batch_size * self._layout.num_ranks)))

    def _least_passes(self) -> int:
        layout, needed = self._layout, 1
        for epoch in range(PLANNED_EPOCHS):
            for window in self.windows(epoch):
                while needed < layout.accumulation and self._greatest_load(window, needed) > (layout.max_tokens or 0):
                    needed += 1
        return needed

    def _greatest_load(self, window: list[int], num_passes: int) -> int:
        lengths = [self._lengths[index] for index in window]
        total, ranks = sum(lengths), num_passes * self._layout.num_ranks
        if total * 4 <= 3 * ranks * (self._layout.max_tokens or 0):  # Graham's bound: surely fits
            return 0
        return max(sum(lengths[n] for n in group) for group in balance(lengths, ranks))


class PlannedLoader(torch.utils.data.DataLoader[Any]):
    """A loader that passes the epoch on to its plan: the Trainer asks the loader, not the sampler."""

    def set_epoch(self, epoch: int) -> None:
        plan = self.batch_sampler
        assert isinstance(plan, BatchPlan)
        plan.set_epoch(epoch)
