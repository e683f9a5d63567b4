"""Operators' adapter calls and the registry's news, from message to reply.

Keeps calls that wait: a load for a slot, an unload for the last request. What is served is the desk's business, who may
hear of it when is the socket side's.
"""

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from server.engine.adapter_desk import AdapterBusy, AdapterDesk, NoRoom, NotYet
from server.engine.backends.base import AdapterError
from server.engine.messages import (
    AdapterInfo,
    AdapterReply,
    Adapters,
    AdapterStates,
    ListAdapters,
    LoadAdapter,
    UnloadAdapter,
)
from server.store.registry import RegistryError, UnknownAdapter

log = logging.getLogger("qloop.engine")

RETRY_INTERVAL_S = 0.05  # looking at an adapter's files takes about a millisecond

Connection = Hashable
EVERYONE: Connection = "everyone"
NOBODY: Connection = "nobody"  # who asked when the registry did


@dataclass(frozen=True)
class _Load:
    connection: Connection
    call: LoadAdapter
    since: float = field(default_factory=time.monotonic)
    for_slot: bool = False


@dataclass(frozen=True)
class _Unload:
    connection: Connection
    call_id: str
    hidden: list[AdapterInfo]


class AdapterCalls:
    def __init__(
        self,
        desk: AdapterDesk,
        max_wait_s: float,
        *,
        send: Callable[[Connection, msgspec.Struct], None],
        is_in_use: Callable[[str], bool],
        cancel: Callable[[str], None],
    ) -> None:
        self._desk = desk
        self._max_wait_s = max_wait_s
        self._send = send
        self._is_in_use = is_in_use
        self._cancel = cancel  # ends the running requests of an adapter id
        self._loads: list[_Load] = []
        self._unloads: list[_Unload] = []
        self._names: Sequence[str] = ()  # as the registry's news had them
        self._next_try = 0.0
        self._announced = desk.table.version

    @property
    def num_waiting(self) -> int:
        """Loads that wait for a slot."""
        return sum(load.for_slot for load in self._loads)

    # --- messages ---

    def load(self, connection: Connection, call: LoadAdapter) -> None:
        self._try_load(_Load(connection, call))

    def unload(self, connection: Connection, call: UnloadAdapter) -> None:
        try:
            hidden = self._desk.hide(call.name, call.revision)
        except UnknownAdapter as error:
            self._send(connection, AdapterReply(call.call_id, "model_not_found", f"{error}."))
            return
        self._unloads.append(_Unload(connection, call.call_id, hidden))
        if call.cancel:
            for adapter in hidden:
                self._cancel(adapter.id)

    def tell(self, connection: Connection, call: ListAdapters) -> None:
        residents = self._desk.residents
        leaving = sorted(self._desk.leaving)
        loaded = [adapter_id for adapter_id in residents.ids if adapter_id not in leaving]
        self._send(connection, AdapterStates(call.call_id, residents.max_loaded, loaded, leaving, self._desk.refused))

    def registry_changed(self, names: Sequence[str]) -> None:
        """`names` are all that are published."""
        self._names = names
        self._desk.removed()
        for name in self._desk.due(names):
            if not any(load.connection is NOBODY and load.call.name == name for load in self._loads):
                self._try_load(_Load(NOBODY, LoadAdapter("", name)))

    def forget(self, connection: Connection) -> None:
        """Its calls need no answer any more; what they began goes on."""
        self._loads = [load for load in self._loads if load.connection != connection]

    # --- every turn of the loop ---

    def advance(self) -> None:
        """Finish what waited, and tell everyone what has changed."""
        if self._loads and time.monotonic() >= self._next_try:
            self._next_try = time.monotonic() + RETRY_INTERVAL_S
            loads, self._loads = self._loads, []
            for load in loads:
                self._try_load(load)
        self._release_unused()
        self.announce()

    def announce(self) -> None:
        """Before any reply: the socket side holds replies until everyone has acknowledged the newest list."""
        table = self._desk.table
        if table.version != self._announced:
            self._announced = table.version
            self._send(EVERYONE, Adapters(table.version, table.list()))

    # --- parts ---

    def _try_load(self, load: _Load) -> None:
        call = load.call
        try:
            adapter = self._desk.load(call.name, call.revision, call.pin)
        except NotYet as why:
            self._wait(replace(load, for_slot=isinstance(why, NoRoom)), str(why))
        except UnknownAdapter as error:
            self._fail(load, "model_not_found", f"{error}.")
        except AdapterBusy as error:
            self._fail(load, "adapter_busy", str(error))
        except (AdapterError, RegistryError) as error:
            self._fail(load, "invalid_adapter", str(error))
        else:
            self._reply(load.connection, call.call_id, [adapter])

    def _wait(self, load: _Load, why: str) -> None:
        if load.connection is not NOBODY and time.monotonic() - load.since > self._max_wait_s:
            self._fail(load, "overloaded", why)
        else:
            self._loads.append(load)

    def _fail(self, load: _Load, code: str, message: str) -> None:
        if load.connection is not NOBODY:
            self._send(load.connection, AdapterReply(load.call.call_id, code, message))

    def _release_unused(self) -> None:
        """Weights go when their last request has ended, and everyone who waits for that is told."""
        leaving = self._desk.leaving
        unused = [adapter for adapter in leaving.values() if not self._is_in_use(adapter.id)]
        for adapter in unused:
            self._desk.release(adapter)
        for unload in [u for u in self._unloads if not any(adapter.id in leaving for adapter in u.hidden)]:
            self._unloads.remove(unload)
            self._reply(unload.connection, unload.call_id, unload.hidden)
        if unused:
            self.registry_changed(self._names)  # it may have been published again meanwhile

    def _reply(self, connection: Connection, call_id: str, adapters: list[AdapterInfo]) -> None:
        self.announce()
        if connection is not NOBODY:
            self._send(connection, AdapterReply(call_id, adapters=adapters))
