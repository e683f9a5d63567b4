"""`/livez`: this process answers. `/readyz`: a request sent now would be computed. `/metrics`: Prometheus text."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.api.serving import Serving
from server.ops.metrics import CONTENT_TYPE, exposition, observe_engine


async def livez(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def readyz(request: Request) -> Response:
    serving: Serving = request.app.state.serving
    if serving.is_ready:
        return JSONResponse({"status": "ready", "model": serving.model.name, "engine_pid": serving.client.engine_pid})
    return JSONResponse(
        {"status": "not ready", "reason": serving.why_not_ready}, status_code=503, headers={"Retry-After": "2"}
    )


async def metrics(request: Request) -> Response:
    serving: Serving = request.app.state.serving
    observe_engine(serving.client.stats, serving.is_ready)
    return Response(exposition(serving.client.stats), media_type=CONTENT_TYPE)
