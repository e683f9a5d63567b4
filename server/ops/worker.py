"""The Gunicorn worker class: uvicorn with uvloop and httptools, and a way of leaving that hurts nobody.

Differs from `uvicorn_worker.UvicornWorker` in four ways: a connection that was accepted but has not spoken yet is
served before the worker leaves (uvicorn resets it, which fails a request at every reload under load); a worker that
finishes its streams goes on sending heartbeats, so `timeout` can be short; it leaves by exiting, not by a signal; and
there is no access log or `Server` header.
"""

import asyncio
import contextlib
import sys
import time
from collections.abc import Generator
from socket import socket
from typing import Any

from gunicorn.arbiter import Arbiter
from uvicorn.server import Server
from uvicorn_worker import UvicornWorker

FIRST_REQUEST_PATIENCE_S = 2.0
POLL_S = 0.02
HEARTBEAT_S = 1.0


class PatientServer(Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """As uvicorn's, without raising the signal once more at the end: Gunicorn's own clean-up is still to come."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Stop accepting, serve what was accepted, then leave. The listening sockets stay Gunicorn's."""
        beating = asyncio.create_task(self._beat())
        for server in self.servers:
            server.close()
        deadline = time.monotonic() + FIRST_REQUEST_PATIENCE_S
        while self._has_silent_connection() and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)
        await super().shutdown()
        beating.cancel()

    def _has_silent_connection(self) -> bool:
        return any(getattr(connection, "cycle", True) is None for connection in self.server_state.connections)

    async def _beat(self) -> None:
        while self.config.callback_notify is not None:
            await self.config.callback_notify()
            await asyncio.sleep(HEARTBEAT_S)


class Worker(UvicornWorker):  # type: ignore[misc]  # uvicorn-worker has no type hints
    CONFIG_KWARGS: dict[str, Any] = {  # noqa: RUF012 - the base class's own way
        "loop": "uvloop",
        "http": "httptools",
        "ws": "none",
        "lifespan": "on",
        "access_log": False,
        "server_header": False,
    }

    async def _serve(self) -> None:
        self.config.app = self.wsgi
        server = PatientServer(config=self.config)
        self._install_sigquit_handler()
        with contextlib.suppress(asyncio.CancelledError):
            await server.serve(sockets=self.sockets)
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)
