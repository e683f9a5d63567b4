"""Which adapter revisions this engine serves, what each name means, and the version of that list.

Knows the registry, the checks and the file that outlives the process; not whose weights are in memory right now.
Belongs to the core's thread.
"""

import msgspec

from server.engine.adapter_checks import AdapterChecks
from server.engine.adapter_state import ServedRevision, StateFile
from server.engine.messages import AdapterInfo, ModelInfo
from server.errors import ConfigError
from server.store.model_folder import read_json_object
from server.store.registry import CONFIG_NAME, AdapterEntry, Registry
from server.store.servability import num_virtual_tokens


class AdapterTable:
    """Every change is written down before anybody is told, where the disk lets it."""

    def __init__(
        self,
        registry: Registry,
        model: ModelInfo,
        checks: AdapterChecks | None = None,
        state_file: StateFile | None = None,
    ) -> None:
        self.registry = registry
        self.model = model
        self.checks = checks or AdapterChecks(model)
        self.version = 0
        self._file = state_file or StateFile(None)
        self._state = self._file.read()
        self._served: dict[str, AdapterInfo] = {}
        self._is_restored = False

    @property
    def remembered(self) -> list[ServedRevision]:
        """What an earlier process served: pinned ones first, then what a name meant, then the rest."""
        return sorted(self._state.served, key=lambda served: (not served.is_pinned, not served.is_current))

    @property
    def unloaded(self) -> dict[str, str]:
        """Names that an operator unloaded, and what each meant then."""
        return self._state.unloaded

    def restored(self) -> None:
        """All that was remembered has been put, or given up: from now on changes are written down."""
        self._is_restored = True
        self._write()

    def examine(self, name: str, revision: str | None) -> AdapterEntry:
        """A published revision that may be served. Raises RegistryError or AdapterError."""
        entry = self.registry.get(name, revision)
        self.checks.check(entry)
        return entry

    def describe(self, entry: AdapterEntry, *, pin: bool | None = None, is_current: bool = False) -> AdapterInfo:
        """As it would be served. The name means it if the registry says so, or `is_current`, or if it meant it before.

        `pin=None` leaves that as it is. An integer id is given where it has none yet.
        """
        known = self._served.get(entry.id)
        card = entry.card
        return AdapterInfo(
            name=entry.name,
            revision=entry.revision,
            is_current=entry.is_current or is_current or (known is not None and known.is_current),
            rank=card.rank,
            created=card.created,
            int_id=known.int_id if known else self._next_int_id(),
            is_pinned=pin if pin is not None else known is not None and known.is_pinned,
            method=card.method,
            base=card.base_model,
            scores=card.scores,
            num_virtual=known.num_virtual if known else _num_virtual(entry),
        )

    def put(self, adapter: AdapterInfo) -> None:
        """Serve it from now on."""
        if adapter == self._served.get(adapter.id):
            return
        if adapter.is_current:
            for other in self._served.values():
                if other.name == adapter.name and other.is_current:
                    self._served[other.id] = msgspec.structs.replace(other, is_current=False)
        self._served[adapter.id] = adapter
        self._changed()

    def find(self, name: str, revision: str | None) -> AdapterInfo | None:
        """The served revision, or the one that the name means."""
        for adapter in self._served.values():
            if adapter.name == name and (adapter.revision == revision if revision else adapter.is_current):
                return adapter
        return None

    def get(self, adapter_id: str) -> AdapterInfo | None:
        return self._served.get(adapter_id)

    def revisions(self, name: str) -> list[AdapterInfo]:
        return [adapter for adapter in self.list() if adapter.name == name]

    def list(self) -> list[AdapterInfo]:
        return sorted(self._served.values(), key=lambda a: (a.name, a.revision))

    def hide(self, adapter: AdapterInfo) -> None:
        """From now on nobody can name it."""
        if self._served.pop(adapter.id, None) is not None:
            self._changed()

    def remember_unloaded(self, name: str) -> None:
        """An operator's word: a restart does not bring the name back, a new publish or promotion does."""
        current = self.registry.current(name)
        if current is not None and self._state.unloaded.get(name) != current:
            self._state.unloaded[name] = current
            self._write()

    def forget_unloaded(self, name: str) -> None:
        if self._state.unloaded.pop(name, None) is not None:
            self._write()

    def _next_int_id(self) -> int:
        self._state.next_int_id += 1
        return self._state.next_int_id - 1

    def _changed(self) -> None:
        self.version += 1
        self._write()

    def _write(self) -> None:
        if not self._is_restored:
            return
        self._state.served = [ServedRevision(a.name, a.revision, a.is_current, a.is_pinned) for a in self.list()]
        self._file.write(self._state)


def _num_virtual(entry: AdapterEntry) -> int:
    try:
        return num_virtual_tokens(read_json_object(entry.path / CONFIG_NAME))
    except ConfigError:  # whoever loads it says what is wrong
        return 0
