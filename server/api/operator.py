"""Who may call an operator's route, and its body."""

from starlette.requests import Request

from server.api.parsing import Body, parse
from server.api.request import begin, ready_serving
from server.api.serving import Serving
from server.errors import InvalidRequest, PermissionDenied, Unauthorized
from server.ops.auth import OPERATOR, TENANT

JSON = "application/json"


async def operator_serving(request: Request) -> Serving:
    """The worker's state. Raises Unauthorized or PermissionDenied."""
    _check_operator(request)
    return await ready_serving(request)


async def operator_body(request: Request, kind: type[Body]) -> tuple[Serving, Body]:
    """As `operator_serving`, and the body; an empty one is an empty object.

    A foreign web page can make a browser send a body to this address, but not with this content type.
    """
    _check_operator(request)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
        raise InvalidRequest(f"Send this request with 'Content-Type: {JSON}'.", param="Content-Type")
    serving, raw = await begin(request)
    body, _ = parse(kind, raw or b"{}", is_lenient=False)
    return serving, body


def _check_operator(request: Request) -> None:
    settings = request.app.state.serving.settings
    if request.scope.get(OPERATOR):
        return
    if settings.admin_keys or settings.api_keys:
        if TENANT in request.scope:
            raise PermissionDenied("This key may not change adapters: that takes one of QLOOP_ADMIN_KEYS.")
        raise Unauthorized("Missing or unknown key. Send one of QLOOP_ADMIN_KEYS as 'Authorization: Bearer KEY'.")
    if not settings.is_loopback:
        raise PermissionDenied(
            "Without keys adapters can be changed only where the server listens on loopback: set QLOOP_ADMIN_KEYS."
        )
