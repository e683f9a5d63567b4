"""What every generating endpoint does first and last: read the body, keep the event loop free, say what it ignored."""

import asyncio
import hashlib
import math
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import quote

from starlette.requests import ClientDisconnect, Request

from server.api.answer import ClientGone, Treatment
from server.api.protocol import SamplingBody
from server.api.serving import Serving
from server.errors import BodyTooLarge, InvalidRequest
from server.ops.auth import TENANT

# The other workers answer already, or the engine is just being restarted: better a moment late than a 503.
ENGINE_PATIENCE_S = 2.0
# Encoding takes about 1 µs per character; longer than this it would delay other callers' tokens.
LONG_TEXT_CHARS = 4_000
MAX_NAMES = 32
MAX_NAME_CHARS = 64
_HEADER_SAFE = "[]().:-_~"
TIMEOUT_HEADER = "X-Request-Timeout"

T = TypeVar("T")


async def ready_serving(request: Request) -> Serving:
    """The worker's state, after a short wait for the engine where it is not ready."""
    serving: Serving = request.app.state.serving
    if not serving.is_ready:
        await serving.settle(ENGINE_PATIENCE_S)
    return serving


async def begin(request: Request) -> tuple[Serving, bytes]:
    """The worker's state and the whole body. Raises BodyTooLarge before more than the limit is held."""
    serving = await ready_serving(request)
    limit = int(serving.settings.max_body_mib * 1024 * 1024)
    announced = request.headers.get("content-length", "")
    body = bytearray()
    try:
        if not (announced.isdigit() and int(announced) > limit):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    break
            else:
                return serving, bytes(body)
    except ClientDisconnect:
        raise ClientGone("The client closed the connection.") from None
    raise BodyTooLarge(f"The request body is larger than the {limit} bytes this server accepts (QLOOP_MAX_BODY_MIB).")


def treatment(request: Request, body: SamplingBody) -> Treatment:
    """Raises InvalidRequest for a header that is no number of seconds."""
    limits = [limit for limit in (body.timeout, _header_timeout(request)) if limit is not None]
    salt = _cache_salt(request.scope.get(TENANT, b""), body.cache_salt or "")
    return Treatment(priority=body.priority or 0, deadline_s=min(limits, default=None), cache_salt=salt)


def _header_timeout(request: Request) -> float | None:
    text = request.headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidRequest(
            f"The header {TIMEOUT_HEADER} must be a number of seconds above 0.",
            param=TIMEOUT_HEADER,
            code="invalid_value",
        )
    return seconds


def _cache_salt(tenant: bytes, salt: str) -> str:
    """One value for each pair of tenant and salt. The tenant has a fixed length, so no two pairs run together."""
    return hashlib.sha256(tenant + salt.encode()).hexdigest() if tenant or salt else ""


async def in_thread_if_long(num_chars: int, work: Callable[[], T]) -> T:
    return await asyncio.to_thread(work) if num_chars > LONG_TEXT_CHARS else work()


def response_headers(ignored: list[str]) -> dict[str, str]:
    """Names come from the caller: percent-encoded where a header could not hold them, and cut where they go on."""
    if not ignored:
        return {}
    names = [quote(name[:MAX_NAME_CHARS], safe=_HEADER_SAFE) for name in sorted(ignored)[:MAX_NAMES]]
    return {"X-Ignored-Params": ", ".join([*names, "..."] if len(ignored) > MAX_NAMES else names)}
