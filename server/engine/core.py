"""The engine's loop: takes messages in, lets the backend step, sends outputs to whoever asked.

Runs in the compute thread, alone with the backend. It knows connections only as opaque keys and never touches a
socket: `post` is how the socket side talks to it, `deliver` how it answers, both safe between threads.
"""

import logging
import queue
import time
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import msgspec

from server.engine.adapters import AdapterTable
from server.engine.backends.base import AdapterError, Backend, RequestRefused
from server.engine.messages import (
    Abort,
    Accepted,
    AdapterInfo,
    AdapterReply,
    Adapters,
    Draining,
    FinishReason,
    Generate,
    Heartbeat,
    LoadAdapter,
    ModelInfo,
    Outputs,
    Rejected,
    SequenceOutput,
    StartDrain,
    UnloadAdapter,
)
from server.store.registry import RegistryError

log = logging.getLogger("qloop.engine")

HEARTBEAT_INTERVAL_S = 0.25
IDLE_WAIT_S = 0.2
RETRY_AFTER_S = 1

Connection = Hashable
EVERYONE: Connection = "everyone"
Delivery = tuple[Connection, msgspec.Struct]


class Disconnected(msgspec.Struct):
    """The connection is gone: abort what it asked for."""


class Stop(msgspec.Struct):
    """Leave the loop; sequences still running end with an error."""


@dataclass(slots=True)
class Live:
    """A request the backend holds."""

    connection: Connection
    adapter: str | None
    unfinished: set[int] = field(default_factory=set)


