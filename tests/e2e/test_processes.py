"""The supervisor's promises, with real processes under load."""

import asyncio
import os
import signal
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import StartService
from tests.e2e.conftest import Serve
from tests.e2e.service import (
    Stream,
    Supervised,
    all_begun,
    http_client,
    in_loop,
    is_there,
    one_stream,
    settled,
    start_streams,
    stream,
)
from tests.services import ROOT, wait_until

pytestmark = pytest.mark.e2e


def peers_of(pid: int) -> set[int]:
    """The client ports that this process talks to."""
    connections = psutil.Process(pid).net_connections("inet")
    return {c.raddr.port for c in connections if c.raddr and c.status == psutil.CONN_ESTABLISHED}


def test_reload_under_load_loses_no_request_and_keeps_the_engine(serve: Serve) -> None:
    service = serve()
    engine_pid = service.engine_pid
    assert engine_pid is not None
    engine_started = psutil.Process(engine_pid).create_time()
    http = http_client()

    async def client(until: asyncio.Event) -> list[Stream]:
        seen = []
        while not until.is_set():
            seen.append(await stream(http, service.url, max_tokens=60))
        return seen

    async def scenario() -> list[Stream]:
        finished = asyncio.Event()
        clients = [asyncio.create_task(client(finished)) for _ in range(32)]
        for _ in range(5):
            await all_begun(service, 16)
            await asyncio.to_thread(service.reload)
        finished.set()
        return [seen for streams in await asyncio.gather(*clients) for seen in streams]

    streams = asyncio.run(scenario())
    assert len(streams) >= 64
    assert [s for s in streams if not s.is_whole] == []
    assert service.engine_pid == engine_pid
    assert psutil.Process(engine_pid).create_time() == engine_started


def test_reload_with_a_broken_app_is_refused_and_a_mended_one_is_served(serve: Serve, tree: Path) -> None:
    service = serve(tree)
    workers = service.worker_pids
    health = tree / "server" / "api" / "health.py"
    good = health.read_text("utf-8")

    health.write_text(good + "\ndef broken(:\n", "utf-8")
    service.send(signal.SIGHUP)
    wait_until(lambda: "reload refused" in service.log, 30, "the refusal")
    assert "SyntaxError" in service.log
    assert service.worker_pids == workers
    assert service.is_ready

    health.write_text(good.replace('{"status": "ok"}', '{"status": "mended"}'), "utf-8")
    service.reload()
    assert httpx.get(service.url + "/livez").json() == {"status": "mended"}


def test_reload_with_broken_settings_is_refused(serve: Serve) -> None:
    service = serve()
    workers = service.worker_pids
    (service.home / ".env").write_text("QLOOP_WORKERS=many\n", "utf-8")
    service.send(signal.SIGHUP)
    wait_until(lambda: "reload refused" in service.log, 30, "the refusal")
    assert "QLOOP_WORKERS='many' (from .env)" in service.log
    assert service.worker_pids == workers

    (service.home / ".env").write_text("QLOOP_WORKERS=3\n", "utf-8")
    service.reload()
    wait_until(lambda: len(service.worker_pids) == 3, 30, "the third worker")


def test_a_killed_worker_takes_only_its_own_requests_along(serve: Serve) -> None:
    service = serve()

    async def scenario() -> tuple[list[Stream], set[int]]:
        tasks = start_streams(service.url, 32, max_tokens=150)
        await all_begun(service, 32)
        busiest = max(service.worker_pids, key=lambda pid: len(peers_of(pid)))
        peers = peers_of(busiest)
        psutil.Process(busiest).kill()
        return await settled(tasks), peers

    streams, peers = asyncio.run(scenario())
    assert peers
    assert {s.local_port for s in streams if not s.is_whole} == peers
    wait_until(lambda: len(service.worker_pids) == 2 and service.is_ready, 30, "a new worker")


def test_a_killed_worker_is_replaced_whatever_is_on_disk(serve: Serve, tree: Path) -> None:
    """Half-edited files are no reason to fail: the new worker runs what the others run."""
    service = serve(tree)
    (tree / "server" / "app.py").write_text("def broken(:", "utf-8")
    (service.home / ".env").write_text("QLOOP_WORKERS=many\n", "utf-8")
    gunicorn_pid, victim = service.gunicorn.pid, min(service.worker_pids)
    psutil.Process(victim).kill()
    wait_until(lambda: len(service.worker_pids - {victim}) == 2, 30, "a new worker")
    wait_until(lambda: service.all_ready, 30, "both workers to serve")
    assert service.gunicorn.pid == gunicorn_pid


