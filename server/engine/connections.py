"""The engine's socket side: accepts connections, hands messages to the core, writes its deliveries.

One event loop, in the engine's main thread. It knows who is connected and how fast they read, not what runs.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from server.engine.adapter_calls import EVERYONE
from server.engine.core import Core, Delivery, Disconnected
from server.engine.messages import (
    PROTOCOL_VERSION,
    AckAdapters,
    AdapterReply,
    Adapters,
    Draining,
    Heartbeat,
    Hello,
    Outputs,
    Ready,
    Refused,
    SequenceOutput,
    StartDrain,
    ToEngine,
)
from server.engine.transport import FrameError, FrameProtocol
from server.errors import ConfigError

log = logging.getLogger("qloop.engine")


class ClientConnection(FrameProtocol):
    """One worker, supervisor or other client. While it reads slowly, outputs are merged instead of queued."""

    def __init__(self, owner: "EngineSocket") -> None:
        super().__init__(ToEngine)
        self._owner = owner
        self.hello: Hello | None = None
        self.acknowledged = -1  # the newest version of the adapter list that it routes by
        self._is_slow = False
        self._held: dict[tuple[str, int], SequenceOutput] = {}

    def message_received(self, message: Any) -> None:
        if self.hello is None:
            self._greet(message)
        elif isinstance(message, Hello):
            raise msgspec.ValidationError("Hello comes once")
        elif isinstance(message, AckAdapters):
            self._owner.acknowledged(self, message.version)
        elif isinstance(message, StartDrain) and self.hello.role != "supervisor":
            raise msgspec.ValidationError("only the supervisor may start a drain")
        else:
            self._owner.core.post(self, message)

    def _greet(self, message: Any) -> None:
        if not isinstance(message, Hello):
            raise msgspec.ValidationError("the first message must be Hello")
        if message.protocol_version != PROTOCOL_VERSION:
            text = (
                f"This engine speaks protocol {PROTOCOL_VERSION}, process {message.pid} speaks "
                f"{message.protocol_version}: restart both from the same release of qloop."
            )
            log.error(text)
            self.send(Refused(PROTOCOL_VERSION, text))
            if self.transport is not None:
                self.transport.close()
            return
        self.hello = message
        self._owner.welcome(self)

    def deliver(self, message: msgspec.Struct) -> None:
        if self._is_slow and isinstance(message, Outputs):
            for item in message.items:
                self._hold(item)
        elif isinstance(message, Outputs):
            self._send_outputs(message.items)
        elif not (self._is_slow and isinstance(message, Heartbeat)):  # the next one says more than ten old ones
            self.send(message)

    def _send_outputs(self, items: list[SequenceOutput]) -> None:
        """In several frames when one would be too large."""
        try:
            self.send(Outputs(items))
        except FrameError as error:
            if len(items) == 1:
                log.error("closing a connection: %s", error)
                self.abort()
                return
            middle = len(items) // 2
            self._send_outputs(items[:middle])
            self._send_outputs(items[middle:])

    def _hold(self, new: SequenceOutput) -> None:
        key = (new.request_id, new.index)
        if (held := self._held.get(key)) is None:
            self._held[key] = new
        else:
            append(held, new)

    def pause_writing(self) -> None:
        self._is_slow = True

    def resume_writing(self) -> None:
        self._is_slow = False
        if self._held:
            items, self._held = list(self._held.values()), {}
            self._send_outputs(items)

    def protocol_failed(self, reason: str) -> None:
        log.error("closing a connection that broke the protocol: %s", reason)

    def closed(self, reason: str | None) -> None:
        self._owner.disconnected(self)


def append(held: SequenceOutput, new: SequenceOutput) -> None:
    """Two consecutive outputs of one sequence become one. In place: a held answer may grow for thousands of steps."""
    held.new_token_ids += new.new_token_ids
    held.num_tokens = max(held.num_tokens, new.num_tokens)
    held.finish_reason, held.stop_token_id, held.error = new.finish_reason, new.stop_token_id, new.error
    if held.logprobs is None:
        held.logprobs = new.logprobs
    elif new.logprobs is not None:
        held.logprobs += new.logprobs
    if held.prompt_logprobs is None:
        held.prompt_logprobs = new.prompt_logprobs


class EngineSocket:
    """All connections of one engine."""

    def __init__(self, ready: Callable[[], Ready]) -> None:
        self._ready = ready
        self.core: Core  # set before listening; the core in turn needs `deliver`
        self._connections: set[ClientConnection] = set()
        self._is_draining = False
        # version -> (who still has to acknowledge, reply to send then)
        self._unacknowledged: list[tuple[int, set[ClientConnection], ClientConnection, AdapterReply]] = []
        self._adapters: Adapters | None = None

    async def listen(self, path: Path) -> asyncio.Server:
        """Raises ConfigError when another engine already listens there; removes a dead engine's socket."""
        path.parent.mkdir(parents=True, exist_ok=True)
        await _clear_stale_socket(path)
        old_mask = os.umask(0o177)  # the socket is ours alone
        try:
            return await asyncio.get_running_loop().create_unix_server(lambda: ClientConnection(self), str(path))
        finally:
            os.umask(old_mask)

    def deliver(self, deliveries: Iterable[Delivery]) -> None:
        """Write what the core decided; runs in the event loop."""
        for connection, message in deliveries:
            if isinstance(message, AdapterReply) and message.error is None:
                self._hold_reply(connection, message)
            elif connection is EVERYONE:
                self._broadcast(message)
            elif isinstance(connection, ClientConnection):
                connection.deliver(message)

    def welcome(self, connection: ClientConnection) -> None:
        ready = self._ready()
        if self._adapters is not None:
            ready = msgspec.structs.replace(
                ready, adapters=self._adapters.adapters, adapters_version=self._adapters.version
            )
        connection.send(msgspec.structs.replace(ready, is_draining=self._is_draining))
        self._connections.add(connection)

    def acknowledged(self, connection: ClientConnection, version: int) -> None:
        connection.acknowledged = max(connection.acknowledged, version)
        for wanted, waiting, _, _ in self._unacknowledged:
            if version >= wanted:
                waiting.discard(connection)
        self._release_replies()

    def disconnected(self, connection: ClientConnection) -> None:
        self._connections.discard(connection)
        for _, waiting, _, _ in self._unacknowledged:
            waiting.discard(connection)
        self._release_replies()
        if connection.hello is not None:
            self.core.post(connection, Disconnected())

    def _broadcast(self, message: msgspec.Struct) -> None:
        if isinstance(message, Adapters):
            self._adapters = message
        elif isinstance(message, Draining):
            self._is_draining = True
        for connection in list(self._connections):
            connection.deliver(message)

    def _hold_reply(self, caller: Any, reply: AdapterReply) -> None:
        """A call is answered only when the next request through any worker finds the change."""
        version = self._adapters.version if self._adapters is not None else 0
        workers = {c for c in self._connections if c.hello is not None and c.hello.role == "worker"}
        behind = {worker for worker in workers if worker.acknowledged < version}
        self._unacknowledged.append((version, behind, caller, reply))
        self._release_replies()

    def _release_replies(self) -> None:
        for entry in [entry for entry in self._unacknowledged if not entry[1]]:
            self._unacknowledged.remove(entry)
            entry[2].send(entry[3])


async def _clear_stale_socket(path: Path) -> None:
    if not path.exists():
        return
    if not path.is_socket():
        raise ConfigError(f"{path} exists and is no socket. Remove it, or set QLOOP_ENGINE_SOCKET to another path.")
    try:
        _, writer = await asyncio.open_unix_connection(str(path))
    except OSError:
        path.unlink(missing_ok=True)
        return
    writer.close()
    raise ConfigError(f"An engine already listens on {path}. Stop it first, or give this one another QLOOP_HOME.")
