"""Puts several examples into one row of tokens without letting them see each other.

Every example counts its positions from 0, and no attention mask is given: transformers then builds a block-diagonal
causal mask from the positions, provided that no cache is made (`use_cache=False`). Knows nothing of epochs or models.
"""

import heapq
import math
from collections.abc import Sequence

import torch

from trainer.examples.sequences import IGNORED, Example

# On a CPU attention over one long row costs more than it saves; from here on a new row is begun.
PACK_LENGTH = 512
# CPU matrix kernels are compiled per shape: with few shapes they are compiled once, else at almost every step.
LENGTH_STEP = 32

Batch = dict[str, torch.Tensor]


def balance(lengths: Sequence[int], num_groups: int) -> list[list[int]]:
    """Indices in `num_groups` groups of nearly equal sums: the longest first, each to the group that holds least.

    Graham's rule: the greatest sum is at most 4/3 of the least possible.
    """
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    loads = [(0, group) for group in range(num_groups)]
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        load, group = loads[0]
        groups[group].append(index)
        heapq.heapreplace(loads, (load + lengths[index], group))
    return groups


def balance_under(lengths: Sequence[int], most: int, least_groups: int = 1) -> list[list[int]]:
    """As few balanced groups as keep every sum at or under `most`; a single length above it is a group of its own."""
    most = max(most, max(lengths, default=0))
    num_groups = max(least_groups, math.ceil(sum(lengths) / most) if most else 1)
    while True:
        groups = balance(lengths, num_groups)
        if all(sum(lengths[index] for index in group) <= most for group in groups):
            return groups
        num_groups += 1


def fill(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices in bins of at most `capacity`: the longest first, each into the fullest bin that has room (best fit)."""
    bins: list[list[int]] = []
    rooms: list[list[int]] = [[] for _ in range(capacity + 1)]  # rooms[n]: bins with n tokens of room left
    # A bit per room size finds the smallest that is large enough without a search through all of them.
    open_sizes = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        fitting = open_sizes >> length
        room = length + (fitting & -fitting).bit_length() - 1 if fitting else capacity
        if fitting:
            number = rooms[room].pop()
            open_sizes &= ~(1 << room) if not rooms[room] else ~0
        else:
            number = len(bins)
            bins.append([])
        bins[number].append(index)
        rooms[room - length].append(number)
        open_sizes |= 1 << (room - length)
    return [sorted(members) for members in sorted(bins, key=min)]


def pack(examples: Sequence[Example], pad_id: int, pack_length: int = PACK_LENGTH) -> Batch:
    """`input_ids`, `position_ids`, `labels` and `sample_lengths`, each int64 [rows, length].

    Rows are about equally long. No example's first token has a label: nothing before it is its own.
    """
    lengths = [len(example.token_ids) for example in examples]
    rows = balance_under(lengths, pack_length)
    width = rounded(max((sum(lengths[index] for index in row) for row in rows), default=1))
    batch = {
        "input_ids": torch.full((len(rows), width), pad_id),
        # Padding counts from 0 as well, as an example of its own that has no labels.
        "position_ids": torch.zeros((len(rows), width), dtype=torch.int64),
        "labels": torch.full((len(rows), width), IGNORED),
        "sample_lengths": torch.zeros((len(rows), width), dtype=torch.int64),
    }
    for number, row in enumerate(rows):
        start = 0
        for index in row:
            end = start + lengths[index]
            batch["input_ids"][number, start:end] = torch.tensor(examples[index].token_ids)
            batch["position_ids"][number, start:end] = torch.arange(lengths[index])
            batch["labels"][number, start + 1 : end] = torch.tensor(examples[index].labels[1:])
            batch["sample_lengths"][number, start:end] = lengths[index]
            start = end
        batch["position_ids"][number, start:] = torch.arange(width - start)
    return batch


def pad(examples: Sequence[Example], pad_id: int) -> Batch:
    """One example a row, padded on the right: `input_ids`, `attention_mask`, `labels`, `sample_lengths`."""
    lengths = [len(example.token_ids) for example in examples]
    width = rounded(max(lengths, default=1))
    shape = (max(1, len(examples)), width)
    batch = {
        "input_ids": torch.full(shape, pad_id),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORED),
        "sample_lengths": torch.zeros(shape, dtype=torch.int64),
    }
    batch["attention_mask"][:, 0] = 1  # a row that attends to nothing is not a number
    for number, example in enumerate(examples):
        length = lengths[number]
        batch["input_ids"][number, :length] = torch.tensor(example.token_ids)
        batch["attention_mask"][number, :length] = 1
        batch["labels"][number, 1:length] = torch.tensor(example.labels[1:])
        batch["sample_lengths"][number, :length] = length
    return batch


def rounded(number: int, step: int = LENGTH_STEP) -> int:
    return math.ceil(number / step) * step
