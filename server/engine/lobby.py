"""Requests that wait for their adapter's weights to get a slot: first come, first served, and not for ever.

Knows requests and the clock. What the slots hold it asks; who starts or refuses a request it is told.
"""

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import msgspec

from server.engine.backends.base import RequestRefused
from server.engine.messages import Generate

SHUTTING_DOWN = "The server is shutting down."

# Are this adapter's weights in memory, where so many other adapters wait for a slot before it? Raises RequestRefused.
Want = Callable[[str, int], bool]


@dataclass(frozen=True)
class Waiting:
    """One request that has not been accepted yet."""

    connection: Hashable
    request: Generate
    adapter: str
    since: float = field(default_factory=time.monotonic)

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self.since

    @property
    def is_past_deadline(self) -> bool:
        return self.request.deadline_s is not None and self.waited_s >= self.request.deadline_s

    @property
    def remaining(self) -> Generate:
        """The request, with what is left of its time."""
        if self.request.deadline_s is None:
            return self.request
        return msgspec.structs.replace(self.request, deadline_s=self.request.deadline_s - self.waited_s)


class Lobby:
    """`start` accepts a request or raises RequestRefused; `reject` answers it."""

    def __init__(
        self,
        max_wait_s: float,
        *,
        want: Want,
        start: Callable[[Hashable, Generate], None],
        reject: Callable[[Hashable, Generate, RequestRefused], None],
    ) -> None:
        self._max_wait_s = max_wait_s
        self._want = want
        self._start = start
        self._reject = reject
        self._queue: list[Waiting] = []

    @property
    def num_sequences(self) -> int:
        return sum(waiting.request.n for waiting in self._queue)

    def has(self, request_id: str) -> bool:
        return any(waiting.request.request_id == request_id for waiting in self._queue)

    def enter(self, connection: Hashable, request: Generate, adapter: str) -> None:
        """Start it, or let it wait. Raises RequestRefused."""
        ahead = {waiting.adapter for waiting in self._queue}
        if adapter in ahead or not self._want(adapter, len(ahead)):
            self._queue.append(Waiting(connection, request, adapter))
        else:
            self._start(connection, request)

    def visit(self) -> None:
        """Refuse who has waited too long, start whose turn has come."""
        if not self._queue:
            return
        for late in self.take(lambda waiting: waiting.is_past_deadline or waiting.waited_s >= self._max_wait_s):
            self._reject(late.connection, late.request, _why_late(late))
        ahead: set[str] = set()
        for waiting in list(self._queue):
            if waiting.adapter in ahead:
                continue
            try:
                if self._want(waiting.adapter, len(ahead)):
                    self._queue.remove(waiting)
                    self._start(waiting.connection, waiting.remaining)
                else:
                    ahead.add(waiting.adapter)
            except RequestRefused as refused:
                self.take(lambda other, gone=waiting: other is gone)  # type: ignore[misc]
                self._reject(waiting.connection, waiting.request, refused)

    def close(self, reason: str = SHUTTING_DOWN) -> None:
        """Refuse all who wait."""
        for waiting in self.take(lambda _: True):
            self._reject(waiting.connection, waiting.request, RequestRefused("draining", reason))

    def take(self, matches: Callable[[Waiting], bool]) -> list[Waiting]:
        """Take out all that match, without an answer."""
        taken = [waiting for waiting in self._queue if matches(waiting)]
        if taken:
            self._queue = [waiting for waiting in self._queue if not matches(waiting)]
        return taken


def _why_late(waiting: Waiting) -> RequestRefused:
    if waiting.is_past_deadline:
        return RequestRefused("deadline_exceeded", "The request's deadline passed before its adapter had a slot.")
    message = f"The adapter {waiting.adapter} waited {waiting.waited_s:.0f} s for a slot and got none."
    return RequestRefused("overloaded", message)
