"""The API worker: `create_app(settings)`, and `app` for `gunicorn server.app:app`.

Routes, middleware, error handlers and lifespan as lists; what they do is in `server.api`, `server.ops`, `webchat`.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

from a2wsgi import WSGIMiddleware
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from server.api import adapters, chat, completions, health, lora, models, tokenize
from server.api.serving import Serving
from server.api.sse import KEEP_ALIVE_INTERVAL_S, BareSend, EventStream
from server.errors import (
    ClientError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    QloopError,
    RouteNotFound,
)
from server.ops.auth import ApiKeyMiddleware
from server.ops.logging import configure_logging
from server.ops.observe import ObserveMiddleware
from server.settings import Settings, worker_settings
from webchat.app import create_app as create_pages

log = logging.getLogger("qloop.worker")

START_PATIENCE_S = 10.0
PAGE_THREADS = 4  # pages are small and static; token streams never go through WSGI


def create_app(settings: Settings) -> Starlette:
    app = Starlette(
        routes=_routes(),
        middleware=[
            Middleware(ObserveMiddleware),
            Middleware(ApiKeyMiddleware, keys=settings.api_keys, admin_keys=settings.admin_keys),
        ],
        exception_handlers={QloopError: _qloop_error, HTTPException: _http_error, Exception: _unexpected_error},
        lifespan=_lifespan,
    )
    app.state.serving = Serving(settings)
    return app


def _routes() -> list[Route]:
    pages: Any = WSGIMiddleware(create_pages(), workers=PAGE_THREADS)
    return [
        Route("/v1/chat/completions", chat.create_chat_completion, methods=["POST"]),
        Route("/v1/completions", completions.create_completion, methods=["POST"]),
        Route("/v1/models", models.list_models),
        Route("/v1/models/{model_id:path}", models.retrieve_model),
        Route("/tokenize", tokenize.tokenize, methods=["POST"]),
        Route("/detokenize", tokenize.detokenize, methods=["POST"]),
        Route("/v1/adapters", adapters.list_adapters),
        Route("/v1/adapters", adapters.load_adapter, methods=["POST"]),
        Route("/v1/adapters/{adapter_id}", adapters.unload_adapter, methods=["DELETE"]),
        Route("/v1/adapters/{name}/promote", adapters.promote_adapter, methods=["POST"]),
        Route("/v1/adapters/{name}/rollback", adapters.rollback_adapter, methods=["POST"]),
        Route("/v1/load_lora_adapter", lora.load_lora_adapter, methods=["POST"]),
        Route("/v1/unload_lora_adapter", lora.unload_lora_adapter, methods=["POST"]),
        Route("/livez", health.livez),
        Route("/readyz", health.readyz),
        Route("/metrics", health.metrics),
        Route("/", pages, methods=["GET"]),
        Route("/static/{path:path}", pages, methods=["GET"]),
    ]


@contextlib.asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    serving: Serving = app.state.serving
    serving.client.start()
    await serving.settle(START_PATIENCE_S)  # so that a reload never answers 503
    keep_alive = asyncio.create_task(_keep_streams_alive())
    try:
        yield
    finally:
        keep_alive.cancel()
        await serving.client.close()


async def _keep_streams_alive() -> None:
    """Silent streams get a comment now and then, or proxies between here and the client cut them."""
    while True:
        await asyncio.sleep(KEEP_ALIVE_INTERVAL_S)
        for stream in list(EventStream.live):
            stream.keep_alive()


# --- errors: the only place that turns one into a response ---


async def _qloop_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, QloopError)
    return JSONResponse(error.envelope(), status_code=error.status, headers=error.headers())


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """Starlette's own: no such route or method, a malformed request."""
    assert isinstance(error, HTTPException)
    kinds: dict[int, ClientError] = {
        404: RouteNotFound(f"There is no {request.url.path}."),
        405: MethodNotAllowed(f"{request.method} is not allowed on {request.url.path}."),
    }
    known = kinds.get(error.status_code, InvalidRequest(error.detail))
    headers = {**(error.headers or {}), **known.headers()}
    return JSONResponse(known.envelope(), status_code=known.status, headers=headers)


async def _unexpected_error(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    internal = InternalError("The server failed to handle this request; its log has the reason.")
    headers = {"X-Request-Id": request.scope.get("request_id", "")}
    return JSONResponse(internal.envelope(), status_code=internal.status, headers=headers)


def _from_environment() -> Starlette:
    settings = worker_settings()
    configure_logging(settings.log_level)
    return create_app(settings)


def __getattr__(name: str) -> ASGIApp:
    """`server.app:app`, made when asked for, so that importing this module reads no settings."""
    if name == "app":
        globals()["app"] = BareSend(_from_environment())
        return globals()["app"]  # type: ignore[no-any-return]
    raise AttributeError(name)
