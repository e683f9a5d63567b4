"""Which adapter revisions the engine has loaded, and the version of that list.

Knows the registry and the base model's identity; the weights themselves are the backend's.
"""

import logging

import msgspec

from server.engine.backends.base import AdapterError, Backend
from server.engine.messages import AdapterInfo, ModelInfo
from server.store.registry import AdapterEntry, Registry, RegistryError

log = logging.getLogger("qloop.engine")


class AdapterTable:
    """Loaded adapters. Belongs to the core's thread."""

    def __init__(self, registry: Registry, model: ModelInfo) -> None:
        self.model = model
        self.version = 0
        self._registry = registry
        self._loaded: dict[str, AdapterInfo] = {}

    def load_current(self, backend: Backend) -> None:
        """Load every name's current revision that fits this base; say clearly which were left out and why."""
        for entry in self._registry.entries():
            if not entry.is_current:
                continue
            try:
                self.load(backend, entry.name, entry.revision)
            except (AdapterError, RegistryError) as error:
                log.warning("adapter %s@%s is not served: %s", entry.name, entry.revision, error)

    def load(self, backend: Backend, name: str, revision: str | None) -> AdapterInfo:
        """Raises RegistryError (unknown, damaged) or AdapterError (wrong base, or the backend cannot serve it)."""
        entry = self._registry.get(name, revision)
        check_base(entry, self.model)
        adapter = AdapterInfo(
            name=entry.name,
            revision=entry.revision,
            is_current=self._registry.current(name) == entry.revision,
            rank=entry.card.rank,
            created=entry.card.created,
        )
        if adapter.id not in self._loaded:
            backend.load_adapter(adapter, entry.path)
        self._put(adapter)
        return adapter

    def find(self, name: str, revision: str | None) -> AdapterInfo | None:
        """The loaded revision, or the loaded current one."""
        for adapter in self._loaded.values():
            if adapter.name == name and (adapter.revision == revision if revision else adapter.is_current):
                return adapter
        return None

    def hide(self, adapter: AdapterInfo) -> None:
        self._loaded.pop(adapter.id, None)
        self.version += 1

    def list(self) -> list[AdapterInfo]:
        return sorted(self._loaded.values(), key=lambda a: (a.name, a.revision))

    def _put(self, adapter: AdapterInfo) -> None:
        if adapter.is_current:
            for other in self._loaded.values():
                if other.name == adapter.name and other.is_current:
                    self._loaded[other.id] = msgspec.structs.replace(other, is_current=False)
        self._loaded[adapter.id] = adapter
        self.version += 1


def check_base(entry: AdapterEntry, model: ModelInfo) -> None:
    """An adapter changes the weights it was trained on and no others. Raises AdapterError."""
    if entry.card.base_weights_hash != model.weights_hash:
        raise AdapterError(
            f"it was trained on {entry.card.base_model} (weights {entry.card.base_weights_hash[:12]}), "
            f"this engine runs {model.name} (weights {model.weights_hash[:12]}). "
            "Serve that base model, or train the adapter again on this one."
        )
