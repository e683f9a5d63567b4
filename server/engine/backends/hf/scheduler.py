"""Who waits, who prefills, who decodes, and whether the KV store has room. Knows nothing about tensors.

Row rule: decoding sequences are rows 0..D-1 in list order; at most one sequence is being prefilled and it has row D.
Memory rule: rows x the longest reservation of a live sequence never exceeds `max_cells`.
"""

from collections.abc import Callable
from typing import NamedTuple

from server.engine.backends.hf.sequence import Sequence
from server.engine.backends.waiting import WaitingQueue


class Move(NamedTuple):
    """A row's first `length` cells go into another row."""

    source: int
    target: int
    length: int


class Scheduler:
    def __init__(self, max_num_seqs: int, max_cells: int) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_cells = max_cells
        self.waiting: WaitingQueue[Sequence] = WaitingQueue()
        self.decoding: list[Sequence] = []
        self.prefilling: Sequence | None = None

    @property
    def live(self) -> list[Sequence]:
        """Everything that has a row, in row order."""
        return self.decoding if self.prefilling is None else [*self.decoding, self.prefilling]

    @property
    def longest_reservation(self) -> int:
        return max((sequence.reservation for sequence in self.live), default=0)

    def add(self, sequence: Sequence) -> None:
        self.waiting.push(sequence.request.priority, sequence)

    def next_prefill(self) -> Sequence | None:
        """The sequence in prefill; if there is none, the queue's head, once a row and memory are free for it."""
        if self.prefilling is None:
            head = self.waiting.peek()
            if head is not None and self._fits(head):
                self.prefilling = self.waiting.pop()
        return self.prefilling

    def finish_prefill(self) -> list[Sequence]:
        """The prefilled sequence starts decoding in its row, and so do its siblings (other choices of the same request)
        at the head of the queue, as far as they fit; each still needs the first one's cells copied into its row."""
        first = self.prefilling
        assert first is not None
        self.prefilling = None
        self.decoding.append(first)
        joined = [first]
        while (sibling := self.waiting.peek()) is not None and sibling.request is first.request:
            if not self._fits(sibling):
                break
            self.decoding.append(self.waiting.pop())
            joined.append(sibling)
        return joined

    def row_of(self, sequence: Sequence) -> int:
        return self.live.index(sequence)

    def remove(self, sequence: Sequence) -> list[Move]:
        """Take out a live sequence; the moves, in order, that keep rows without holes."""
        if sequence is self.prefilling:
            self.prefilling = None
            return []
        moves: list[Move] = []
        hole, last = self.decoding.index(sequence), len(self.decoding) - 1
        if hole != last:
            self.decoding[hole] = self.decoding[last]
            moves.append(Move(last, hole, self.decoding[hole].num_cached))
        self.decoding.pop()
        if self.prefilling is not None:
            moves.append(Move(last + 1, last, self.prefilling.num_cached))
        return moves

    def matching(self, matches: Callable[[Sequence], bool]) -> list[Sequence]:
        """Live sequences that match."""
        return [sequence for sequence in self.live if matches(sequence)]

    def _fits(self, sequence: Sequence) -> bool:
        rows = len(self.live) + 1
        longest = max(self.longest_reservation, sequence.reservation)
        return rows <= self.max_num_seqs and rows * longest <= self.max_cells
