"""The parent of Gunicorn and the engine: starts, watches, restarts, reloads and drains them. Owns no request.

Gunicorn cannot be the engine's parent: its master exits when a worker fails to boot, and HUP would touch the weights.
"""

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import server
from server.engine.client import EngineClient
from server.ops.child import Child
from server.settings import Settings

log = logging.getLogger("qloop.supervisor")

POLL_S = 0.1
STOP_PATIENCE_S = 10.0
PREFLIGHT_TIMEOUT_S = 60.0


# What each signal does; docs/operations.md shows this table.
SIGNALS = {
    signal.SIGTERM: "Drain: new requests get 503 with Retry-After, running answers finish, everything stops, exit 0.",
    signal.SIGINT: "(Ctrl-C) As TERM. A second TERM or INT stops at once; running streams end with an error event.",
    signal.SIGHUP: "Reload: try new code and settings in a child; if that passes, new workers replace the old ones, "
    "which finish their streams. The engine and its weights are not touched.",
}


class Supervisor:
    """`run` until a signal says stop, or a child gives up. Belongs to one event loop."""

    def __init__(self, settings: Settings, environment: Mapping[str, str]) -> None:
        self._settings = settings
        self._environment = environment
        self.engine = Child("engine", [sys.executable, "-m", "server.engine"], environment)
        self.gunicorn = Child("gunicorn", _gunicorn_command(), environment)
        self.client = EngineClient(settings.socket_path, role="supervisor")
        self._stop_asked = asyncio.Event()
        self._stop_at_once = asyncio.Event()
        self._reload: asyncio.Task[None] | None = None

    async def run(self) -> int:
        """The exit status: 0 after a stop that was asked for, else that of the child that gave up."""
        self._install_signals()
        self.client.start()
        tasks = [asyncio.create_task(c) for c in (self.engine.run(), self.gunicorn.run(), self._watch_engine())]
        announcing = asyncio.create_task(self._announce())
        stop = asyncio.create_task(self._stop_asked.wait())
        await asyncio.wait([*tasks, stop], return_when=asyncio.FIRST_COMPLETED)
        announcing.cancel()
        if self._stop_asked.is_set():
            await self._drain()
        await self.gunicorn.stop(STOP_PATIENCE_S)
        await self.engine.stop(STOP_PATIENCE_S)
        await self.client.close()
        for task in (*tasks, stop):
            task.cancel()
        await asyncio.gather(*tasks, stop, return_exceptions=True)
        return self.engine.failure or self.gunicorn.failure or 0

    # --- signals ---

    def _install_signals(self) -> None:
        for number in SIGNALS:
            handler = self._handle_hup if number is signal.SIGHUP else self._handle_stop
            asyncio.get_running_loop().add_signal_handler(number, handler)

    def _handle_stop(self) -> None:
        if self._stop_asked.is_set():
            self._stop_at_once.set()
        self._stop_asked.set()

    def _handle_hup(self) -> None:
        if not self._stop_asked.is_set() and (self._reload is None or self._reload.done()):
            self._reload = asyncio.create_task(self._reload_workers())

    # --- reload ---

    async def _reload_workers(self) -> None:
        """New workers, same engine; refused when a dry run of the new code and settings fails."""
        log.info("reload asked for: trying the new code and settings first")
        command = [sys.executable, "-m", "server", "preflight"]
        trial = await asyncio.create_subprocess_exec(
            *command, env=dict(self._environment), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        try:
            output, _ = await asyncio.wait_for(trial.communicate(), PREFLIGHT_TIMEOUT_S)
        except TimeoutError:
            trial.kill()
            log.error("reload refused, the old workers go on: the trial took over %.0f s", PREFLIGHT_TIMEOUT_S)
            return
        if trial.returncode != 0:
            log.error("reload refused, the old workers go on: %s", output.decode("utf-8", "replace").strip())
            return
        self.gunicorn.signal(signal.SIGHUP)
        log.info("reload: new workers take over, old ones finish their streams")

    # --- drain ---

    async def _drain(self) -> None:
        """Refuse new requests, let running ones finish; then the children can stop without hurting anyone."""
        if not self.client.is_connected:
            return
        self.client.start_drain()
        deadline = asyncio.get_running_loop().time() + self._settings.drain_timeout_s
        log.info("draining: new requests are refused, running answers finish (a second signal stops at once)")
        while not (self._is_idle() or self._stop_at_once.is_set() or not self.client.is_connected):
            if asyncio.get_running_loop().time() > deadline:
                log.error("drain: %d sequences did not finish in time", self.client.stats.num_running)
                break
            await asyncio.sleep(POLL_S)
        if self._stop_at_once.is_set() or not self._is_idle():
            # Running streams get their error event from the engine while the workers can still send it.
            await self._stop_engine_now()

    def _is_idle(self) -> bool:
        stats = self.client.stats
        return (
            self.client.is_draining and self.client.heard_since_drain and not (stats.num_running or stats.num_waiting)
        )

    async def _stop_engine_now(self) -> None:
        self.engine.signal(signal.SIGINT)
        await self.engine.stop(STOP_PATIENCE_S)

    # --- watching ---

    async def _watch_engine(self) -> None:
        """Restart an engine that hangs, or that never finishes loading."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(POLL_S)
            if self.client.is_connected:
                self.engine.has_served = True
                is_stuck = self.client.silence_s > self._settings.heartbeat_timeout_s
            else:
                loading_s = loop.time() - self.engine.started if self.engine.pid else 0.0
                is_stuck = loading_s > self._settings.load_timeout_s
            if is_stuck and self.engine.pid:
                log.error("the engine hangs: killing it")
                pid = self.engine.pid
                self.engine.kill()
                while self.engine.pid == pid:
                    await asyncio.sleep(POLL_S)

    async def _announce(self) -> None:
        """Say once where everything is, when it really answers."""
        while not (self.client.is_ready and await _answers(self._settings)):
            await asyncio.sleep(POLL_S)
        self.gunicorn.has_served = True
        print(
            banner(self._settings, [a.name for a in self.client.adapters if a.is_current], self._model_name()),
            flush=True,
        )

    def _model_name(self) -> str:
        assert self.client.model is not None
        return self.client.model.name


def _gunicorn_command() -> list[str]:
    root = Path(server.__file__).resolve().parent.parent
    candidates = [root / "gunicorn.conf.py", Path("gunicorn.conf.py").resolve()]
    config = next((path for path in candidates if path.is_file()), candidates[0])
    return [sys.executable, "-m", "gunicorn", "-c", str(config), "server.app:app"]


async def _answers(settings: Settings) -> bool:
    """`GET /readyz` says 200. By hand, as this is the only HTTP request the supervisor ever makes."""
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "") else "::1" if settings.host == "::" else settings.host
    try:
        reader, writer = await asyncio.open_connection(host, settings.port)
    except OSError:
        return False
    try:
        writer.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        status = await asyncio.wait_for(reader.readline(), 2.0)
        return status.split()[1:2] == [b"200"]
    except (OSError, TimeoutError):
        return False
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def banner(settings: Settings, adapters: list[str], model: str) -> str:
    """What a person needs after a start: the addresses, and a command to paste."""
    host = "localhost" if settings.is_loopback or settings.host in ("0.0.0.0", "::") else settings.host
    url = f"http://{host}:{settings.port}"
    key = "  -H 'Authorization: Bearer YOUR_KEY' \\\n" if settings.api_keys else ""
    return f"""
qloop is ready.

  page     {url}/
  API      {url}/v1        (OpenAI SDK: base_url="{url}/v1")
  models   {", ".join([model, *adapters])}

Try it:

curl {url}/v1/chat/completions \\
  -H 'Content-Type: application/json' \\
{key}  -d '{{"model": "{(adapters or [model])[0]}", "messages": [{{"role": "user", "content": "你是谁？"}}]}}'

Ctrl-C stops it after the running answers.
"""
