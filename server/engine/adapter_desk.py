"""Serving, resting and unloading of adapters: the table, the weights in memory, and what the registry says.

Decides; the core talks. Belongs to the core's thread.
"""

import logging
from collections.abc import Callable, Iterable

from server.engine.adapters import AdapterTable
from server.engine.backends.base import AdapterError, Backend, RequestRefused
from server.engine.messages import AdapterInfo
from server.engine.residents import Residents
from server.errors import ConfigError
from server.store.registry import AdapterEntry, RegistryError, UnknownAdapter

log = logging.getLogger("qloop.engine")


class AdapterBusy(Exception):
    """It is being unloaded; load it again when that is done."""


class NotYet(Exception):
    """It cannot be served for now; ask again. The message is for who has asked for too long."""


class NoRoom(NotYet):
    """All slots are in use."""


class AdapterDesk:
    def __init__(
        self, backend: Backend, table: AdapterTable, max_loaded: int, is_in_use: Callable[[str], bool]
    ) -> None:
        self.table = table
        self.residents = Residents(backend, max_loaded, is_in_use)
        self.refused: dict[str, str] = {}  # id -> why it cannot be served
        self.leaving: dict[str, AdapterInfo] = {}  # by id: hidden, and waiting for their last request

    # --- at start ---

    def restore(self) -> None:
        """Serve again what an earlier process did, and every name's current revision; say what cannot be, and why."""
        for served in self.table.remembered:
            self._restore(served.name, served.revision, is_current=served.is_current, pin=served.is_pinned)
        for entry in self.table.registry.entries():
            if entry.is_current and self.table.unloaded.get(entry.name) != entry.revision:
                self._restore(entry.name, entry.revision, is_current=True, pin=None)
        self.table.restored()

    def _restore(self, name: str, revision: str, *, is_current: bool, pin: bool | None) -> None:
        """Into memory while there is room; the others come with their first request."""
        adapter_id = f"{name}@{revision}"
        if adapter_id in self.refused:
            return
        try:
            entry = self.table.examine(name, revision)
            adapter = self.table.describe(entry, pin=pin, is_current=is_current)
            if adapter_id not in self.residents and len(self.residents) < self.residents.max_loaded:
                self._bring_in(adapter, entry)
        except NotYet as why:
            log.info("adapter %s comes into memory with its first request: %s", adapter_id, why)
        except (AdapterError, RegistryError) as error:
            self._refuse(adapter_id, error)
            return
        self.table.put(adapter)
        if entry.is_current:
            self.table.forget_unloaded(name)

    # --- operator calls ---

    def load(self, name: str, revision: str | None, pin: bool | None) -> AdapterInfo:
        """Raises UnknownAdapter, RegistryError, AdapterError, AdapterBusy or NotYet."""
        entry = self._examine(name, revision)
        if entry.id in self.leaving:
            raise AdapterBusy(f"Adapter {entry.id} is being unloaded; load it again when that is done.")
        self._check_pin(entry.id, pin)
        if entry.id not in self.residents and not self.residents.has_room(entry.id):
            raise NoRoom("All slots for adapters are in use. Try again later, unload one, or raise QLOOP_MAX_ADAPTERS.")
        adapter = self.table.describe(entry, pin=pin)
        if entry.id not in self.residents:
            try:
                self._bring_in(adapter, entry)
            except (AdapterError, RegistryError) as error:
                self._refuse(entry.id, error)
                raise
        self.refused.pop(entry.id, None)
        self.residents.touch(entry.id, adapter.is_pinned)
        self.table.put(adapter)
        if entry.is_current:
            self.table.forget_unloaded(name)
        return adapter

    def hide(self, name: str, revision: str | None) -> list[AdapterInfo]:
        """Stop serving them; `release` each when nobody uses it any more. Includes those that are leaving already.

        Raises UnknownAdapter.
        """
        served = [a for a in self.table.revisions(name) if revision in (None, a.revision)]
        leaving = [a for a in self.leaving.values() if a.name == name and revision in (None, a.revision)]
        if not served and not leaving:
            named = name if revision is None else f"{name}@{revision}"
            raise UnknownAdapter(f"no adapter {named!r} is served")
        current = self.table.registry.current(name)
        if any(a.is_current for a in served) or any(a.revision == current for a in leaving):
            self.table.remember_unloaded(name)
        for adapter in served:
            self._hide(adapter)
        return leaving + served

    def release(self, adapter: AdapterInfo) -> None:
        """Its weights go."""
        self.leaving.pop(adapter.id, None)
        self.residents.forget(adapter.id)

    # --- requests ---

    def want(self, adapter_id: str, num_ahead: int) -> bool:
        """True: its weights are in memory. False: wait; `num_ahead` other adapters wait for a slot before this one.

        Raises RequestRefused when it is not served, or cannot be any more.
        """
        adapter = self.table.get(adapter_id)
        if adapter is None:
            raise RequestRefused("model_not_found", f"The adapter '{adapter_id}' is not loaded.", "model")
        if adapter_id in self.residents:
            if adapter_id in self.residents.victims(num_ahead):
                return False  # it has to make room: those who run finish, newcomers queue behind who waits for the slot
            self.residents.touch(adapter_id, adapter.is_pinned)
            return True
        if self.residents.num_pinned >= self.residents.max_loaded:
            raise RequestRefused("overloaded", "All slots for adapters are taken by pinned ones.", "model")
        if num_ahead or not self.residents.has_room(adapter_id):
            return False
        try:
            self._bring_in(adapter, self.table.examine(adapter.name, adapter.revision))
        except NotYet:
            return False
        except (AdapterError, RegistryError) as error:
            self.table.hide(adapter)
            self._refuse(adapter_id, error)
            message = f"The adapter '{adapter_id}' cannot be served: {error}"
            raise RequestRefused("invalid_adapter", message, "model") from None
        return True

    # --- the registry ---

    def removed(self) -> list[AdapterInfo]:
        """Served ones whose folder is gone; they are hidden now."""
        gone = [adapter for adapter in self.table.list() if not self._is_published(adapter.id)]
        for adapter in gone:
            log.info("adapter %s was removed from the registry", adapter.id)
            self._hide(adapter)
        return gone

    def due(self, names: Iterable[str]) -> list[str]:
        """Those of the published names that mean something else than what is served under them, and can be loaded."""
        for adapter_id in [adapter_id for adapter_id in self.refused if not self._is_published(adapter_id)]:
            del self.refused[adapter_id]
        for name in [name for name in self.table.unloaded if self.table.registry.current(name) is None]:
            self.table.forget_unloaded(name)
        return [name for name in names if self._is_due(name)]

    def _is_due(self, name: str) -> bool:
        """By the registry as it is now: what was seen a moment ago may be older than an operator's call."""
        current = self.table.registry.current(name)
        served = self.table.find(name, None)
        if current is None or (served is not None and served.revision == current):
            return False
        adapter_id = f"{name}@{current}"
        return not (
            self.table.unloaded.get(name) == current or adapter_id in self.refused or adapter_id in self.leaving
        )

    def _is_published(self, adapter_id: str) -> bool:
        """What cannot be told, for a fault of the disk, is not gone."""
        try:
            return self.table.registry.path.joinpath(*adapter_id.split("@")).is_dir()
        except OSError:
            return True

    # --- parts ---

    def _examine(self, name: str, revision: str | None) -> AdapterEntry:
        try:
            return self.table.examine(name, revision)
        except UnknownAdapter:
            raise
        except (AdapterError, RegistryError) as error:
            if (chosen := revision or self.table.registry.current(name)) is not None:
                self._refuse(f"{name}@{chosen}", error)
            raise

    def _bring_in(self, adapter: AdapterInfo, entry: AdapterEntry) -> None:
        """Raises AdapterError, RegistryError or NotYet."""
        self.table.checks.check_content(entry)
        try:
            is_proven = self.residents.load(adapter, entry.path)
        except (ConfigError, OSError) as error:
            raise AdapterError(f"{entry.path} cannot be read ({error}). Mend that, or publish it again.") from error
        if not is_proven:
            raise NotYet("Its self-test got no turn beside the running requests. Try again later.")

    def _check_pin(self, adapter_id: str, pin: bool | None) -> None:
        pinned = sum(adapter.is_pinned for adapter in self.table.list() if adapter.id != adapter_id)
        if pin and pinned >= self.residents.max_loaded:
            raise AdapterError(
                f"{pinned} adapters are pinned, as many as this engine holds (QLOOP_MAX_ADAPTERS). "
                "Raise that and restart the engine, or unpin another."
            )

    def _hide(self, adapter: AdapterInfo) -> None:
        self.table.hide(adapter)
        self.leaving[adapter.id] = adapter

    def _refuse(self, adapter_id: str, error: Exception) -> None:
        self.refused[adapter_id] = str(error)
        log.warning("adapter %s is not served: %s", adapter_id, error)
