"""Responses that follow a generation: server-sent events, or one JSON body, and what happens when the caller leaves.

Pure ASGI: a stream passes through as few layers as possible, because this runs once per token.
Source of the format: WHATWG HTML, "Server-sent events".
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ClassVar, Protocol
from weakref import WeakSet

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.answer import Answer, ClientGone
from server.api.choice import Delta
from server.api.eager import run_now
from server.errors import InternalError, QloopError

log = logging.getLogger("qloop.worker")

encode_json = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
KEEP_ALIVE_INTERVAL_S = 15.0

BARE_SEND = "qloop.send"  # key in the ASGI scope: the server's own `send`, below all middleware

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would otherwise collect the stream
]


def event(value: object) -> bytes:
    return b"data: " + encode_json(value) + b"\n\n"


class BareSend:
    """Outermost: keeps the server's `send` for those that write many times."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[BARE_SEND] = send
        await self._app(scope, receive, send)


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
    """Sends what the writer makes of the answer, then `[DONE]`; an error becomes one error event and no `[DONE]`.

    Written for the one path that runs per token: news goes from the engine's socket to the client's in one go, without
    waking a task. A task is needed only while a slow client does not take what was sent; news then gather meanwhile.
    """

    live: ClassVar[WeakSet["EventStream"]] = WeakSet()  # those that `keep_alive` serves

    def __init__(self, answer: Answer, writer: EventWriter, headers: dict[str, str]) -> None:
        super().__init__(answer, headers)
        self._writer = writer
        self._sending: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        # What middleware does to a response it has done by now; a token need not pass through all of it again.
        self._send = scope.get(BARE_SEND, send)
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS + self.extra})
        try:
            await self._send_body(self._writer.begin())
            self.answer.on_news(self._pass_on)
            self.live.add(self)
            self._pass_on()
            await self._ended
            await self._send_body(self._writer.end())
            last = DONE
        except ClientGone:
            raise
        except QloopError as error:
            last = self._error_event(error)
        except Exception:
            log.exception("a stream failed")
            last = self._error_event(InternalError("The server failed while writing this answer."))
        finally:
            self.live.discard(self)
        await send({"type": "http.response.body", "body": last, "more_body": False})

    def keep_alive(self) -> None:
        """A comment, so that no proxy takes a silent stream for a dead one."""
        self._start(self._send_body(KEEP_ALIVE))

    def _pass_on(self) -> None:
        if self._sending is not None or self._ended.done():
            return
        try:
            deltas = self.answer.take_deltas()
            body = self._writer.news(deltas) if deltas else b""
        except Exception as error:
            self._ended.set_exception(error)
            return
        if body:
            self._start(self._send_body(body))
        if self._sending is None and self.answer.is_finished and not self._ended.done():
            self._ended.set_result(None)

    def _start(self, sending: Coroutine[Any, Any, None]) -> None:
        if self._sending is None and not self._ended.done():
            self._sending = run_now(sending)
            if self._sending is not None:
                self._sending.add_done_callback(self._sent)
        else:
            sending.close()

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._sending = None
        if not task.cancelled() and (error := task.exception()) is not None and not self._ended.done():
            self._ended.set_exception(error)
        self._pass_on()

    async def _send_body(self, body: bytes) -> None:
        if body:
            await self._send({"type": "http.response.body", "body": body, "more_body": True})

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


async def _call_on_disconnect(receive: Receive, then: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    then()
