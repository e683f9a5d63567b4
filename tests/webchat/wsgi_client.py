"""A bare WSGI client: sends the path as it is, where HTTP client libraries would tidy up `..`."""

import io
from dataclasses import dataclass
from wsgiref.util import setup_testing_defaults

from webchat.app import create_app


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode("utf-8")


def get(path: str, environ: dict[str, str] | None = None) -> Reply:
    """One GET (or the method in `environ`) to a new application; header names come back in lower case."""
    request: dict[str, object] = {"PATH_INFO": path, **(environ or {})}
    setup_testing_defaults(request)
    request["wsgi.errors"] = io.StringIO()
    started: list[tuple[str, list[tuple[str, str]]]] = []

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: object = None) -> None:
        started.append((status, headers))

    body = create_app()(request, start_response)
    try:
        content = b"".join(body)
    finally:
        if hasattr(body, "close"):
            body.close()
    status, headers = started[-1]
    return Reply(int(status.split()[0]), {name.lower(): value for name, value in headers}, content)