def test_a_killed_engine_ends_streams_with_an_error_and_comes_back(serve: Serve) -> None:
    service = serve()
    old_pid = service.engine_pid
    assert old_pid is not None

    async def scenario() -> tuple[list[Stream], float]:
        tasks = start_streams(service.url, 32, max_tokens=1000)
        await all_begun(service, 32)
        killed = time.monotonic()
        os.kill(old_pid, signal.SIGKILL)
        return await settled(tasks), killed

    streams, killed = asyncio.run(scenario())
    assert all(s.error is not None and s.error["code"] == "engine_unavailable" and not s.is_done for s in streams)
    assert max(s.ended for s in streams) - killed < 2.0
    wait_until(lambda: service.engine_pid not in (None, old_pid), 30, "a new engine")
    assert one_stream(service.url, max_tokens=3).is_whole


def test_a_hung_engine_is_seen_and_recycled(serve: Serve) -> None:
    service = serve()
    old_pid = service.engine_pid
    assert old_pid is not None
    os.kill(old_pid, signal.SIGSTOP)
    wait_until(lambda: service.status("/readyz") == 503, 10, "503 from /readyz")
    assert service.status("/livez") == 200
    wait_until(lambda: service.engine_pid not in (None, old_pid), 30, "a new engine")
    assert not psutil.pid_exists(old_pid)


def test_term_finishes_running_streams_refuses_new_ones_and_exits_0(serve: Serve) -> None:
    service = serve()
    family = service.supervisor.children(recursive=True)

    async def scenario() -> tuple[list[Stream], list[Stream]]:
        tasks = start_streams(service.url, 20, max_tokens=150)
        await all_begun(service, 20)
        service.send(signal.SIGTERM)
        await in_loop(lambda: service.status("/readyz") == 503, 2, "/readyz to say 503")
        refused = await settled(start_streams(service.url, 5, max_tokens=3))
        return await settled(tasks), refused

    streams, refused = asyncio.run(scenario())
    assert all(s.is_whole for s in streams)
    assert [s.status for s in refused] == [503] * 5
    assert all(int(s.headers["retry-after"]) >= 1 for s in refused)
    assert service.wait_exit(20) == 0
    assert not [p for p in family if p.is_running()]


def test_a_drain_that_takes_too_long_ends_streams_with_an_error_event(serve: Serve) -> None:
    service = serve(QLOOP_DRAIN_TIMEOUT_S="1")

    async def scenario() -> list[Stream]:
        tasks = start_streams(service.url, 4, max_tokens=5000)
        await all_begun(service, 4)
        service.send(signal.SIGTERM)
        return await settled(tasks)

    streams = asyncio.run(scenario())
    assert all(s.error is not None and s.error["code"] == "engine_error" and not s.is_done for s in streams)
    assert service.wait_exit(20) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_when_idle_stops_everything_at_once(serve: Serve, number: signal.Signals) -> None:
    service = serve()
    family = service.supervisor.children(recursive=True)
    service.send(number)
    assert service.wait_exit(10) == 0
    assert not [p for p in family if p.is_running()]
    assert "Traceback" not in service.log


def test_children_die_with_a_killed_supervisor(serve: Serve) -> None:
    service = serve()
    family = service.supervisor.children(recursive=True)
    service.supervisor.kill()
    wait_until(lambda: not any(map(is_there, family)), 10, "all children to go")


def test_vanished_clients_free_the_engine_within_a_second(serve: Serve) -> None:
    service = serve()

    async def scenario() -> float:
        tasks = start_streams(service.url, 50, max_tokens=5000)
        await all_begun(service, 50)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        gone = time.monotonic()
        await in_loop(lambda: service.running_and_waiting() == 0, 5, "an idle engine")
        return time.monotonic() - gone

    assert asyncio.run(scenario()) < 1.0


def test_a_second_service_in_the_same_home_is_refused(serve: Serve) -> None:
    service = serve()
    second = Supervised(service.home, ROOT, {})
    second.log_path = service.home / "second.log"
    with pytest.raises(AssertionError, match="already runs"):
        second.start()


def test_units_without_a_supervisor_stop_cleanly(start_service: StartService) -> None:
    """`gunicorn -c gunicorn.conf.py` beside `python -m server.engine`, as systemd or Kubernetes would run them."""
    service = start_service(workers=1)
    assert service.gunicorn is not None
    assert one_stream(service.url, max_tokens=5).is_whole
    for unit in (service.gunicorn, service.engine):
        unit.terminate()
        assert unit.wait(20) == 0
