"""Which adapters' weights are in the backend's memory: at most so many, the longest unused one makes room.

Knows who is used by asking; nothing about requests, names or the registry.
"""

import time
from collections.abc import Callable
from pathlib import Path

from server.engine.backends.base import AdapterError, AdapterProbe, Backend
from server.engine.messages import AdapterInfo

AWAITED_S = 1.0  # who waits for a probe asks much oftener


class Residents:
    def __init__(self, backend: Backend, max_loaded: int, is_in_use: Callable[[str], bool]) -> None:
        self.max_loaded = max_loaded
        self.num_evicted = 0
        self._backend = backend
        self._is_in_use = is_in_use
        self._loaded: dict[str, bool] = {}  # id -> is it pinned; the longest unused one first
        self._asked: dict[str, float] = {}  # by id: when it was last asked for, time.monotonic()
        self._proven: set[str] = set()  # ids whose probe was passed; a revision never changes

    def __contains__(self, adapter_id: str) -> bool:
        """Can requests use it? Weights whose probe goes on are in memory, but not in here."""
        return adapter_id in self._loaded and adapter_id in self._proven

    def __len__(self) -> int:
        return len(self._loaded)

    @property
    def ids(self) -> list[str]:
        return list(self._loaded)

    @property
    def num_pinned(self) -> int:
        return sum(self._loaded.values())

    def touch(self, adapter_id: str, is_pinned: bool) -> None:
        """It is wanted now."""
        del self._loaded[adapter_id]
        self._loaded[adapter_id] = is_pinned

    def victims(self, count: int) -> list[str]:
        """The first `count` that will have to go."""
        return [adapter_id for adapter_id, is_pinned in self._loaded.items() if not is_pinned][:count]

    def has_room(self, adapter_id: str) -> bool:
        """True when it fits now; evicts another that nobody uses if that is what it takes."""
        if adapter_id in self._loaded or len(self._loaded) < self.max_loaded:
            return True
        for victim in self.victims(len(self._loaded)):
            if not (self._is_in_use(victim) or self._is_awaited(victim)):
                self._drop(victim)
                self.num_evicted += 1
                return True
        return False

    def load(self, adapter: AdapterInfo, path: Path) -> bool:
        """Only after `has_room`. False: it is not proven yet; load it again soon, which goes on with what was begun.

        Raises AdapterError, and nothing of it is left then.
        """
        if adapter.id not in self._loaded:
            self._backend.load_adapter(adapter, path)
            self._loaded[adapter.id] = False
        self._asked[adapter.id] = time.monotonic()
        if isinstance(self._backend, AdapterProbe) and adapter.id not in self._proven:
            try:
                if not self._backend.probe_adapter(adapter.id):
                    return False
            except AdapterError:
                self._drop(adapter.id)
                raise
        self._proven.add(adapter.id)
        self._loaded[adapter.id] = adapter.is_pinned
        return True

    def _is_awaited(self, adapter_id: str) -> bool:
        """Its probe goes on, and somebody looks for the end of it: two new ones must not drive each other out."""
        looked = self._asked.get(adapter_id, 0.0)
        return adapter_id not in self._proven and time.monotonic() - looked < AWAITED_S

    def forget(self, adapter_id: str) -> None:
        """Out of the backend's memory for good; one that is not there is fine."""
        self._proven.discard(adapter_id)
        if adapter_id in self._loaded:
            self._drop(adapter_id)

    def _drop(self, adapter_id: str) -> None:
        del self._loaded[adapter_id]
        self._asked.pop(adapter_id, None)
        self._backend.unload_adapter(adapter_id)
