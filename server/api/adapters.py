"""`/v1/adapters`: load, unload, promote and roll back while everything runs. For operators."""

from starlette.requests import Request
from starlette.responses import JSONResponse

from server.api.adapter_admin import AdapterAdmin, model_id_of
from server.api.operator import operator_body, operator_serving
from server.api.protocol import LoadAdapterRequest, PromoteRequest, RollbackRequest
from server.errors import InvalidRequest

MODES = ("wait", "cancel")


async def list_adapters(request: Request) -> JSONResponse:
    return JSONResponse(await AdapterAdmin(await operator_serving(request)).list())


async def load_adapter(request: Request) -> JSONResponse:
    """A published `name` or `name@revision`; with `path`, a folder that becomes a revision of `name`."""
    serving, body = await operator_body(request, LoadAdapterRequest)
    admin, model_id = AdapterAdmin(serving), model_id_of(body.name, "name")
    if body.path is None:
        if body.promote is not None:
            raise InvalidRequest("'promote' goes with 'path'.", param="promote", code="invalid_value")
        adapter = await admin.load(model_id, pin=body.pinned)
    elif model_id.revision is not None:
        raise InvalidRequest(
            "With 'path' the revision follows from the content: give the name alone.",
            param="name",
            code="invalid_value",
        )
    else:
        adapter = await admin.add(body.path, model_id.name, pin=body.pinned, promote=body.promote is not False)
    return JSONResponse(admin.card(adapter))


async def unload_adapter(request: Request) -> JSONResponse:
    """`?mode=cancel` ends running requests with an error; otherwise they finish first. The registry keeps the files."""
    serving = await operator_serving(request)
    mode = request.query_params.get("mode", "wait")
    if mode not in MODES:
        raise InvalidRequest(f"'mode' must be one of: {', '.join(MODES)}.", param="mode", code="invalid_value")
    model_id = model_id_of(request.path_params["adapter_id"], "adapter_id")
    unloaded = await AdapterAdmin(serving).unload(model_id, cancel=mode == "cancel")
    revisions = [adapter.revision for adapter in unloaded]
    return JSONResponse({"id": str(model_id), "object": "adapter", "deleted": True, "revisions": revisions})


async def promote_adapter(request: Request) -> JSONResponse:
    serving, body = await operator_body(request, PromoteRequest)
    admin, name = AdapterAdmin(serving), _name(request)
    revision = model_id_of(f"{name}@{body.revision}", "revision").revision or ""
    return JSONResponse(admin.card(await admin.promote(name, revision, force=body.force)))


async def rollback_adapter(request: Request) -> JSONResponse:
    serving, _ = await operator_body(request, RollbackRequest)
    admin = AdapterAdmin(serving)
    return JSONResponse(admin.card(await admin.rollback(_name(request))))


def _name(request: Request) -> str:
    model_id = model_id_of(request.path_params["name"], "name")
    if model_id.revision is not None:
        raise InvalidRequest("The path takes a name without a revision.", param="name", code="invalid_value")
    return model_id.name
