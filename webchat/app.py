"""The chat page as a WSGI application: one shell, its scripts, styles and translations.

It knows nothing about models, keys or engines and imports nothing of ours: the browser talks to the API by itself,
so no token stream ever passes through WSGI. All addresses in the page are relative; any mount point works.
"""

from pathlib import Path
from typing import Final

import bottle

HERE: Final = Path(__file__).resolve().parent

# Nothing inline, nothing foreign, no string ever becomes markup or code (CSP level 3, Trusted Types).
CONTENT_SECURITY_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
COMMON_HEADERS: Final = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
PAGE_HEADERS: Final = {
    **COMMON_HEADERS,
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Content-Type": "text/html; charset=UTF-8",
    "Cache-Control": "no-cache",
}
# Named here because the host's own table may be wrong, and with nosniff a wrong type stops the page.
CONTENT_TYPES: Final = {
    ".css": "text/css",
    ".js": "text/javascript",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}


def create_app() -> bottle.Bottle:
    """A new application with the routes `/`, `/static/i18n/<locale>.json` and `/static/<path>`."""
    app = bottle.Bottle()
    app.default_error_handler = _error_page
    shell = bottle.SimpleTemplate(name="index.html", lookup=[str(HERE / "views")])

    def index() -> bottle.HTTPResponse:
        return bottle.HTTPResponse(shell.render(title="qloop"), headers=PAGE_HEADERS)

    app.get("/", callback=index)
    app.get("/static/i18n/<name:re:[A-Za-z-]+[.]json>", callback=lambda name: _file(HERE / "i18n", name))
    app.get("/static/<path:path>", callback=lambda path: _file(HERE / "static", path))
    return app


def _file(root: Path, path: str) -> bottle.HTTPResponse:
    """A file under `root`, or 403/404; browsers ask again each time and mostly get a 304."""
    content_type = CONTENT_TYPES.get(Path(path).suffix, "application/octet-stream")
    headers = {**COMMON_HEADERS, "Cache-Control": "no-cache"}
    return bottle.static_file(path, root=str(root), mimetype=content_type, headers=headers)


def _error_page(error: bottle.HTTPError) -> str:
    """Status and nothing else: no path, no exception text."""
    for name, value in {**PAGE_HEADERS, "Content-Type": "text/plain; charset=UTF-8"}.items():
        bottle.response.set_header(name, value)
    return f"{error.status_line}\n"
