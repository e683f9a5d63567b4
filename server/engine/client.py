"""The engine as a worker, the supervisor and the trainer see it: one connection, many requests.

Reconnects for ever. A request that was accepted ends in exactly one of: its outputs, an error, or `cancel`.
Knows token ids and the wire; no text, no HTTP.
"""

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec

from server.engine.messages import (
    PROTOCOL_VERSION,
    Abort,
    Accepted,
    AckAdapters,
    AdapterInfo,
    AdapterReply,
    Adapters,
    AdapterStates,
    Draining,
    EngineStats,
    FinishReason,
    FromEngine,
    Generate,
    Heartbeat,
    Hello,
    ListAdapters,
    LoadAdapter,
    Metrics,
    ModelInfo,
    Outputs,
    ReadMetrics,
    Ready,
    Refused,
    Rejected,
    SequenceOutput,
    StartDrain,
    UnloadAdapter,
)
from server.engine.transport import FrameError, FrameProtocol
from server.errors import (
    Conflict,
    DeadlineExceeded,
    EngineUnavailable,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    QloopError,
)
from server.errors import Draining as DrainingError

log = logging.getLogger("qloop.client")

RECONNECT_S = 0.2
WATCH_INTERVAL_S = 0.5
UNAVAILABLE_RETRY_S = 2
_REJECTIONS: dict[str, type[QloopError]] = {
    "model_not_found": ModelNotFound,
    "overloaded": Overloaded,
    "draining": DrainingError,
    "deadline_exceeded": DeadlineExceeded,
    "adapter_busy": Conflict,
}


class Generation:
    """One accepted request's outputs. Its one consumer either awaits `next`, or sets `on_news` and calls `take`."""

    def __init__(self, request: Generate, client: "EngineClient") -> None:
        self.request_id = request.request_id
        # Called inside the connection's read callback, once per output: must neither wait nor raise.
        self.on_news: Callable[[], None] | None = None
        self._client = client
        self._unfinished = set(range(request.n))
        self._items: list[SequenceOutput] = []
        self._error: QloopError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.accepted: asyncio.Future[Accepted] = asyncio.get_running_loop().create_future()

    @property
    def is_finished(self) -> bool:
        """Every choice has ended, by the engine's word or by `abort`."""
        return not self._unfinished

    def take(self) -> list[SequenceOutput]:
        """All outputs since the last call, in order, often none.

        Raises the QloopError that ended the request, once all its outputs were given; not when these were complete.
        """
        if not self._items:
            if self._error is not None and not self.is_finished:
                raise self._error
            return []
        items, self._items = self._items, []
        for output in items:
            if output.finish_reason is not None:
                self._unfinished.discard(output.index)
        if self._error is not None:  # it came before these were taken, and its call was theirs: it needs its own
            self.call_again()
        return items

    def call_again(self) -> None:
        """`on_news` once more, soon: something was left."""
        asyncio.get_running_loop().call_soon(self._wake)

    async def next(self) -> list[SequenceOutput]:
        """As `take`, but waits for the first."""
        while not (items := self.take()):
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return items

    def abort(self, index: int) -> None:
        """End one choice, for instance at a stop string; later outputs of it may still arrive."""
        if index in self._unfinished:
            self._unfinished.discard(index)
            self._client.abort(self, index)

    def cancel(self) -> None:
        """End all of it; harmless when already finished. Call in `finally`."""
        self.on_news = None
        self._client.forget(self)

    def push(self, output: SequenceOutput) -> None:
        if self._error is None:
            self._items.append(output)
            self._wake()

    def fail(self, error: QloopError) -> None:
        """End it for its consumer, after what it has not taken yet."""
        self._error = error
        if not self.accepted.done():
            self.accepted.set_exception(error)
        self._wake()

    def _wake(self) -> None:
        if self.on_news is not None:
            self.on_news()
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Connection(FrameProtocol):
    def __init__(self, client: "EngineClient") -> None:
        super().__init__(FromEngine)
        self._client = client
        self.gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.send(Hello(PROTOCOL_VERSION, self._client.role, os.getpid()))

    def message_received(self, message: Any) -> None:
        self._client.received(message)

    def protocol_failed(self, reason: str) -> None:
        log.error("the engine broke the protocol: %s", reason)

    def closed(self, reason: str | None) -> None:
        if not self.gone.done():
            self.gone.set_result(reason or "closed")