class Core:
    """Owns which request belongs to which connection, admission, drain and adapter calls."""

    def __init__(
        self, backend: Backend, adapters: AdapterTable, *, max_queue: int, deliver: Callable[[list[Delivery]], None]
    ) -> None:
        self._backend = backend
        self._adapters = adapters
        self._max_queue = max_queue
        self._deliver = deliver
        self._inbox: queue.SimpleQueue[tuple[Connection, msgspec.Struct]] = queue.SimpleQueue()
        self._outbox: list[Delivery] = []
        self._requests: dict[str, Live] = {}
        self._unloads: list[tuple[Connection, str, AdapterInfo]] = []
        self._is_draining = False
        self._is_stopping = False
        self._next_heartbeat = 0.0

    @property
    def model(self) -> ModelInfo:
        return self._adapters.model

    @property
    def is_drained(self) -> bool:
        """A drain was started and nothing is left to compute. May be asked from any thread."""
        return self._is_draining and not self._requests

    def post(self, connection: Connection, message: msgspec.Struct) -> None:
        """Hand over a message from any thread."""
        self._inbox.put((connection, message))

    def run(self) -> None:
        """The loop. Returns after Stop; any exception is a defect of the backend and ends the process."""
        while not self._is_stopping:
            self._take_messages()
            if self._backend.has_work:
                self._route(self._backend.step())
            self._finish_unloads()
            self._beat()
            self._flush()
        self._end_all("The engine was stopped before this answer was complete.")
        self._flush()

    def fail(self, reason: str) -> None:
        """The loop died: tell every request that still waits."""
        self._end_all(reason)
        self._flush()

    def _take_messages(self) -> None:
        """Everything that has arrived; waits only when there is nothing to compute."""
        try:
            if not self._backend.has_work:
                self._handle(*self._inbox.get(timeout=IDLE_WAIT_S))
            while True:
                self._handle(*self._inbox.get_nowait())
        except queue.Empty:
            pass

    def _handle(self, connection: Connection, message: msgspec.Struct) -> None:
        match message:
            case Generate():
                self._admit(connection, message)
            case Abort():
                self._abort(connection, message)
            case LoadAdapter():
                self._load_adapter(connection, message)
            case UnloadAdapter():
                self._unload_adapter(connection, message)
            case Disconnected():
                self._forget(connection)
            case StartDrain():
                self._start_drain()
            case Stop():
                self._is_stopping = True
            case _:
                raise TypeError(f"the core has no use for {type(message).__name__}")

    # --- requests ---

    def _admit(self, connection: Connection, request: Generate) -> None:
        refusal = self._refusal(request)
        if refusal is not None:
            self._send(connection, refusal)
            return
        self._requests[request.request_id] = Live(connection, request.adapter, set(range(request.n)))
        self._backend.add(request)
        self._send(connection, Accepted(request.request_id, len(request.prompt_token_ids)))

    def _refusal(self, request: Generate) -> Rejected | None:
        if self._is_draining:
            return Rejected(request.request_id, "draining", "The server is shutting down.", None, RETRY_AFTER_S)
        if request.request_id in self._requests:
            return Rejected(request.request_id, "invalid_request", "This request id is already running.")
        most = self._max_queue + self.model.max_num_seqs
        if not 1 <= request.n <= most:
            message = f"n must be between 1 and {most} on this server, not {request.n}."
            return Rejected(request.request_id, "invalid_request", message, "n")
        if request.n > (room := most - self._num_sequences()):
            message = f"The queue is full: room for {max(room, 0)} more sequences, {request.n} asked for."
            return Rejected(request.request_id, "overloaded", message, None, RETRY_AFTER_S)
        if any(request.adapter == adapter.id for _, _, adapter in self._unloads):
            return Rejected(
                request.request_id, "model_not_found", f"Adapter {request.adapter} is being unloaded.", "model"
            )
        try:
            self._backend.check(request)
        except RequestRefused as refused:
            return Rejected(request.request_id, refused.code, refused.message, refused.param)
        return None

    def _num_sequences(self) -> int:
        return sum(len(live.unfinished) for live in self._requests.values())

    def _abort(self, connection: Connection, message: Abort) -> None:
        live = self._requests.get(message.request_id)
        if live is None or live.connection != connection:
            return  # already finished, or not this worker's
        self._backend.abort(message.request_id, message.index)
        live.unfinished -= {message.index} if message.index is not None else live.unfinished.copy()
        if not live.unfinished:
            del self._requests[message.request_id]

    def _forget(self, connection: Connection) -> None:
        for request_id in [r for r, live in self._requests.items() if live.connection == connection]:
            self._backend.abort(request_id)
            del self._requests[request_id]

    def _route(self, outputs: list[SequenceOutput]) -> None:
        """One `Outputs` frame per connection and step."""
        frames: dict[Connection, list[SequenceOutput]] = {}
        for output in outputs:
            live = self._requests[output.request_id]
            frames.setdefault(live.connection, []).append(output)
            if output.finish_reason is not None:
                live.unfinished.discard(output.index)
                if not live.unfinished:
                    del self._requests[output.request_id]
        for connection, items in frames.items():
            self._send(connection, Outputs(items))

    def _end_all(self, reason: str) -> None:
        for request_id, live in self._requests.items():
            items = [SequenceOutput(request_id, i, [], 0, FinishReason.ERROR, error=reason) for i in live.unfinished]
            self._send(live.connection, Outputs(items))
        self._requests.clear()

    def _start_drain(self) -> None:
        self._is_draining = True
        self._send(EVERYONE, Draining())
        self._next_heartbeat = 0.0  # whoever waits for idleness should learn of it now

    # --- adapters ---

    def _load_adapter(self, connection: Connection, call: LoadAdapter) -> None:
        if any(a.name == call.name and call.revision in (None, a.revision) for _, _, a in self._unloads):
            message = f"Adapter {call.name!r} is being unloaded; load it again when that is done."
            self._send(connection, AdapterReply(call.call_id, "invalid_adapter", message))
            return
        try:
            adapter = self._adapters.load(self._backend, call.name, call.revision)
        except (AdapterError, RegistryError) as error:
            self._send(connection, AdapterReply(call.call_id, "invalid_adapter", str(error)))
            return
        self._announce(connection, AdapterReply(call.call_id, adapter=adapter))

    def _unload_adapter(self, connection: Connection, call: UnloadAdapter) -> None:
        adapter = self._adapters.find(call.name, call.revision)
        if adapter is None:
            message = f"No adapter {call.name!r} is loaded."
            self._send(connection, AdapterReply(call.call_id, "model_not_found", message))
            return
        # Off the list first, so that no new request can name it; the weights go when the last one is done.
        self._adapters.hide(adapter)
        self._unloads.append((connection, call.call_id, adapter))

    def _finish_unloads(self) -> None:
        if not self._unloads:
            return
        in_use = Counter(live.adapter for live in self._requests.values())
        for entry in [entry for entry in self._unloads if not in_use[entry[2].id]]:
            connection, call_id, adapter = entry
            self._unloads.remove(entry)
            self._backend.unload_adapter(adapter.id)
            self._announce(connection, AdapterReply(call_id, adapter=adapter))

    def _announce(self, connection: Connection, reply: AdapterReply) -> None:
        """The new list to all workers, then the reply, which the socket side holds until they acknowledged."""
        self._send(EVERYONE, Adapters(self._adapters.version, self._adapters.list()))
        self._send(connection, reply)

    # --- sending ---

    def _beat(self) -> None:
        now = time.monotonic()
        if now >= self._next_heartbeat:
            self._next_heartbeat = now + HEARTBEAT_INTERVAL_S
            self._send(EVERYONE, Heartbeat(self._backend.stats))

    def _send(self, connection: Connection, message: msgspec.Struct) -> None:
        self._outbox.append((connection, message))

    def _flush(self) -> None:
        if self._outbox:
            deliveries, self._outbox = self._outbox, []
            self._deliver(deliveries)
