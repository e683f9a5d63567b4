"""The engine's loop: takes messages in, lets the backend step, sends outputs to whoever asked.

Runs in the compute thread, alone with the backend. It knows connections only as opaque keys and never touches a
socket: `post` is how the socket side talks to it, `deliver` how it answers, both safe between threads.
"""

import logging
import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from server.engine.adapter_calls import EVERYONE, AdapterCalls, Connection
from server.engine.adapter_desk import AdapterDesk
from server.engine.adapters import AdapterTable
from server.engine.backends.base import Backend, Interruptible, Metered, RequestRefused
from server.engine.lobby import SHUTTING_DOWN, Lobby
from server.engine.messages import (
    Abort,
    Accepted,
    Draining,
    EngineStats,
    FinishReason,
    Generate,
    Heartbeat,
    ListAdapters,
    LoadAdapter,
    Metrics,
    Outputs,
    ReadMetrics,
    Rejected,
    SequenceOutput,
    StartDrain,
    UnloadAdapter,
)

log = logging.getLogger("qloop.engine")

HEARTBEAT_INTERVAL_S = 0.25
IDLE_WAIT_S = 0.2
RETRY_AFTER_S = 1

MAX_ADAPTERS = 8
ADAPTER_WAIT_S = 30.0

Delivery = tuple[Connection, msgspec.Struct]


class Disconnected(msgspec.Struct):
    """The connection is gone: abort what it asked for."""


class RegistryChanged(msgspec.Struct):
    """Something was published, promoted or removed. These are all published names."""

    names: Sequence[str]


class Stop(msgspec.Struct):
    """Leave the loop; sequences still running end with an error."""


@dataclass(slots=True)
class Live:
    """A request the backend holds."""

    connection: Connection
    adapter: str | None
    unfinished: set[int] = field(default_factory=set)


