"""What only shows after many turns: restarts, reloads and clients that come and go. And the demo, built once more."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from server.settings import home_path
from server.store.hashes import file_hash
from server.store.home import Home
from server.store.registry import Registry
from tests.e2e.conftest import Serve
from tests.e2e.service import all_begun, is_there, one_stream, settled, start_streams
from tests.services import ROOT, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_an_engine_killed_five_times_comes_back_five_times(serve: Serve) -> None:
    """Each time it waits twice as long, so that one that cannot live does not burn the machine."""
    service = serve()

    async def killed_under_load() -> None:
        tasks = start_streams(service.url, 8, max_tokens=5000)
        await all_begun(service, 8)
        pid = service.engine_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert all(stream.error is not None for stream in await settled(tasks))

    for _ in range(5):
        asyncio.run(killed_under_load())
        wait_until(lambda: service.all_ready, 60, "the next engine")
        assert one_stream(service.url, max_tokens=5).is_whole


def test_thirty_reloads_leak_neither_processes_nor_memory(serve: Serve) -> None:
    service = serve()
    supervisor, master = service.supervisor, service.gunicorn
    service.reload()
    before = supervisor.memory_info().rss, master.memory_info().rss
    for _ in range(30):
        service.reload()
    wait_until(lambda: len(service.worker_pids) == 2, 30, "two workers")
    assert service.gunicorn.pid == master.pid
    assert len([p for p in supervisor.children(recursive=True) if is_there(p)]) == 4  # engine, master, two workers
    for process, rss in zip((supervisor, master), before, strict=True):
        assert process.memory_info().rss < rss + 20 * 2**20


def test_a_thousand_clients_that_leave_cost_no_memory(serve: Serve) -> None:
    service = serve(QLOOP_FAKE_TOKENS_PER_S="200")

    async def leave_early() -> None:
        tasks = start_streams(service.url, 50, max_tokens=5000)
        await all_begun(service, 25)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def used() -> int:
        pids = [*service.worker_pids, service.engine_pid]
        return sum(psutil.Process(pid).memory_info().rss for pid in pids if pid is not None)

    for _ in range(4):
        asyncio.run(leave_early())
    before = used()
    for _ in range(16):
        asyncio.run(leave_early())
    wait_until(lambda: service.running_and_waiting() == 0, 10, "an idle engine")
    assert used() < before + 30 * 2**20


def test_the_same_seed_builds_the_same_demo(tmp_path: Path) -> None:
    """Bit for bit, on the machine where the first one was built."""
    built, again = Home(home_path()), Home(tmp_path)
    subprocess.run([sys.executable, "-m", "trainer", "demo", "--home", str(tmp_path)], cwd=ROOT, check=True)
    weights = [home.models / "qwen2-demo" / "model.safetensors" for home in (built, again)]
    assert file_hash(weights[0]) == file_hash(weights[1])
    adapters = [Registry(home.adapters).current("qwen2-demo-xiaozhi") for home in (built, again)]
    assert adapters[0] == adapters[1] is not None
