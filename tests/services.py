"""Real processes for tests: one engine with the fake backend, and Gunicorn's workers in front of it.

Without the supervisor, so that a test sees the workers and the engine alone.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
START_S = {"fake": 60.0, "hf": 60.0, "vllm": 240.0}
MODEL = "tiny/chat"  # with a slash, as hub ids have


def wait_until(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Poll until `condition` holds; fail the test when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def clean_environment(**variables: str) -> dict[str, str]:
    """This process's environment without any setting of ours, plus `variables`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("QLOOP_") and k != "PROMETHEUS_MULTIPROC_DIR"}
    return {**kept, "PYTHONPATH": str(ROOT), **variables}


class Service:
    """An engine, and Gunicorn unless `workers` is 0. Settings are given as variables without their prefix."""

    def __init__(self, model_folder: Path, workers: int = 1, **settings: object) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="qloop-"))
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        given = {
            "home": self.home,
            "model": model_folder,
            "served_model_name": MODEL,
            "engine": "fake",
            "port": self.port,
            "workers": max(workers, 1),
            **settings,
        }
        self.environment = clean_environment(**{f"QLOOP_{k.upper()}": str(v) for k, v in given.items()})
        self.engine = self._start("engine", ["-m", "server.engine"])
        self.gunicorn: subprocess.Popen[bytes] | None = None
        if workers:
            command = ["-m", "gunicorn", "-c", str(ROOT / "gunicorn.conf.py"), "server.app:app"]
            self.gunicorn = self._start("gunicorn", command)
        self._num_workers = workers

    @property
    def backend(self) -> str:
        return self.environment["QLOOP_ENGINE"]

    @property
    def start_s(self) -> float:
        """What this engine may take to be ready on a slow machine."""
        return START_S[self.backend]

    @property
    def socket_path(self) -> Path:
        return self.home / "run" / "engine.sock"

    @property
    def log(self) -> str:
        return "".join(path.read_text("utf-8", "replace") for path in sorted(self.home.glob("*.log")))

    def wait_ready(self) -> "Service":
        """Every worker answers, and has the engine."""
        if self.gunicorn is None:
            wait_until(self._has_socket, self.start_s, "the engine's socket")
            return self
        wait_until(self._all_workers_ready, self.start_s, "ready workers")
        return self

    def gauge(self, name: str) -> float:
        """One sample of /metrics, all its label sets summed."""
        text = httpx.get(self.url + "/metrics", headers=self.auth).text
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))

    @property
    def auth(self) -> dict[str, str]:
        key = self.environment.get("QLOOP_API_KEYS", "").partition(",")[0]
        return {"Authorization": f"Bearer {key}"} if key else {}

    def stop(self) -> None:
        for process in (self.gunicorn, self.engine):
            if process is not None:
                _end(process)
        shutil.rmtree(self.home, ignore_errors=True)

    def restart_engine(self) -> None:
        """Killed, and started again; what it was computing is lost."""
        self.engine.kill()
        self.engine.wait()
        self.engine = self._start("engine", ["-m", "server.engine"])

    def _start(self, name: str, arguments: list[str]) -> subprocess.Popen[bytes]:
        with (self.home / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _has_socket(self) -> bool:
        assert self.engine.poll() is None, self.log
        return self.socket_path.exists()

    def _all_workers_ready(self) -> bool:
        assert self.engine.poll() is None and self.gunicorn is not None and self.gunicorn.poll() is None, self.log
        return self._answers()

    def _answers(self) -> bool:
        try:
            return all(httpx.get(self.url + "/readyz").status_code == 200 for _ in range(8 * self._num_workers))
        except httpx.TransportError:
            return False


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
