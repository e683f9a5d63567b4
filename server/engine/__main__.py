"""`python -m server.engine`: load the model, then serve the engine socket until told to stop.

TERM drains (running answers finish, new requests are refused) and exits 0; a second TERM, or INT, stops at once.
"""

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

from server.engine.adapter_calls import EVERYONE
from server.engine.adapter_checks import AdapterChecks
from server.engine.adapter_state import StateFile
from server.engine.adapters import AdapterTable
from server.engine.backends import create_backend
from server.engine.backends.base import Backend
from server.engine.connections import EngineSocket
from server.engine.core import Core, Delivery, RegistryChanged, Stop
from server.engine.load_phase import LoadReport, phase_path
from server.engine.messages import PROTOCOL_VERSION, ModelInfo, Ready, StartDrain
from server.errors import ConfigError
from server.ops.logging import configure_logging
from server.ops.process import die_with_parent
from server.settings import Settings, add_arguments, load_settings, prepare_compute_threads
from server.store.home import Home
from server.store.registry import Registry
from server.store.registry_watch import RegistryWatch
from server.text.identity import text_identity

log = logging.getLogger("qloop.engine")

EXIT_CONFIG = 78  # sysexits.h EX_CONFIG: starting again will not help
IDLE_POLL_S = 0.1
REGISTRY_POLL_S = 0.5
KEEP_S = 1.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m server.engine", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parent-pid", type=int, help="process that started this one; it ends with it (Linux)")
    add_arguments(parser)
    arguments = vars(parser.parse_args(argv))
    if (parent_pid := arguments.pop("parent_pid")) is not None:
        die_with_parent(parent_pid)
    try:
        settings = load_settings(arguments).settings
        configure_logging(settings.log_level)
        prepare_compute_threads()
        return asyncio.run(Engine(settings).serve())
    except ConfigError as error:
        print(f"qloop engine: {error}", file=sys.stderr)
        return EXIT_CONFIG


# What each signal does; docs/operations.md shows this table.
SIGNALS = {
    signal.SIGTERM: "Drain: refuse new requests, finish running ones, exit 0. A second TERM is as INT.",
    signal.SIGINT: "Stop at once: running requests end with an error, exit 0.",
    signal.SIGHUP: "Ignored: a terminal that closes is no reason to drop the weights.",
}


class Engine:
    """The process: backend and core in the compute thread, the socket in this one."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stopped = asyncio.Event()
        self._has_failed = False
        self._core: Core | None = None  # None while loading
        self._drain: asyncio.Task[None] | None = None
        self._home = Home(settings.home)

    async def serve(self) -> int:
        """Returns the exit status: 0 after a stop that was asked for, 1 when the backend failed."""
        self._loop = asyncio.get_running_loop()
        self._install_signals()
        with LoadReport(phase_path(self._settings.socket_path)).loading() as report:
            report.enter("finding the model")
            backend = create_backend(self._settings)
            model = await self._load(backend, report)
            gc.collect()
            gc.freeze()  # it all stays; a look through it took the collector 0.3 s, in the middle of answers
            report.enter("loading adapters")
            socket = self._start_core(backend, model)
            server = await socket.listen(self._settings.socket_path)
        thread = threading.Thread(target=self._compute, args=(self._core,), name="compute", daemon=True)
        thread.start()
        threading.Thread(target=self._watch_registry, args=(self._core,), name="registry", daemon=True).start()
        log.info("engine ready: %s on %s, socket %s", model.name, model.backend, self._settings.socket_path)
        await self._stopped.wait()
        server.close()
        await asyncio.to_thread(thread.join)
        await asyncio.sleep(0)  # the core's last deliveries
        self._settings.socket_path.unlink(missing_ok=True)
        backend.close()
        return 1 if self._has_failed else 0

    async def _load(self, backend: Backend, report: LoadReport) -> ModelInfo:
        """Leaves the process when a signal comes first: loading cannot be interrupted, only abandoned."""
        loading = asyncio.create_task(asyncio.to_thread(backend.load, report.enter))
        stopped = asyncio.create_task(self._stopped.wait())
        while not (loading.done() or stopped.done()):
            report.keep()
            await asyncio.wait({loading, stopped}, timeout=KEEP_S, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            report.leave()
            os._exit(0)
        stopped.cancel()
        return loading.result()

    def _start_core(self, backend: Backend, model: ModelInfo) -> EngineSocket:
        settings = self._settings
        checks = AdapterChecks(model, text_identity(Path(model.path)), settings.max_adapter_rank)
        state_file = StateFile(self._home.adapter_state(model.weights_hash))
        adapters = AdapterTable(Registry(self._home.adapters), model, checks, state_file)
        socket = EngineSocket(lambda: ready)

        def deliver(deliveries: list[Delivery]) -> None:
            """From the compute thread: one wake-up of the event loop per step."""
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                self._loop.call_soon_threadsafe(socket.deliver, deliveries)

        self._core = socket.core = Core(
            backend,
            adapters,
            max_queue=settings.max_queue,
            deliver=deliver,
            max_adapters=settings.max_adapters,
            adapter_wait_s=settings.adapter_wait_s,
        )
        self._core.restore_adapters()
        ready = Ready(PROTOCOL_VERSION, os.getpid(), model, adapters.list(), adapters.version, False)
        return socket

    def _watch_registry(self, core: Core) -> None:
        """In a thread of its own: a slow disk must not delay a token. It ends with the process."""
        watch = RegistryWatch(self._home.adapters)
        seen: object = None
        while True:
            published = watch.look()
            if published != seen:
                seen = published
                core.post(EVERYONE, RegistryChanged(list(published)))
            time.sleep(REGISTRY_POLL_S)

    def _compute(self, core: Core) -> None:
        try:
            core.run()
        except Exception:
            log.exception("the backend failed")
            self._has_failed = True
            core.fail("The engine failed while computing this answer.")
        finally:
            self._loop.call_soon_threadsafe(self._stopped.set)

    # --- signals ---

    def _install_signals(self) -> None:
        handlers = {signal.SIGTERM: self._handle_term, signal.SIGINT: self._stop, signal.SIGHUP: lambda: None}
        for number in SIGNALS:
            self._loop.add_signal_handler(number, handlers[number])

    def _handle_term(self) -> None:
        if self._core is None or self._drain is not None:
            self._stop()
        else:
            self._drain = asyncio.create_task(self._drain_and_stop(self._core))

    async def _drain_and_stop(self, core: Core) -> None:
        log.info("draining: running answers finish, new requests are refused")
        core.post(EVERYONE, StartDrain())
        deadline = self._loop.time() + self._settings.drain_timeout_s
        while not core.is_drained and self._loop.time() < deadline:
            await asyncio.sleep(IDLE_POLL_S)
        self._stop()

    def _stop(self) -> None:
        if self._core is not None:
            self._core.post(EVERYONE, Stop())  # the compute thread sets `_stopped` when it has left the loop
        else:
            self._stopped.set()


if __name__ == "__main__":
    sys.exit(main())
