"""Which rows were seen before. Knows rows only as text.

A set of 64-bit hashes in one flat array: 16 to 32 bytes per row, where a set of Python integers needs about a hundred.
"""

import hashlib
from array import array

from trainer.data.rows import Row

_EMPTY = 0


class SeenRows:
    """Open addressing with linear probing; at most half full."""

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 << 12))
        self._count = 0

    def add(self, row: Row) -> bool:
        """Whether an equal row was added before."""
        if self._count * 2 >= len(self._slots):
            self._grow()
        added = _insert(self._slots, _hash(row))
        self._count += added
        return not added

    def _grow(self) -> None:
        old, self._slots = self._slots, array("Q", bytes(16 * len(self._slots)))
        for value in old:
            if value != _EMPTY:
                _insert(self._slots, value)


def _insert(slots: "array[int]", value: int) -> bool:
    last = len(slots) - 1
    at = value & last
    while slots[at] != _EMPTY:
        if slots[at] == value:
            return False
        at = (at + 1) & last
    slots[at] = value
    return True


def _hash(row: Row) -> int:
    """Two of a million different rows meet with a probability of 3 in 100 million."""
    parts = [row.text, row.chosen, row.rejected]
    for turn in row.messages:
        parts += (turn["role"], turn["content"], str(turn.get("tool_calls", "")))
    digest = hashlib.blake2b("\x1f".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1