class Core:
    """Owns which request belongs to which connection, admission and drain."""

    def __init__(
        self,
        backend: Backend,
        adapters: AdapterTable,
        *,
        max_queue: int,
        deliver: Callable[[list[Delivery]], None],
        max_adapters: int = MAX_ADAPTERS,
        adapter_wait_s: float = ADAPTER_WAIT_S,
    ) -> None:
        self.model = adapters.model
        self._backend = backend
        self._max_queue = max_queue
        self._deliver = deliver
        self._interrupt = backend.interrupt if isinstance(backend, Interruptible) else _nothing
        self._inbox: queue.SimpleQueue[tuple[Connection, msgspec.Struct]] = queue.SimpleQueue()
        self._outbox: list[Delivery] = []
        self._requests: dict[str, Live] = {}
        self._lobby = Lobby(adapter_wait_s, want=self._want, start=self._start, reject=self._reject)
        self._desk = AdapterDesk(backend, adapters, max_adapters, self._is_in_use)
        self._calls = AdapterCalls(
            self._desk, adapter_wait_s, send=self._send, is_in_use=self._is_in_use, cancel=self._cancel_adapter
        )
        self._is_draining = False
        self._is_stopping = False
        self._next_heartbeat = 0.0

    def restore_adapters(self) -> None:
        """Before `run`: serve what was served before, and what the registry's names mean."""
        self._desk.restore()

    @property
    def is_drained(self) -> bool:
        """A drain was started and nothing is left to compute. May be asked from any thread."""
        return self._is_draining and not self._requests

    def post(self, connection: Connection, message: msgspec.Struct) -> None:
        """Hand over a message from any thread."""
        self._inbox.put((connection, message))
        self._interrupt()

    def run(self) -> None:
        """The loop. Returns after Stop; any exception is a defect of the backend and ends the process."""
        while not self._is_stopping:
            self._take_messages()
            if self._backend.has_work:
                self._route(self._backend.step())
                self._flush()  # what is there does not wait for adapters that are being loaded
            self._lobby.visit()
            self._calls.advance()
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
                self._calls.load(connection, message)
            case UnloadAdapter():
                self._calls.unload(connection, message)
            case ListAdapters():
                self._calls.tell(connection, message)
            case ReadMetrics():
                text = self._backend.metrics() if isinstance(self._backend, Metered) else ""
                self._send(connection, Metrics(message.call_id, text))
            case RegistryChanged():
                self._calls.registry_changed(message.names)
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
        try:
            self._check_admission(request)
            if request.adapter is not None:
                self._lobby.enter(connection, request, request.adapter)
            else:
                self._start(connection, request)
        except RequestRefused as refused:
            self._reject(connection, request, refused)

    def _start(self, connection: Connection, request: Generate) -> None:
        self._backend.check(request)
        self._backend.add(request)
        self._requests[request.request_id] = Live(connection, request.adapter, set(range(request.n)))
        self._send(connection, Accepted(request.request_id, len(request.prompt_token_ids)))

    def _check_admission(self, request: Generate) -> None:
        """Raises RequestRefused."""
        if self._is_draining:
            raise RequestRefused("draining", SHUTTING_DOWN)
        if request.request_id in self._requests or self._lobby.has(request.request_id):
            raise RequestRefused("invalid_request", "This request id is already running.")
        most = self._max_queue + self.model.max_num_seqs
        if not 1 <= request.n <= most:
            raise RequestRefused(
                "invalid_request", f"n must be between 1 and {most} on this server, not {request.n}.", "n"
            )
        if request.n > (room := most - self._num_sequences()):
            raise RequestRefused(
                "overloaded", f"The queue is full: room for {max(room, 0)} more sequences, {request.n} asked for."
            )

    def _reject(self, connection: Connection, request: Generate, refused: RequestRefused) -> None:
        retry_after_s = RETRY_AFTER_S if refused.code in ("draining", "overloaded") else None
        self._send(
            connection, Rejected(request.request_id, refused.code, refused.message, refused.param, retry_after_s)
        )

    # --- adapters ---

    def _want(self, adapter: str, num_ahead: int) -> bool:
        return self._desk.want(adapter, num_ahead + self._calls.num_waiting)

    def _is_in_use(self, adapter_id: str) -> bool:
        return any(live.adapter == adapter_id for live in self._requests.values())

    def _cancel_adapter(self, adapter_id: str) -> None:
        for request_id in [r for r, live in self._requests.items() if live.adapter == adapter_id]:
            self._backend.abort(request_id)
            self._end(request_id, self._requests.pop(request_id), f"The adapter {adapter_id} was unloaded.")

    # --- what runs ---

    def _num_sequences(self) -> int:
        return sum(len(live.unfinished) for live in self._requests.values()) + self._lobby.num_sequences

    def _abort(self, connection: Connection, message: Abort) -> None:
        if message.index is None:
            self._lobby.take(lambda w: w.connection == connection and w.request.request_id == message.request_id)
        live = self._requests.get(message.request_id)
        if live is None or live.connection != connection:
            return  # already finished, or not this worker's
        self._backend.abort(message.request_id, message.index)
        live.unfinished -= {message.index} if message.index is not None else live.unfinished.copy()
        if not live.unfinished:
            del self._requests[message.request_id]

    def _forget(self, connection: Connection) -> None:
        self._lobby.take(lambda waiting: waiting.connection == connection)
        self._calls.forget(connection)
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
            self._end(request_id, live, reason)
        self._requests.clear()
        self._lobby.close(reason)

    def _end(self, request_id: str, live: Live, reason: str) -> None:
        items = [SequenceOutput(request_id, i, [], 0, FinishReason.ERROR, error=reason) for i in live.unfinished]
        self._send(live.connection, Outputs(items))

    def _start_drain(self) -> None:
        self._is_draining = True
        self._lobby.close()
        self._send(EVERYONE, Draining())
        self._next_heartbeat = 0.0  # whoever waits for idleness should learn of it now

    # --- sending ---

    def _beat(self) -> None:
        now = time.monotonic()
        if now >= self._next_heartbeat:
            self._next_heartbeat = now + HEARTBEAT_INTERVAL_S
            self._send(EVERYONE, Heartbeat(self._stats()))

    def _stats(self) -> EngineStats:
        """The backend's, and what it knows nothing of."""
        stats = self._backend.stats
        return msgspec.structs.replace(
            stats,
            num_waiting=stats.num_waiting + self._lobby.num_sequences,
            num_adapters=len(self._desk.residents),
            num_evicted=self._desk.residents.num_evicted,
        )

    def _send(self, connection: Connection, message: msgspec.Struct) -> None:
        self._outbox.append((connection, message))

    def _flush(self) -> None:
        if self._outbox:
            deliveries, self._outbox = self._outbox, []
            self._deliver(deliveries)


def _nothing() -> None:
    """Backends that compute in the core's own thread never wait."""
