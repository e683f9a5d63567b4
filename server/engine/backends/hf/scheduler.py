"""Who runs, who waits, and how many tokens of each sequence the next step computes. Knows nothing about tensors.

Order is priority, then arrival, and it is strict: nothing overtakes the head of the queue. When cells run out, the last
sequence in that order goes back to the queue and is computed anew later; what it has produced stays produced. A beam
search holds all the cells it can come to need from the start, and is never sent back.
"""

import math
from typing import NamedTuple

from server.engine.backends.hf.rows import KvRows
from server.engine.backends.hf.sequence import Sequence
from server.engine.backends.waiting import WaitingQueue

SCORING_CHUNK = 64  # prompt tokens per step when their logits are wanted: bounds [chunk, vocabulary] floats


class Chunk(NamedTuple):
    """The next `num_tokens` of a sequence that a step computes."""

    sequence: Sequence
    num_tokens: int


class Budget(NamedTuple):
    """Prompt tokens a step may compute, where a token that looks back over `far` cells counts double."""

    idle: int  # while nobody waits for their next token
    crowd: int  # while more sequences wait for their first token than for their next
    busy: int  # while others stream
    far: int


class Scheduler:
    def __init__(self, rows: KvRows, budget: Budget) -> None:
        self.rows = rows
        self.budget = budget
        self.waiting: WaitingQueue[Sequence] = WaitingQueue()
        self.running: list[Sequence] = []  # in order of priority and arrival
        self.num_preempted = 0

    def add(self, sequence: Sequence) -> None:
        sequence.arrival = self.waiting.push(sequence.request.priority, sequence)

    def plan(self) -> list[Chunk]:
        """What the next step computes: one token of every decoding sequence, then prompts within the budget."""
        chunks = [Chunk(sequence, 1) for sequence in self._grown()]
        budget = self._prompt_tokens(num_streaming=len(chunks))
        for sequence in [s for s in self.running if s.is_prefilling]:
            budget -= self._read(sequence, budget, chunks)
        while budget > 0 and (joining := self._admit_head()) is not None:
            budget -= self._read(joining, budget, chunks)
        return chunks

    def start(self, sequence: Sequence) -> None:
        """A sequence that has a row takes part in the next step."""
        self.running.append(sequence)
        self.running.sort(key=lambda s: (s.request.priority, s.arrival))

    def remove(self, sequence: Sequence, *, keep: bool) -> None:
        """A sequence has ended; with `keep` its cells serve whoever continues its text."""
        if sequence in self.running:
            self.running.remove(sequence)
        self.rows.release(sequence, keep=keep)

    def _prompt_tokens(self, num_streaming: int) -> int:
        """How many tokens of prompts the next step may compute: the majority is served first."""
        if num_streaming == 0:
            return self.budget.idle
        num_starting = len(self.waiting) + sum(s.is_prefilling for s in self.running)
        return self.budget.crowd if num_starting > num_streaming else self.budget.busy

    def _grown(self) -> list[Sequence]:
        """The decoding sequences, each with a cell for its next token; those that find none go back to the queue."""
        for sequence in list(self.running):
            if sequence in self.running and not sequence.is_prefilling:
                while not self.rows.grow(sequence, sequence.num_cached + 1):
                    self._preempt_last()
                    if sequence not in self.running:
                        break
        return [s for s in self.running if not s.is_prefilling and s.num_todo]

    def _read(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        """Schedule prompt tokens of one sequence; what that takes from the budget."""
        weight = 1 + sequence.num_cached / self.budget.far
        most = max(int(budget / weight), 1) if budget > 0 else 0
        if sequence.wants_prompt_logprobs:
            most = min(most, SCORING_CHUNK)
        count = min(sequence.num_todo, most)
        if count:
            chunks.append(Chunk(sequence, count))
        return math.ceil(count * weight)

    def _admit_head(self) -> Sequence | None:
        head = self.waiting.peek()
        if head is None or self._must_wait(head):
            return None
        spare = self.rows.page_cells * len(self.running)  # everyone who runs can go on for a while
        if not self.rows.admit([head, *head.other_beams], head.reservation, spare):
            return None
        self.waiting.pop()
        self.start(head)
        return head

    def join(self, first: Sequence) -> list[Sequence]:
        """The prompt of `first` has just been read: other choices of its request start with its cells, as far as there
        is room."""
        joined: list[Sequence] = []
        while (head := self.waiting.peek()) is not None and head.request is first.request:
            if self._admit_head() is None:
                break
            self.rows.share(first, head, head.num_cached)
            head.num_cached, head.num_reused = first.num_cached, first.num_reused
            joined.append(head)
        return joined

    def _must_wait(self, head: Sequence) -> bool:
        """Until the prompt it shares with another choice of its request has been read."""
        return any(s.request is head.request and s.num_todo > 1 and not s.output for s in self.running)

    def _preempt_last(self) -> None:
        sequence = next(s for s in reversed(self.running) if not s.is_beam)
        self.running.remove(sequence)
        self.rows.release(sequence, keep=False)
        sequence.num_cached = 0
        sequence.prompt_logprobs = None
        self.waiting.push(sequence.request.priority, sequence, sequence.arrival)
        self.num_preempted += 1
