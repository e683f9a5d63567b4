"""`GET /v1/models` and `/v1/models/{id}` (OpenAI API reference, "Models").

`root`, `parent` and `max_model_len` are as vLLM has them; an adapter shows its revision and scores besides.
"""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from server.api.request import ready_serving
from server.api.serving import Serving, Target


async def list_models(request: Request) -> JSONResponse:
    serving = await ready_serving(request)
    return JSONResponse({"object": "list", "data": [_card(serving, target) for target in serving.targets()]})


async def retrieve_model(request: Request) -> JSONResponse:
    serving = await ready_serving(request)
    return JSONResponse(_card(serving, serving.resolve(request.path_params["model_id"])))


def _card(serving: Serving, target: Target) -> dict[str, Any]:
    adapter = target.adapter
    facts = {} if adapter is None else {"revision": adapter.revision, "scores": adapter.scores}
    return {
        "id": target.model_id,
        "object": "model",
        "created": adapter.created if adapter else serving.started,
        "owned_by": "qloop",
        "root": adapter.id if adapter else serving.model.name,
        "parent": serving.model.name if adapter else None,
        "max_model_len": serving.model.max_model_len,
        **facts,
    }
