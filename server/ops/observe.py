"""Request ids, the request counter and the access log, around every response."""

import logging
import re
import time
import uuid
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.ops import metrics

log = logging.getLogger("qloop.access")

CLIENT_GONE = 499  # nginx's word for a caller that left before its answer began
_GOOD_ID = re.compile(r"[\x21-\x7e]{1,128}")
_QUIET = frozenset({"/livez", "/readyz", "/metrics"})


class ObserveMiddleware:
    """Outermost. Logs method, path, status and time; never queries, bodies or keys."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _GOOD_ID.fullmatch(given) else uuid.uuid4().hex
        status, start = 0, time.perf_counter()

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        scope["request_id"] = request_id  # for the answer to a defect, which is made outside of all middleware
        try:
            await self._app(scope, receive, observed)
        except Exception:
            status = status or 500
            raise
        finally:
            self._record(scope, status or CLIENT_GONE, time.perf_counter() - start, request_id)

    def _record(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        metrics.http_requests.labels(_method(scope["method"]), route, str(status)).inc()
        level = logging.DEBUG if scope["path"] in _QUIET else logging.INFO
        log.log(level, "%s %s %d %.3f s %s", scope["method"], quote(scope["path"]), status, seconds, request_id)


def _method(method: str) -> str:
    """Clients may invent methods; labels stay bounded."""
    return method if method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE") else "other"
