"""Responses that follow a generation: server-sent events, or one JSON body, and what happens when the caller leaves.

Pure ASGI: a stream passes through as few layers as possible, because this runs once per token.
Source of the format: WHATWG HTML, "Server-sent events".
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.answer import Answer, ClientGone
from server.api.choice import Delta
from server.errors import InternalError, QloopError

log = logging.getLogger("qloop.worker")

encode_json = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
KEEP_ALIVE_INTERVAL_S = 15.0

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would otherwise collect the stream
]


def event(value: object) -> bytes:
    return b"data: " + encode_json(value) + b"\n\n"


class AnswerResponse(Response):
    """A response that is still being generated when it starts. Owns the answer: whatever happens, it is cancelled."""

    def __init__(self, answer: Answer, headers: dict[str, str]) -> None:
        self.answer = answer
        self.extra = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(_call_on_disconnect(receive, self.answer.client_gone))
        try:
            await self.respond(scope, receive, send)
        except ClientGone:
            self.answer.timer.outcome = "cancelled"
        finally:
            watcher.cancel()
            self.answer.cancel()
            self.answer.timer.finish(self.answer.usage.prompt_tokens, self.answer.usage.completion_tokens)

    async def respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError


class EventWriter(Protocol):
    """Turns one answer into events. Plain calls, no generators: they run for every token. Empty bytes are not sent."""

    def begin(self) -> bytes: ...

    def news(self, deltas: list[Delta]) -> bytes: ...

    def end(self) -> bytes: ...


class EventStream(AnswerResponse):
    """Sends what the writer makes of the answer, then `[DONE]`; an error becomes one error event and no `[DONE]`."""

    def __init__(self, answer: Answer, writer: EventWriter, headers: dict[str, str]) -> None:
        super().__init__(answer, headers)
        self._writer = writer

    async def respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS + self.extra})
        try:
            # A task of its own: every token wakes it, and waking it here would walk down all layers above each time.
            await asyncio.create_task(self._write(send))
            last = DONE
        except ClientGone:
            raise
        except QloopError as error:
            last = self._error_event(error)
        except Exception:
            log.exception("a stream failed")
            last = self._error_event(InternalError("The server failed while writing this answer."))
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _write(self, send: Send) -> None:
        answer, writer = self.answer, self._writer
        await _send_body(send, writer.begin())
        while not answer.is_finished:
            deltas = await answer.next_deltas()
            await _send_body(send, writer.news(deltas) if deltas else KEEP_ALIVE)
        await _send_body(send, writer.end())

    def _error_event(self, error: QloopError) -> bytes:
        self.answer.timer.outcome = error.code
        return event(error.envelope())


class WholeAnswer(AnswerResponse):
    """One JSON body, built when every choice has ended."""

    def __init__(self, answer: Answer, build: Callable[[], Awaitable[object]], headers: dict[str, str]) -> None:
        super().__init__(answer, headers)
        self._build = build

    async def respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = encode_json(await self._build())
        except ClientGone:
            raise
        except QloopError as error:
            self.answer.timer.outcome = error.code
            raise
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *self.extra]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})


async def _send_body(send: Send, body: bytes) -> None:
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _call_on_disconnect(receive: Receive, then: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    then()
