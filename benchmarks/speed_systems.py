"""The systems that `engine_speed` compares, as processes that stand still (SIGSTOP) whenever it is not their turn."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from benchmarks.services import ROOT
from server.engine.client import EngineClient
from server.engine.messages import Generate, SamplingParams, SequenceOutput
from server.errors import QloopError

START_TIMEOUT_S = 900.0  # vLLM compiles
END_TIMEOUT_S = 20.0
FOREVER_S = 1e9
LOG_LINES = 6

Times = list[list[float]]  # seconds of each token of each stream since all were submitted


class NotAvailable(Exception):
    """A system that does not start here; the text says why. The others are still compared."""


class System(Protocol):
    name: str
    versions: dict[str, str]

    async def run(self, prompts: Sequence[list[int]], tokens: int) -> Times: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...


class Child:
    """A process and its descendants: one session, one log, stopped and continued and ended together."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log_path: Path, **pipes: Any) -> None:
        self.log_path = log_path
        with log_path.open("wb") as log:
            self.popen: subprocess.Popen[bytes] = subprocess.Popen(
                command, cwd=ROOT, env=environment, stderr=log, start_new_session=True, **pipes
            )

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, number)

    def last_words(self) -> str:
        lines = [line for line in self.log_path.read_text("utf-8", "replace").splitlines() if line.strip()]
        return "\n    ".join(lines[-LOG_LINES:]) or "(it said nothing)"

    def end(self) -> None:
        """Politely first: vLLM leaves shared memory behind when it is killed."""
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGCONT)
        deadline = time.monotonic() + END_TIMEOUT_S
        while self._is_alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        self.signal(signal.SIGKILL)
        self.popen.wait()

    def _is_alive(self) -> bool:
        """Any process of the session's group."""
        self.popen.poll()
        try:
            os.killpg(self.popen.pid, 0)
        except ProcessLookupError:
            return False
        return True


def clean_environment(threads: int, **variables: str) -> dict[str, str]:
    """This process's environment without what would set threads or our settings behind the benchmark's back."""
    taken = ("QLOOP_", "OMP_", "KMP_", "MKL_", "VLLM_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(taken)}
    return {**kept, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **variables}


# --- the others ---


@dataclass
class Peer:
    """One of `speed_peers`, spoken to in JSON lines."""

    name: str
    child: Child
    versions: dict[str, str]

    async def run(self, prompts: Sequence[list[int]], tokens: int) -> Times:
        return await asyncio.to_thread(self._run, {"prompts": prompts, "tokens": tokens})

    def pause(self) -> None:
        self.child.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.child.signal(signal.SIGCONT)

    def _run(self, question: dict[str, Any]) -> Times:
        assert self.child.popen.stdin is not None
        self.child.popen.stdin.write(json.dumps(question).encode() + b"\n")
        self.child.popen.stdin.flush()
        times: Times = _reply(self.child)["times"]
        return times


@contextlib.contextmanager
def peer(name: str, kind: str, python: Path, model: Path, threads: int, work: Path) -> Iterator[Peer]:
    """Started and loaded. Raises NotAvailable with the end of its log."""
    # Not resolve(): the interpreter of a virtual environment is a link, and the link's place is what makes it one.
    script = Path(__file__).with_name("speed_peers.py")
    command = [str(python.absolute()), str(script), kind, str(model), str(threads)]
    environment = _vllm_environment(name, threads) if kind == "vllm" else clean_environment(threads)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    child = Child(command, environment, work / f"{name}.log", **pipes)
    try:
        yield Peer(name, child, _reply(child)["versions"])
    finally:
        child.end()


def _vllm_environment(name: str, threads: int) -> dict[str, str]:
    """`vllm` computes on every core; `vllm_default` is left to bind its threads itself."""
    environment = clean_environment(threads, VLLM_TARGET_DEVICE="cpu", VLLM_CPU_KVCACHE_SPACE="1")
    environment |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1"}
    if name == "vllm_default":
        del environment["OMP_NUM_THREADS"]
    else:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
    del environment["PYTHONPATH"]
    return environment


def _reply(child: Child) -> dict[str, Any]:
    assert child.popen.stdout is not None
    line = child.popen.stdout.readline()
    if not line:
        raise NotAvailable(child.last_words())
    reply: dict[str, Any] = json.loads(line)
    return reply


# --- ours ---


class Engine:
    """The engine process as it ships, and the benchmark as its one client."""

    versions: dict[str, str] = {}  # noqa: RUF012 - ours is in the result's head

    def __init__(self, name: str, child: Child, client: EngineClient) -> None:
        self.name = name
        self.child = child
        self.client = client
        self._count = 0

    async def run(self, prompts: Sequence[list[int]], tokens: int, adapters: Sequence[str] | None = None) -> Times:
        """All prompts at once; `adapters` names each stream's."""
        names: Sequence[str | None] = adapters or [None] * len(prompts)
        begun = time.perf_counter()
        streams = [self.stream(ids, tokens, name, begun=begun) for ids, name in zip(prompts, names, strict=True)]
        return list(await asyncio.gather(*streams))

    async def stream(
        self,
        prompt: list[int],
        tokens: int,
        adapter: str | None = None,
        *,
        begun: float | None = None,
        times: list[float] | None = None,
        outputs: list[SequenceOutput] | None = None,
    ) -> list[float]:
        """Seconds of each token since `begun`. `times` and `outputs` are filled while it runs."""
        begun = time.perf_counter() if begun is None else begun
        times = [] if times is None else times
        self._count += 1
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        request = Generate(request_id=str(self._count), prompt_token_ids=prompt, params=params, adapter=adapter)
        generation = await self.client.generate(request)
        try:
            while not generation.is_finished:
                for output in await generation.next():
                    times += [time.perf_counter() - begun] * len(output.new_token_ids)
                    if outputs is not None:
                        outputs.append(output)
        finally:
            generation.cancel()
        return times

    def rss_mib(self) -> float:
        return float(psutil.Process(self.child.popen.pid).memory_info().rss) / 2**20

    def pause(self) -> None:
        self.child.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.child.signal(signal.SIGCONT)


@contextlib.asynccontextmanager
async def engine(
    model: Path, threads: int, work: Path, *, dtype: str = "bf16", home: Path | None = None
) -> AsyncIterator[Engine]:
    """A running engine. Raises NotAvailable with the end of its log, for instance when it has no such dtype."""
    name = f"qloop_{dtype}"
    with tempfile.TemporaryDirectory(prefix="qb") as folder:  # short: a Unix socket's path may have 107 bytes
        settings = {
            "QLOOP_HOME": str(home or folder),
            "QLOOP_ENGINE_SOCKET": f"{folder}/s",
            "QLOOP_ENGINE": "hf",
            "QLOOP_MODEL": str(model),
            "QLOOP_HF_DTYPE": dtype,
            "QLOOP_NUM_THREADS": str(threads),
        }
        command = [sys.executable, "-m", "server.engine"]
        child = Child(command, clean_environment(threads, **settings), work / f"{name}.log")
        client = EngineClient(Path(folder) / "s", heartbeat_timeout_s=FOREVER_S)  # it is silent while it is stopped
        client.start()
        try:
            await _wait_ready(child, client)
            yield Engine(name, child, client)
        finally:
            await client.close()
            child.end()


async def _wait_ready(child: Child, client: EngineClient) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not client.is_ready:
        if child.popen.poll() is not None or client.refusal or time.monotonic() > deadline:
            raise NotAvailable(client.refusal or child.last_words())
        with contextlib.suppress(QloopError):
            await client.wait_ready(0.5)
