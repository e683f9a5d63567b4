"""The whole service as an operator starts it, in a home of its own, and streams to put load on it."""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from tests.services import START_S, clean_environment, free_port, wait_until

START_TIMEOUT_S = 90.0
PROMPT = "一二三四五六七八九十"


class Supervised:
    """`python -m server` with settings of its own. `tree` is the code it runs from: it can be changed under it."""

    def __init__(self, home: Path, tree: Path, settings: dict[str, str]) -> None:
        self.home = home
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = home / "service.log"
        own = {
            "QLOOP_HOME": str(home),
            "QLOOP_ENGINE_SOCKET": f"{tempfile.gettempdir()}/qloop-test-{self.port}.sock",
            "QLOOP_PORT": str(self.port),
        }
        self.settings = settings
        self._environment = clean_environment(**own, **settings) | {"PYTHONPATH": str(tree)}
        self._cwd = home
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Supervised":
        with self.log_path.open("ab") as log:
            command = [sys.executable, "-m", "server"]
            self._process = subprocess.Popen(command, env=self._environment, cwd=self._cwd, stdout=log, stderr=log)
        wait_until(lambda: self.all_ready or not self.is_alive, self.start_s, "the service to be ready")
        assert self.is_alive, self.log
        return self

    @property
    def start_s(self) -> float:
        """What it may take to be ready; vLLM needs the longest."""
        return max(START_TIMEOUT_S, START_S.get(self.settings.get("QLOOP_ENGINE", ""), 0))

    @property
    def supervisor(self) -> psutil.Process:
        assert self._process is not None
        return psutil.Process(self._process.pid)

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def is_ready(self) -> bool:
        return self.status("/readyz") == 200

    @property
    def all_ready(self) -> bool:
        """Asked often enough that every worker was."""
        return all(self.is_ready for _ in range(16))

    @property
    def log(self) -> str:
        return self.log_path.read_text("utf-8")

    def status(self, path: str) -> int | None:
        try:
            return httpx.get(self.url + path, timeout=20.0).status_code
        except httpx.TransportError:
            return None

    @property
    def engine_pid(self) -> int | None:
        """As some worker sees it; None from one that is not ready."""
        pid: int | None = httpx.get(self.url + "/readyz", timeout=20.0).json().get("engine_pid")
        return pid

    @property
    def gunicorn(self) -> psutil.Process:
        return next(p for p in self.supervisor.children() if "gunicorn" in " ".join(p.cmdline()))

    @property
    def worker_pids(self) -> set[int]:
        return {child.pid for child in self.gunicorn.children() if is_there(child)}

    def running_and_waiting(self) -> float:
        text = httpx.get(self.url + "/metrics", timeout=20.0).text
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return float(values["qloop_sequences_running"]) + float(values["qloop_sequences_waiting"])

    def send(self, number: signal.Signals) -> None:
        self.supervisor.send_signal(number)

    def reload(self) -> None:
        """HUP, and wait until only new workers are there."""
        old = self.worker_pids
        self.send(signal.SIGHUP)
        wait_until(lambda: self.worker_pids and not (self.worker_pids & old), 60, "new workers")

    def wait_exit(self, timeout_s: float) -> int:
        assert self._process is not None
        return self._process.wait(timeout_s)

    def stop(self) -> None:
        """Whatever happened: nothing of it is left afterwards."""
        if self._process is None:
            return
        family = [self.supervisor, *self.supervisor.children(recursive=True)] if self.is_alive else []
        if self.is_alive:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait(10)


def is_there(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:  # it went while we looked
        return False


@dataclass
class Stream:
    """What one streaming client saw."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    text: str = ""
    finish_reasons: list[str] = field(default_factory=list)
    error: dict[str, object] | None = None
    is_done: bool = False
    broken: str | None = None  # the connection ended early
    ended: float = 0.0
    local_port: int = 0

    @property
    def is_whole(self) -> bool:
        return self.status == 200 and self.is_done and len(self.finish_reasons) == 1 and self.error is None


def http_client() -> httpx.AsyncClient:
    """One for many streams: making its TLS context costs more than a stream. Every request has its own connection."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(timeout=120, limits=limits)


async def stream(
    client: httpx.AsyncClient, url: str, *, max_tokens: int, prompt: str = PROMPT, model: str | None = None
) -> Stream:
    """One chat stream to its end, however it ends."""
    seen = Stream()
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "stream": True,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0,
    }
    try:
        async with client.stream("POST", url + "/v1/chat/completions", json=body) as response:
            seen.status, seen.headers = response.status_code, dict(response.headers)
            seen.local_port = response.extensions["network_stream"].get_extra_info("client_addr")[1]
            async for line in _lines(response):
                _digest(seen, line)
    except httpx.TransportError as error:
        seen.broken = repr(error)
    seen.ended = time.monotonic()
    return seen


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    """Split at line feeds only: httpx would split at U+0085 and its like, too, which random tokens contain."""
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.decode()


def _digest(seen: Stream, line: str) -> None:
    if not line.startswith("data: "):
        return
    if line == "data: [DONE]":
        seen.is_done = True
        return
    event = json.loads(line.removeprefix("data: "))
    seen.error = event.get("error", seen.error)
    for choice in event.get("choices", []):
        seen.text += choice["delta"].get("content") or ""
        if choice["finish_reason"] is not None:
            seen.finish_reasons.append(choice["finish_reason"])


def one_stream(url: str, *, max_tokens: int) -> Stream:
    async def run() -> Stream:
        async with http_client() as client:
            return await stream(client, url, max_tokens=max_tokens)

    return asyncio.run(run())


def start_streams(url: str, count: int, *, max_tokens: int) -> list["asyncio.Task[Stream]"]:
    client = http_client()
    return [asyncio.create_task(stream(client, url, max_tokens=max_tokens)) for _ in range(count)]


async def settled(tasks: list["asyncio.Task[Stream]"]) -> list[Stream]:
    return list(await asyncio.gather(*tasks))


async def all_begun(service: Supervised, count: int) -> None:
    await in_loop(lambda: service.running_and_waiting() >= count, 60, f"{count} running streams")


async def in_loop(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Poll without stopping the streams of this event loop."""
    await asyncio.to_thread(wait_until, condition, timeout_s, what)


@contextlib.contextmanager
def running(service: Supervised) -> Iterator[Supervised]:
    try:
        yield service.start()
    finally:
        service.stop()
