"""One child process and its restarts."""

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Mapping, Sequence

from server.ops.process import die_with_parent

log = logging.getLogger("qloop.supervisor")

STABLE_AFTER_S = 60.0
FIRST_BACKOFF_S = 0.2
MAX_BACKOFF_S = 30.0
MAX_FIRST_FAILURES = 3
EXIT_CONFIG = 78  # sysexits.h: the child says that starting it again will not help


class Child:
    """`run` keeps it running, and returns when it was stopped or gave up for good.

    It has its own session, so that Ctrl-C reaches only the supervisor, and the kernel ends it when the supervisor dies.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self.process: asyncio.subprocess.Process | None = None
        self.started = 0.0
        self.failure: int | None = None  # the exit status that ended all restarts
        self.has_served = False  # set by who can tell; until then a few failures are enough to give up
        self._command = command
        self._environment = environment
        self._is_stopping = False
        self._backoff_s = 0.0
        self._num_failures = 0

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process is not None and self.process.returncode is None else None

    async def run(self) -> None:
        while not self._is_stopping:
            status = await self._run_once()
            if self._is_stopping:
                return
            self._num_failures += 1
            if status == EXIT_CONFIG or (not self.has_served and self._num_failures >= MAX_FIRST_FAILURES):
                log.error("%s cannot start (%s)", self.name, _reason(status))
                self.failure = status if status > 0 else 1
                return
            self._backoff_s = self._next_backoff()
            log.error("%s ended (%s); starting it again in %.1f s", self.name, _reason(status), self._backoff_s)
            await asyncio.sleep(self._backoff_s)

    def signal(self, number: signal.Signals) -> None:
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def stop(self, patience_s: float) -> None:
        """TERM, and KILL when it is not gone after `patience_s`."""
        self._is_stopping = True
        process = self.process
        if process is None or process.returncode is not None:
            return
        self.signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), patience_s)
        except TimeoutError:
            log.error("%s did not stop within %.0f s: killing it", self.name, patience_s)
            self.kill()
            await process.wait()

    def kill(self) -> None:
        """The whole session: none of its own children may keep the device or the port."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    async def _run_once(self) -> int:
        parent = os.getpid()
        self.started = time.monotonic()
        self.process = await asyncio.create_subprocess_exec(
            *self._command,
            env=dict(self._environment),
            start_new_session=True,
            preexec_fn=lambda: die_with_parent(parent),
        )
        log.info("%s started, pid %d", self.name, self.process.pid)
        status = await self.process.wait()
        with contextlib.suppress(ProcessLookupError):  # whatever it left behind in its session
            os.killpg(self.process.pid, signal.SIGKILL)
        return status

    def _next_backoff(self) -> float:
        """At once after a long life; 0.2, 0.4, 0.8 … s when it keeps dying."""
        if time.monotonic() - self.started > STABLE_AFTER_S:
            return FIRST_BACKOFF_S
        return min(max(self._backoff_s * 2, FIRST_BACKOFF_S), MAX_BACKOFF_S)


def _reason(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
