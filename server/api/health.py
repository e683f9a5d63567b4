"""`/livez`: this process answers. `/readyz`: a request sent now would be computed. `/metrics`: Prometheus text."""

import asyncio
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.api.serving import Serving
from server.engine.load_phase import phase_path, read_phase
from server.errors import QloopError
from server.ops.metrics import CONTENT_TYPE, exposition, observe_engine

ENGINE_ANSWERS_WITHIN_S = 1.0  # a scrape does not wait for a hung engine


async def livez(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def readyz(request: Request) -> Response:
    serving: Serving = request.app.state.serving
    if serving.is_ready:
        return JSONResponse({"status": "ready", "model": serving.model.name, "engine_pid": serving.client.engine_pid})
    answer = {"status": "not ready", "reason": serving.why_not_ready}
    return JSONResponse(answer | _loading(serving), status_code=503, headers={"Retry-After": "2"})


def _loading(serving: Serving) -> dict[str, Any]:
    """How far an engine is that does not answer yet."""
    if serving.client.is_connected:
        return {}
    phase = read_phase(phase_path(serving.settings.socket_path))
    if phase is None:
        return {}
    now = time.time()
    seconds = {"phase_s": round(now - phase.entered, 1), "load_s": round(now - phase.begun, 1)}
    return {"loading": {"phase": phase.phase, "number": phase.number, **seconds}}


async def metrics(request: Request) -> Response:
    serving: Serving = request.app.state.serving
    observe_engine(serving.client.stats, serving.is_ready, len(serving.client.adapters))
    text = exposition(serving.client.stats) + (await _engine_metrics(serving)).encode()
    return Response(text, media_type=CONTENT_TYPE)


async def _engine_metrics(serving: Serving) -> str:
    """What an engine counts under names of its own; nothing while it cannot say."""
    if not serving.is_ready or not serving.model.has_metrics:
        return ""
    try:
        async with asyncio.timeout(ENGINE_ANSWERS_WITHIN_S):
            return await serving.client.metrics()
    except (QloopError, TimeoutError):
        return ""
