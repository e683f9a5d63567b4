"""Every error an API client can see, and OpenAI's envelope around it.

    QloopError
    ├── ClientError          the caller can mend it (4xx)
    │   ├── InvalidRequest       400  wrong type, value or combination; names the parameter
    │   ├── Unauthorized         401
    │   ├── PermissionDenied     403
    │   ├── ModelNotFound        404
    │   ├── RouteNotFound        404
    │   ├── MethodNotAllowed     405
    │   ├── Conflict             409
    │   ├── BodyTooLarge         413
    │   └── RateLimited          429
    └── ServerError          the operator can mend it, or time will (5xx)
        ├── InternalError        500
        ├── EngineUnavailable    503  dead, hung or still loading
        ├── Overloaded           503  the queue is full
        ├── Draining             503  this server is going away
        └── DeadlineExceeded     504

The status follows from the class; no other module chooses status codes for errors.
"""

from typing import Any, ClassVar


class QloopError(Exception):
    """An error with OpenAI's four fields. `code` is always a string, as in OpenAI's API reference."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal_error"

    def __init__(
        self, message: str, *, code: str | None = None, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param
        self.retry_after_s = retry_after_s

    def envelope(self) -> dict[str, Any]:
        """The body `{"error": {...}}` that every OpenAI client understands."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Response headers this error asks for (`Retry-After` in whole seconds, RFC 9110 §10.2.3)."""
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


class ClientError(QloopError):
    status = 400
    type = "invalid_request_error"
    default_code = "invalid_request"


class InvalidRequest(ClientError):
    pass


class Unauthorized(ClientError):
    status = 401
    default_code = "invalid_api_key"


class PermissionDenied(ClientError):
    status = 403
    default_code = "permission_denied"


class ModelNotFound(ClientError):
    status = 404
    default_code = "model_not_found"


class RouteNotFound(ClientError):
    status = 404
    default_code = "not_found"


class MethodNotAllowed(ClientError):
    status = 405
    default_code = "method_not_allowed"


class Conflict(ClientError):
    status = 409
    default_code = "conflict"


class BodyTooLarge(ClientError):
    status = 413
    default_code = "body_too_large"


class RateLimited(ClientError):
    status = 429
    type = "rate_limit_error"
    default_code = "rate_limited"


class ServerError(QloopError):
    pass


class InternalError(ServerError):
    pass


class EngineUnavailable(ServerError):
    status = 503
    type = "service_unavailable_error"
    default_code = "engine_unavailable"


class Overloaded(ServerError):
    status = 503
    type = "service_unavailable_error"
    default_code = "overloaded"


class Draining(ServerError):
    status = 503
    type = "service_unavailable_error"
    default_code = "draining"


class DeadlineExceeded(ServerError):
    status = 504
    type = "timeout_error"
    default_code = "deadline_exceeded"


class ConfigError(Exception):
    """A setting, model folder or adapter that stops a process from starting; the text says what to do."""
