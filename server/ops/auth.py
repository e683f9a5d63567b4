"""API keys: as a Bearer token for programs, or as the password of HTTP Basic for browsers (RFC 6750, RFC 7617)."""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import Unauthorized

OPEN_PATHS = frozenset({"/livez", "/readyz"})
TENANT = "qloop.tenant"  # key in the ASGI scope: 32 bytes that stand for the API key; absent where none was asked for
OPERATOR = "qloop.operator"  # key in the ASGI scope: whether the key may change what is served


class ApiKeyMiddleware:
    """Refuses every request without one of the keys, but for OPEN_PATHS. Without API keys it lets everything pass.

    `admin_keys` open everything, too; where there are any, they alone make a caller an operator.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], admin_keys: Sequence[str] = ()) -> None:
        self._app = app
        self._tenants = {key.encode(): hashlib.sha256(key.encode()).digest() for key in (*keys, *admin_keys)}
        self._operators = {self._tenants[key.encode()] for key in admin_keys or keys}
        self._needs_key = bool(keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._tenants or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        if (tenant := self._tenant(_credential(scope))) is not None:
            scope[TENANT] = tenant
            scope[OPERATOR] = tenant in self._operators
        if tenant is not None or not self._needs_key:
            await self._app(scope, receive, send)
            return
        error = Unauthorized("Missing or unknown API key. Send it as 'Authorization: Bearer KEY'.")
        response = JSONResponse(error.envelope(), status_code=error.status)
        # Two fields, not one list: Chromium asks its user for a password only when Basic has a line of its own.
        response.headers.append("WWW-Authenticate", "Bearer")
        response.headers.append("WWW-Authenticate", 'Basic realm="qloop", charset="UTF-8"')
        await response(scope, receive, send)

    def _tenant(self, credential: bytes) -> bytes | None:
        # Every key is compared, whole, so that time tells nothing about how much was right.
        matches = [tenant for key, tenant in self._tenants.items() if hmac.compare_digest(credential, key)]
        return matches[0] if matches else None


def _credential(scope: Scope) -> bytes:
    scheme, _, value = Headers(scope=scope).get("authorization", "").partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer":
        return value.encode("latin-1")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""
