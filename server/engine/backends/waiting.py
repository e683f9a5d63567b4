"""The queue in front of a backend: lower priority values first, then first come, first served.

Knows nothing about what waits in it. Order is strict: nothing overtakes the head, so nothing starves.
"""

from bisect import insort
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class WaitingQueue(Generic[T]):
    def __init__(self) -> None:
        self._entries: list[tuple[int, int, T]] = []
        self._serial = 0

    def __len__(self) -> int:
        return len(self._entries)

    def push(self, priority: int, item: T, arrival: int | None = None) -> int:
        """Returns the item's place in the order of arrival; give it back to queue the item again where it was."""
        if arrival is None:
            self._serial += 1
            arrival = self._serial
        insort(self._entries, (priority, arrival, item), key=lambda entry: entry[:2])
        return arrival

    def peek(self) -> T | None:
        return self._entries[0][2] if self._entries else None

    def pop(self) -> T:
        return self._entries.pop(0)[2]

    def remove(self, matches: Callable[[T], bool]) -> list[T]:
        """Take out every item that matches, in queue order."""
        taken = [item for _, _, item in self._entries if matches(item)]
        if taken:
            self._entries = [entry for entry in self._entries if not matches(entry[2])]
        return taken
