"""One cheap client for every server measured: raw sockets, bytes kept as they come, understood only afterwards."""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import uvloop

START_TIMEOUT_S = 60.0
LOAD_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class StreamRead:
    """One answer, parsed."""

    status: int
    num_content: int  # chunks with new text
    num_content_before_mark: int
    num_events: int
    num_bytes: int
    finish_reason: str | None
    is_done: bool


@dataclass
class Window:
    """What the probe said when the load was offered, when every stream had begun, and when all had ended."""

    offered: Any = None
    begun: Any = None
    ended: Any = None
    offered_at: float = 0.0
    begun_at: float = 0.0
    ended_at: float = 0.0
    first_byte_s: list[float] = field(default_factory=list)


class _Exchange(asyncio.Protocol):
    """Writes one request and keeps the answer. `Connection: close` makes the end of file its end."""

    def __init__(self, request: bytes, on_begun: Callable[[], None], on_closed: Callable[[], None]) -> None:
        self.pieces: list[bytes] = []
        self.mark = 0  # pieces that were there when every stream had begun
        self.first_byte_s: float | None = None
        self._request, self._on_begun, self._on_closed = request, on_begun, on_closed
        self._num_events = 0
        self._start = time.perf_counter()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append(data)
        if self._num_events < 2:  # the first event is the role, without text
            self._see_begin(data)

    def _see_begin(self, data: bytes) -> None:
        if self.first_byte_s is None:
            self.first_byte_s = time.perf_counter() - self._start
        self._num_events += data.count(b"\n\n")
        if self._num_events >= 2:
            self._on_begun()

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_closed()


def run_load(
    port: int, bodies: Sequence[Mapping[str, Any]], probe: Callable[[], Any]
) -> tuple[Window, list[StreamRead]]:
    """Send all bodies to `/v1/chat/completions` at once as streams, and read to the end."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        window, exchanges = runner.run(_run(port, [_request(port, body) for body in bodies], probe))
    return window, [_parse(exchange) for exchange in exchanges]


async def _run(port: int, requests: Sequence[bytes], probe: Callable[[], Any]) -> tuple[Window, list[_Exchange]]:
    loop = asyncio.get_running_loop()
    window, is_over = Window(), asyncio.Event()
    num_begun = num_closed = 0
    exchanges: list[_Exchange] = []

    def begun() -> None:
        nonlocal num_begun
        num_begun += 1
        if num_begun == len(requests):
            window.begun, window.begun_at = probe(), time.perf_counter()
            for exchange in exchanges:
                exchange.mark = len(exchange.pieces)

    def closed() -> None:
        nonlocal num_closed
        num_closed += 1
        if num_closed == len(requests):
            window.ended, window.ended_at = probe(), time.perf_counter()
            is_over.set()

    exchanges += [_Exchange(request, begun, closed) for request in requests]
    window.offered, window.offered_at = probe(), time.perf_counter()
    await asyncio.gather(*(loop.create_connection(lambda e=e: e, "127.0.0.1", port) for e in exchanges))
    await asyncio.wait_for(is_over.wait(), LOAD_TIMEOUT_S)
    window.first_byte_s = [e.first_byte_s for e in exchanges if e.first_byte_s is not None]
    return window, exchanges


def run_short(port: int, body: Mapping[str, Any], num_requests: int, num_clients: int) -> tuple[float, list[float]]:
    """Whole-answer requests over kept connections. Returns requests/s and each request's seconds."""

    async def client(count: int, times: list[float]) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        request = _request(port, body, keep_alive=True)
        for _ in range(count):
            start = time.perf_counter()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(length)
            times.append(time.perf_counter() - start)
        writer.close()

    async def all_clients() -> list[float]:
        times: list[float] = []
        await asyncio.gather(*(client(num_requests // num_clients, times) for _ in range(num_clients)))
        return times

    start = time.perf_counter()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        times = runner.run(all_clients())
    return len(times) / (time.perf_counter() - start), times


def _request(port: int, body: Mapping[str, Any], *, keep_alive: bool = False) -> bytes:
    payload = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: {'keep-alive' if keep_alive else 'close'}\r\n\r\n"
    )
    return head.encode() + payload


def _parse(exchange: _Exchange) -> StreamRead:
    raw = b"".join(exchange.pieces)
    status = int(raw[9:12]) if raw[:5] == b"HTTP/" else 0
    events = _events(raw)
    before = _events(b"".join(exchange.pieces[: exchange.mark]))
    finishes = [c["finish_reason"] for e in events for c in e.get("choices", ()) if c.get("finish_reason")]
    return StreamRead(
        status=status,
        num_content=_num_content(events),
        num_content_before_mark=_num_content(before),
        num_events=len(events),
        num_bytes=len(raw),
        finish_reason=finishes[-1] if finishes else None,
        is_done=b"data: [DONE]" in raw,
    )


def _events(raw: bytes) -> list[dict[str, Any]]:
    """JSON events. Good for a cut answer and for chunked bodies: servers never cut an event between two HTTP chunks."""
    found = []
    for line in raw.split(b"\n"):
        if line.startswith(b"data: {"):
            with contextlib.suppress(ValueError):  # the last line of a cut answer
                found.append(json.loads(line[6:]))
    return found


def _num_content(events: Sequence[Mapping[str, Any]]) -> int:
    return sum(bool((c.get("delta") or {}).get("content")) for e in events for c in e.get("choices", ()))
