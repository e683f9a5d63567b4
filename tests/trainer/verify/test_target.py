"""What a running server says of itself, over HTTP."""

import http.server
import json
import threading
from collections.abc import Iterator

import pytest

from trainer.verify.target import Server

CARDS = [  # as our server lists them: the base, a name's current revision, and one that was it before
    {"id": "tiny/chat", "root": "tiny/chat", "parent": None},
    {"id": "friend", "root": "friend@0123456789ab", "parent": "tiny/chat", "revision": "0123456789ab"},
    {"id": "friend@ba9876543210", "root": "friend@ba9876543210", "parent": "tiny/chat", "revision": "ba9876543210"},
]


@pytest.fixture
def url() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = json.dumps({"object": "list", "data": CARDS}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_revision_is_asked_for_by_an_id_that_no_publication_moves(url: str) -> None:
    server = Server(url)
    assert server.model_of("0123456789ab") == "friend@0123456789ab"
    assert server.model_of("ba9876543210") == "friend@ba9876543210"
    assert server.model_of("000000000000") is None
