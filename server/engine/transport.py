"""Frames over a Unix stream socket: a 4-byte big-endian length, then one MessagePack value.

Knows bytes and message types, not what any message means.
"""

import asyncio
import struct
from typing import Any, cast

import msgspec

from server.engine.messages import MAX_FRAME_BYTES

_LENGTH = struct.Struct(">I")
_encode = msgspec.msgpack.Encoder().encode


class FrameError(Exception):
    """The peer sent something that is not a frame of this protocol."""


def encode_frame(message: msgspec.Struct) -> bytes:
    """Raises FrameError when the message is larger than MAX_FRAME_BYTES: the peer would drop the connection."""
    payload = _encode(message)
    if len(payload) > MAX_FRAME_BYTES:
        raise FrameError(f"a {type(message).__name__} of {len(payload)} bytes exceeds the frame limit")
    return _LENGTH.pack(len(payload)) + payload


class FrameProtocol(asyncio.Protocol):
    """Cuts the byte stream into frames and hands each decoded message to `message_received`.

    Subclasses implement `message_received` and `closed`. Belongs to one event loop; not thread-safe.
    """

    def __init__(self, message_type: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(message_type)
        self._buffer = bytearray()
        self.transport: asyncio.Transport | None = None

    def message_received(self, message: Any) -> None:
        raise NotImplementedError

    def closed(self, reason: str | None) -> None:
        """Called once, whatever ended the connection."""
        raise NotImplementedError

    def send(self, message: msgspec.Struct) -> None:
        """Queue a frame; silently nothing once the connection is going away, as `closed` tells that story."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(encode_frame(message))

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.closed(str(exc) if exc else None)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        try:
            consumed = self._read_frames()
        except (FrameError, msgspec.MsgspecError) as error:
            self._fail(error)
            return
        del self._buffer[:consumed]

    def _read_frames(self) -> int:
        buffer, start = self._buffer, 0
        while len(buffer) - start >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(buffer, start)
            if size > MAX_FRAME_BYTES:
                raise FrameError(f"a frame announces {size} bytes")
            end = start + _LENGTH.size + size
            if len(buffer) < end:
                break
            # A copy: the buffer cannot be resized while a view of it is alive.
            self.message_received(self._decoder.decode(bytes(buffer[start + _LENGTH.size : end])))
            start = end
        return start

    def _fail(self, error: Exception) -> None:
        self._buffer.clear()
        self.protocol_failed(str(error))
        self.abort()

    def protocol_failed(self, reason: str) -> None:
        """A frame that does not decode; the connection is closed right after."""
