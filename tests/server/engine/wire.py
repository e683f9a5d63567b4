"""Raw frames over the engine's socket, without our client."""

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from server.engine.messages import (
    PROTOCOL_VERSION,
    FromEngine,
    Generate,
    Hello,
    Outputs,
    Ready,
    Rejected,
    SamplingParams,
)
from server.engine.transport import encode_frame

_DECODER: Any = msgspec.msgpack.Decoder(FromEngine)


class Wire:
    """A blocking socket that speaks the protocol; EOF raises EOFError."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        try:
            self.socket.connect(str(path))
        except OSError:
            self.socket.close()
            raise

    def send(self, message: msgspec.Struct) -> None:
        self.socket.sendall(encode_frame(message))

    def receive(self) -> Any:
        (size,) = struct.unpack(">I", self._exactly(4))
        return _DECODER.decode(self._exactly(size))

    def receive_until(self, condition: Callable[[Any], bool], timeout_s: float = 20.0) -> Any:
        deadline = time.monotonic() + timeout_s
        while True:
            message = self.receive()
            if condition(message):
                return message
            assert time.monotonic() < deadline, "the awaited message never came"

    def greet(self, role: Any = "worker") -> Ready:
        self.send(Hello(PROTOCOL_VERSION, role, 1))
        ready = self.receive()
        assert isinstance(ready, Ready)
        return ready

    def is_closed(self) -> bool:
        """Waits for the end of the connection; what still comes before it is dropped."""
        try:
            while True:
                self.receive()
        except (EOFError, ConnectionError):
            return True
        except TimeoutError:
            return False

    def read_answer(self, request_id: str, n: int = 1, timeout_s: float = 60.0) -> list[Any]:
        """All messages until every choice of the request has ended."""
        messages: list[Any] = []
        num_ended, deadline = 0, time.monotonic() + timeout_s
        while num_ended < n:
            assert time.monotonic() < deadline, "the answer never ended"
            messages.append(self.receive())
            assert not isinstance(messages[-1], Rejected), messages[-1]
            if isinstance(messages[-1], Outputs):
                ours = [item for item in messages[-1].items if item.request_id == request_id]
                num_ended += sum(item.finish_reason is not None for item in ours)
        return messages

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = self.socket.recv(size - len(data))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)


@contextlib.contextmanager
def connect(path: Path, role: str | None = "worker") -> Iterator[Wire]:
    """A connection that has been greeted, unless `role` is None."""
    wire = Wire(path)
    try:
        if role is not None:
            wire.greet(role)
        yield wire
    finally:
        wire.socket.close()


def ask(request_id: str, prompt: list[int], n: int = 1, **params: Any) -> Generate:
    return Generate(request_id=request_id, prompt_token_ids=prompt, n=n, params=SamplingParams(**params))


def token_ids(messages: list[Any], request_id: str, index: int = 0) -> list[int]:
    return [
        token_id
        for message in messages
        if isinstance(message, Outputs)
        for item in message.items
        if (item.request_id, item.index) == (request_id, index)
        for token_id in item.new_token_ids
    ]