class EngineClient:
    """Keeps one connection to the engine. All methods belong to the event loop that called `start`."""

    def __init__(
        self,
        socket_path: Path,
        *,
        role: Literal["worker", "supervisor", "client"] = "client",
        heartbeat_timeout_s: float = 6.0,
        on_ready: Callable[[Ready], None] = lambda ready: None,
    ) -> None:
        self.role: Literal["worker", "supervisor", "client"] = role
        self.model: ModelInfo | None = None
        self.adapters: list[AdapterInfo] = []
        self.stats = EngineStats()
        self.engine_pid: int | None = None
        self.is_draining = False
        self.heard_since_drain = False  # `stats` are newer than the drain's start
        self.refusal: str | None = None
        self._socket_path = socket_path
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._on_ready = on_ready
        self._connection: _Connection | None = None
        self._is_ready = False
        self._last_heard = 0.0
        self._requests: dict[str, Generation] = {}
        self._calls: dict[str, asyncio.Future[Any]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    # --- life ---

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._stay_connected()), asyncio.create_task(self._watch_heartbeat())]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._connection is not None:
            self._connection.abort()
        self._lost("This process closed its connection to the engine.")

    @property
    def is_ready(self) -> bool:
        """Connected to an engine whose step loop was heard lately and which takes new requests."""
        return self._is_ready and not self.is_draining

    @property
    def is_connected(self) -> bool:
        return self._is_ready

    @property
    def silence_s(self) -> float:
        """Seconds since the engine's step loop was last heard; 0 while not connected."""
        return asyncio.get_running_loop().time() - self._last_heard if self._is_ready else 0.0

    async def wait_ready(self, timeout_s: float) -> None:
        """Raises EngineUnavailable after `timeout_s`, or at once when the versions differ."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while not self.is_ready:
            if self.refusal:
                raise EngineUnavailable(self.refusal)
            if asyncio.get_running_loop().time() > deadline:
                raise EngineUnavailable(f"No engine answered on {self._socket_path} within {timeout_s:g} s.")
            await asyncio.sleep(0.05)

    # --- requests ---

    async def generate(self, request: Generate) -> Generation:
        """Send a request and wait for admission. Raises the QloopError that refused it."""
        self._check_available()
        generation = Generation(request, self)
        self._requests[request.request_id] = generation
        try:
            self._send(request)
            await generation.accepted
        except FrameError as error:
            self._requests.pop(request.request_id, None)
            raise InvalidRequest(f"The request is too large for the engine: {error}.") from error
        except BaseException:
            self.forget(generation)
            raise
        return generation

    def abort(self, generation: Generation, index: int) -> None:
        self._send(Abort(generation.request_id, index))
        if generation.is_finished:
            self._requests.pop(generation.request_id, None)

    def forget(self, generation: Generation) -> None:
        """Stop routing to it; the engine is told unless it has finished."""
        if self._requests.pop(generation.request_id, None) is not None and not generation.is_finished:
            self._send(Abort(generation.request_id))

    # --- operator calls ---

    async def load_adapter(self, name: str, revision: str | None = None, *, pin: bool | None = None) -> AdapterInfo:
        """Returns when every worker routes to it. Without a revision: the one that the registry's name means, and the
        engine's name follows.

        Raises ModelNotFound, Conflict (it is being unloaded), Overloaded (no slot), or InvalidRequest with the reason.
        """
        reply = await self._change(lambda call_id: LoadAdapter(call_id, name, revision, pin))
        return reply[0]

    async def unload_adapter(
        self, name: str, revision: str | None = None, *, cancel: bool = False
    ) -> list[AdapterInfo]:
        """A revision, or all of a name. Returns when the last request is done and the memory is free.

        `cancel` ends running requests with an error. Raises ModelNotFound.
        """
        return await self._change(lambda call_id: UnloadAdapter(call_id, name, revision, cancel))

    async def adapter_states(self) -> AdapterStates:
        """What only the engine knows of its adapters; which ones it serves is in `adapters`."""
        states: AdapterStates = await self._call(ListAdapters)
        return states

    async def metrics(self) -> str:
        """Prometheus text of what the engine's library counts under its own names."""
        reply: Metrics = await self._call(ReadMetrics)
        return reply.text

    def start_drain(self) -> None:
        self._send(StartDrain())

    async def _change(self, make: Callable[[str], msgspec.Struct]) -> list[AdapterInfo]:
        reply: AdapterReply = await self._call(make)
        if reply.error is not None:
            kind = _REJECTIONS.get(reply.error_code or "", InvalidRequest)
            wait_s = UNAVAILABLE_RETRY_S if kind is Overloaded else None
            raise kind(reply.error, code=reply.error_code, retry_after_s=wait_s)
        return reply.adapters

    async def _call(self, make: Callable[[str], msgspec.Struct]) -> Any:
        self._check_available()
        call_id = os.urandom(8).hex()
        self._calls[call_id] = asyncio.get_running_loop().create_future()
        try:
            self._send(make(call_id))
            return await self._calls[call_id]
        finally:
            self._calls.pop(call_id, None)

    # --- what the engine says ---

    def received(self, message: Any) -> None:
        match message:
            case Outputs():
                for output in message.items:
                    self._route(output)
            case Heartbeat():
                self._last_heard = asyncio.get_running_loop().time()
                self.stats = message.stats
                self.heard_since_drain = self.is_draining
            case Accepted():
                if (generation := self._requests.get(message.request_id)) and not generation.accepted.done():
                    generation.accepted.set_result(message)
            case Rejected():
                self._reject(message)
            case Ready():
                self._become_ready(message)
            case Adapters():
                self._take_adapters(message.adapters, message.version)
            case AdapterReply() | AdapterStates() | Metrics():
                if (call := self._calls.get(message.call_id)) and not call.done():
                    call.set_result(message)
            case Draining():
                self.is_draining = True
            case Refused():
                self._refused(message.message)

    def _route(self, output: SequenceOutput) -> None:
        generation = self._requests.get(output.request_id)
        if generation is None:
            return  # aborted a moment ago
        if output.finish_reason is FinishReason.ERROR:
            generation.fail(InternalError(output.error or "The engine failed.", code="engine_error"))
            self.forget(generation)  # its other choices may still be computed
        elif output.finish_reason is FinishReason.DEADLINE:
            generation.fail(DeadlineExceeded("The request's deadline passed before the answer was complete."))
            self.forget(generation)
        else:
            generation.push(output)

    def _reject(self, message: Rejected) -> None:
        generation = self._requests.pop(message.request_id, None)
        if generation is not None:
            kind = _REJECTIONS.get(message.code, InvalidRequest)
            generation.fail(
                kind(message.message, code=message.code, param=message.param, retry_after_s=message.retry_after_s)
            )

    def _become_ready(self, ready: Ready) -> None:
        if ready.protocol_version != PROTOCOL_VERSION:
            self._refused(
                f"The engine speaks protocol {ready.protocol_version}, this process {PROTOCOL_VERSION}: "
                "restart both from the same release of qloop."
            )
            return
        self.refusal = None
        self.model = ready.model
        self.engine_pid = ready.pid
        self.is_draining, self.heard_since_drain = ready.is_draining, False
        self._last_heard = asyncio.get_running_loop().time()
        self._is_ready = True
        self._take_adapters(ready.adapters, ready.adapters_version)
        self._on_ready(ready)

    def _refused(self, reason: str) -> None:
        if reason != self.refusal:  # said once, not at every attempt
            log.error("no connection to the engine: %s", reason)
        self.refusal = reason

    def _take_adapters(self, adapters: list[AdapterInfo], version: int) -> None:
        self.adapters = adapters
        self._send(AckAdapters(version))

    # --- connection ---

    def _check_available(self) -> None:
        if self.is_draining:
            raise DrainingError("The server is shutting down.", retry_after_s=UNAVAILABLE_RETRY_S)
        if not self._is_ready:
            reason = self.refusal or "The engine is not running or still loading the model."
            raise EngineUnavailable(reason, retry_after_s=UNAVAILABLE_RETRY_S)

    def _send(self, message: msgspec.Struct) -> None:
        if self._connection is not None:
            self._connection.send(message)

    async def _stay_connected(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                _, self._connection = await loop.create_unix_connection(
                    lambda: _Connection(self), str(self._socket_path)
                )
                reason = await self._connection.gone
                self._lost(f"The engine went away ({reason}).")
            except OSError:
                pass  # not there (yet)
            await asyncio.sleep(RECONNECT_S)

    async def _watch_heartbeat(self) -> None:
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            if self.role != "supervisor" and self.silence_s > self._heartbeat_timeout_s and self._connection:
                log.error("no heartbeat from the engine for %.1f s", self.silence_s)
                self._lost("The engine does not answer.")
                self._connection.abort()

    def _lost(self, reason: str) -> None:
        self._is_ready = False
        self.stats = EngineStats()
        error = EngineUnavailable(reason + " The answer is not complete.", retry_after_s=UNAVAILABLE_RETRY_S)
        requests, self._requests = self._requests, {}
        for generation in requests.values():
            generation.fail(error)
        for call in self._calls.values():
            if not call.done():
                call.set_exception(error)
