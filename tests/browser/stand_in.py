"""A small OpenAI-shaped server for the page's own tests: the page is under test, the server is a script to follow.

It mounts the real page application and answers `v1/models` and `v1/chat/completions` exactly as a test asks.
"""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from a2wsgi import WSGIMiddleware
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from webchat.app import create_app

MODELS = [
    {"id": "qwen2-demo", "object": "model", "parent": None},
    {"id": "qwen2-demo-xiaozhi", "object": "model", "parent": "qwen2-demo"},
]


def envelope(message: str, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}


class StandIn:
    """What to answer, and what was asked. Tests set the first group and read the second."""

    def __init__(self) -> None:
        self.deltas: list[str] = ["你好", "！"]
        self.finish_reason: str | None = "stop"
        self.cut_bytes: int | None = None  # send the stream in pieces of this many bytes
        self.hold_after: int | None = None  # after so many deltas, wait for `release`
        self.pace_s = 0.0
        self.error_after: dict[str, Any] | None = None  # an error event in place of the end
        self.refuse: tuple[int, dict[str, Any], dict[str, str]] | None = None  # status, body, headers
        self.models: list[dict[str, Any]] | None = MODELS  # None: answer 503
        self.api_key: str | None = None
        self.release = threading.Event()

        self.requests: list[dict[str, Any]] = []
        self.open_streams = 0
        self.num_broken_off = 0

    def app(self, prefix: str = "") -> Starlette:
        return Starlette(
            routes=[
                Route(f"{prefix}/v1/models", self._models),
                Route(f"{prefix}/v1/chat/completions", self._chat, methods=["POST"]),
                Mount(prefix or "/", app=WSGIMiddleware(create_app())),
            ]
        )

    def _refusal(self, request: Request) -> Response | None:
        if self.api_key is not None and request.headers.get("authorization") != f"Bearer {self.api_key}":
            return JSONResponse(envelope("The API key is missing or wrong.", "invalid_api_key"), 401)
        return None

    async def _models(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        if self.models is None:
            return JSONResponse(envelope("The engine is still loading.", "engine_unavailable"), 503)
        return JSONResponse({"object": "list", "data": self.models})

    async def _chat(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        body = await request.json()
        self.requests.append(body)
        if self.refuse is not None:
            status, content, headers = self.refuse
            return JSONResponse(content, status, headers)
        return StreamingResponse(self._stream(body["model"]), media_type="text/event-stream")

    async def _stream(self, model: str) -> AsyncIterator[bytes]:
        self.open_streams += 1
        is_whole = False
        try:
            async for event in self._events(model):
                size = self.cut_bytes or len(event)
                for start in range(0, len(event), size):
                    yield event[start : start + size]
            is_whole = True
        finally:
            self.open_streams -= 1
            self.num_broken_off += not is_whole

    async def _events(self, model: str) -> AsyncIterator[bytes]:
        yield b": keep-alive\n\n"
        yield _chunk(model, {"role": "assistant", "content": ""})
        for number, delta in enumerate(self.deltas):
            while number == self.hold_after and not self.release.is_set():
                await asyncio.sleep(0.01)
            await asyncio.sleep(self.pace_s)
            yield _chunk(model, {"content": delta})
        if self.error_after is not None:
            yield b"data: " + json.dumps(self.error_after).encode() + b"\n\n"
            return
        if self.finish_reason is not None:
            yield _chunk(model, {}, self.finish_reason)
            yield b"data: [DONE]\n\n"

    @contextmanager
    def serve(self, prefix: str = "", host: str = "127.0.0.1") -> Iterator[str]:
        """Serve on a free port in a thread; gives the page's address."""
        config = uvicorn.Config(self.app(prefix), log_level="warning", lifespan="off")
        server = uvicorn.Server(config)
        with socket.create_server((host, 0)) as listener:
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
            thread.start()
            try:
                yield f"http://{host}:{listener.getsockname()[1]}{prefix}/"
            finally:
                self.release.set()
                server.should_exit = True
                thread.join(10)


def _chunk(model: str, delta: dict[str, str], finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": model, "choices": [choice]}
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"
