"""Who owns which row of the KV store, what finished rows still hold, and whether there is room.

A row is live (a running sequence owns it), kept (its sequence has finished; its cells serve whoever continues the same
text) or free. Cells of live and kept rows together never exceed `max_cells`; kept rows go first, the longest unused one
before the others. Knows nothing about time, queues or fairness: that is `scheduler.py`.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from server.engine.backends.hf.kv_store import KvStore
from server.engine.backends.hf.sequence import Sequence

SMALLEST_MATCH = 16  # fewer shared tokens are computed again rather than copied
TAKE_OVER_SHARE = 0.5  # of a kept row must be of use before it is taken over instead of copied from


Tokens = npt.NDArray[np.int64]
NOTHING: Tokens = np.empty(0, np.int64)


@dataclass(frozen=True)
class PrefixKey:
    """Only texts with the same adapter and the same salt may share cells."""

    adapter: str | None
    salt: str


@dataclass(eq=False)
class Row:
    index: int
    held: int = 0  # cells that count against the budget
    owner: Sequence | None = None
    key: PrefixKey | None = None
    tokens: Tokens = field(default_factory=lambda: NOTHING)  # what its cells hold; of a live row: will hold, at first
    last_used: int = 0

    @property
    def is_kept(self) -> bool:
        return self.owner is None and self.key is not None


@dataclass(frozen=True)
class _Match:
    row: Row
    length: int  # tokens


class KvRows:
    def __init__(self, store: KvStore, num_rows: int, max_cells: int, max_live: int, keeps_prefixes: bool) -> None:
        self._store = store
        self._rows = [Row(index) for index in range(num_rows)]
        self.max_cells = max_cells
        self.max_live = max_live
        self._keeps_prefixes = keeps_prefixes
        self._clock = 0
        self.used_cells = 0
        self.num_live = 0

    @property
    def page_cells(self) -> int:
        return self._store.shape.page_cells

    def admit(self, sequences: Seq[Sequence], reserved: int = 0, spare: int = 0) -> bool:
        """Give each sequence a row; False if there is no room. The first one's `num_cached` then says how much of its
        text the row holds already.

        Each row holds at least `reserved` cells from the start, and `spare` cells must stay free besides, for those
        that already run.
        """
        first = sequences[0]
        # A prompt that fills the context has no next token, and so no cell for one.
        wanted = self._store.shape.round_up(max(first.num_virtual + len(first.tokens) + 1, reserved))
        cells = min(wanted, self._store.capacity)
        total = cells * len(sequences)
        if self.num_live + len(sequences) > self.max_live or self.live_cells + total + spare > self.max_cells:
            return False
        match = self._best_match(first)
        rows = self._claim(len(sequences), match)
        if not self._make_room(total - sum(row.held for row in rows), match):
            match = None  # it had to go: there is no room for it beside the new rows
            self._make_room(total - sum(row.held for row in rows), None)
        for row, sequence in zip(rows, sequences, strict=True):
            self._own(row, sequence, match if row is rows[0] else None)
            self._hold(row, cells)
        return True

    def could_hold(self, count: int, cells: int) -> bool:
        """True if `count` rows of `cells` cells fit into an empty store."""
        return count <= self.max_live and count * self._store.shape.round_up(cells) <= self.max_cells

    def grow(self, sequence: Sequence, cells: int) -> bool:
        """Let a live row hold `cells`; False if there is no room even without any kept row."""
        row = self._rows[sequence.row]
        missing = self._store.shape.round_up(cells) - row.held
        if missing <= 0:
            return True
        if not self._make_room(missing, None):
            return False
        self._hold(row, row.held + missing)
        return True

    def release(self, sequence: Sequence, *, keep: bool) -> None:
        """The sequence leaves its row; with `keep` its cells stay for those who continue its text."""
        row = self._rows[sequence.row]
        self.num_live -= 1
        row.owner, sequence.row = None, -1
        length = sequence.num_cached - sequence.num_virtual
        if keep and self._keeps_prefixes and length >= SMALLEST_MATCH:
            row.key = _key(sequence)
            row.tokens = np.array(sequence.tokens[:length], np.int64)
            self._trim(row, sequence.num_cached)
            self._touch(row)
        else:
            self._free(row)

    def share(self, source: Sequence, target: Sequence, start: int) -> None:
        """`target`'s row gets `source`'s cells from `start` on."""
        self._store.copy(source.row, target.row, start, source.num_cached)

    def forget(self, adapter: str) -> None:
        """Drop the kept rows of an adapter that is going away."""
        for row in self._kept():
            if row.key is not None and row.key.adapter == adapter:
                self._free(row)

    # --- finding a prefix

    def _best_match(self, sequence: Sequence) -> _Match | None:
        if not sequence.may_reuse_prefix:
            return None
        wanted = np.array(sequence.tokens[:-1], np.int64)  # the last token must be computed: it gives the first logits
        best: _Match | None = None
        for row in self._candidates(sequence):
            length = common_prefix(wanted, row.tokens)
            if row.owner is not None:
                length = min(length, row.owner.num_cached - row.owner.num_virtual)
            if length >= SMALLEST_MATCH and (best is None or length > best.length):
                best = _Match(row, length)
        return best

    def _candidates(self, sequence: Sequence) -> Iterable[Row]:
        key = _key(sequence)
        for row in self._rows:
            if row.is_kept:
                if row.key == key:
                    yield row
            elif row.owner is not None and _key(row.owner) == key and self._may_share(row.owner, sequence):
                yield row

    def _may_share(self, owner: Sequence, sequence: Sequence) -> bool:
        """Choices of one request share their prompt in any case."""
        return self._keeps_prefixes or owner.request is sequence.request

    # --- rows and cells

    def _claim(self, count: int, match: _Match | None) -> list[Row]:
        """The matching kept row if it is mostly of use, then free rows, then the kept rows longest not used."""
        rows: list[Row] = []
        if match is not None and match.row.is_kept and match.length >= TAKE_OVER_SHARE * len(match.row.tokens):
            rows.append(match.row)
        free = [row for row in self._rows if row.owner is None and row.key is None]
        rows += free[: count - len(rows)]
        others = [row for row in self._kept() if row not in rows]
        # The match comes last: it can still be copied from while another row is left.
        others.sort(key=lambda row: (match is not None and row is match.row, row.last_used))
        for row in others[: count - len(rows)]:
            if match is None or row is not match.row:
                self._free(row)
            rows.append(row)
        return rows

    def _own(self, row: Row, sequence: Sequence, match: _Match | None) -> None:
        sequence.num_cached = sequence.num_virtual + (match.length if match else 0)
        is_own = match is not None and match.row is row
        self._trim(row, sequence.num_cached if is_own else 0)
        if match is not None and not is_own:
            self._store.copy(match.row.index, row.index, 0, sequence.num_cached)
            self._touch(match.row)
        if match is None and sequence.virtual_cells is not None:
            self._store.put(row.index, sequence.virtual_cells)
        if sequence.num_reused is None:
            sequence.num_reused = match.length if match else 0
        row.owner, row.key, row.tokens = sequence, None, np.array(sequence.tokens, np.int64)
        sequence.row = row.index
        self.num_live += 1

    @property
    def live_cells(self) -> int:
        """What running sequences hold; all else can be had."""
        return sum(row.held for row in self._rows if row.owner is not None)

    def _make_room(self, cells: int, match: _Match | None) -> bool:
        """Free kept rows, but not the match, until `cells` more fit."""
        while self.used_cells + cells > self.max_cells:
            kept = [row for row in self._kept() if match is None or row is not match.row]
            if not kept:
                return False
            self._free(min(kept, key=lambda row: row.last_used))
        return True

    def _kept(self) -> list[Row]:
        return [row for row in self._rows if row.is_kept]

    def _hold(self, row: Row, cells: int) -> None:
        self.used_cells += cells - row.held
        row.held = cells

    def _trim(self, row: Row, cells: int) -> None:
        self._store.trim(row.index, cells, row.held)
        self._hold(row, self._store.shape.round_up(cells))

    def _free(self, row: Row) -> None:
        self._trim(row, 0)
        row.owner, row.key, row.tokens = None, None, NOTHING

    def _touch(self, row: Row) -> None:
        self._clock += 1
        row.last_used = self._clock


def _key(sequence: Sequence) -> PrefixKey:
    return PrefixKey(sequence.request.adapter, sequence.request.cache_salt)


def common_prefix(left: Tokens, right: Tokens) -> int:
    """How many tokens both begin with."""
    length = min(len(left), len(right))
    differs = left[:length] != right[:length]
    return int(differs.argmax()) if differs.any() else length
