"""Callers that leave, a full queue, silence on a stream: what the engine and the other callers see of it."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import pytest
import uvicorn

import server.app
from server.engine.client import EngineClient
from server.settings import Settings
from server.store.registry import Registry
from tests.conftest import StartService
from tests.models import make_tokenizer
from tests.server.engine.adapters import publish
from tests.services import MODEL, Service, free_port, wait_until

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG: dict[str, Any] = {"messages": [{"role": "user", "content": "你好"}], "max_tokens": 400, "ignore_eos": True}
FREED_S = 4.0  # left alone, LONG runs for 8 s; what was freed shows within 0.4 s on a busy machine


def is_empty(service: Service) -> bool:
    return service.gauge("qloop_sequences_running") + service.gauge("qloop_sequences_waiting") == 0


def is_full(service: Service, running: int, waiting: int) -> bool:
    return (service.gauge("qloop_sequences_running"), service.gauge("qloop_sequences_waiting")) == (running, waiting)


@pytest.fixture(autouse=True)
def starts_empty(slow_service: Service) -> None:
    wait_until(lambda: is_empty(slow_service), 20, "an idle engine")


def send_raw(service: Service, body: dict[str, Any], path: str = CHAT) -> socket.socket:
    """A caller that has asked and reads nothing yet."""
    request = httpx.Request("POST", service.url + path, json=body)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(request.content)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", service.port))
    connection.sendall(head.encode() + request.content)
    return connection


LEAVERS: dict[str, tuple[list[dict[str, Any]], str, tuple[int, int]]] = {
    "streams": ([{**LONG, "stream": True}] * 4, CHAT, (4, 0)),
    "whole answers": ([LONG] * 4, CHAT, (4, 0)),
    "queued": ([{**LONG, "stream": True}] * 3 + [LONG] * 5, CHAT, (4, 4)),
    "many choices": ([{**LONG, "n": 4}, {**LONG, "n": 4, "stream": True}], CHAT, (4, 4)),
    "many prompts": ([{"prompt": ["a", "b", "c"], "max_tokens": 400, "ignore_eos": True}] * 2, COMPLETIONS, (4, 2)),
}


@pytest.mark.parametrize(("bodies", "path", "load"), LEAVERS.values(), ids=LEAVERS)
def test_callers_that_leave_free_the_engine(
    slow_service: Service, bodies: list[dict[str, Any]], path: str, load: tuple[int, int]
) -> None:
    callers = [send_raw(slow_service, body, path) for body in bodies]
    wait_until(lambda: is_full(slow_service, *load), 10, "all of them in the engine")
    for caller in callers:
        caller.close()
    wait_until(lambda: is_empty(slow_service), FREED_S, "nothing running or waiting")
    assert "never retrieved" not in slow_service.log and "Traceback" not in slow_service.log


def test_a_full_queue_is_answered_at_once_and_the_accepted_go_on(slow_service: Service) -> None:
    body = {**LONG, "max_tokens": 100}
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(slow_service.url + CHAT, json=body, timeout=60))

    accepted = [threading.Thread(target=ask) for _ in range(8)]
    for thread in accepted:
        thread.start()
    wait_until(lambda: is_full(slow_service, 4, 4), 10, "a full queue")
    waits = []
    with httpx.Client(base_url=slow_service.url) as client:
        for _ in range(20):
            start = time.perf_counter()
            response = client.post(CHAT, json={**body, "stream": True})
            waits.append(time.perf_counter() - start)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
            assert response.headers["retry-after"].isdigit()
        assert client.post(COMPLETIONS, json={"prompt": ["a"] * 2, "n": 5}).status_code == 503
        impossible = client.post(CHAT, json={**body, "n": 9})  # more than this server ever takes: not "try again"
        assert (impossible.status_code, impossible.json()["error"]["param"]) == (400, "n")
    assert sorted(waits)[len(waits) // 2] < 0.05
    for thread in accepted:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 8
    assert {answer.json()["usage"]["completion_tokens"] for answer in answers} == {100}


def test_a_leaving_caller_hurts_nobody_else(slow_service: Service) -> None:
    stays = send_raw(slow_service, {**LONG, "max_tokens": 60, "stream": True})
    leaves = [send_raw(slow_service, {**LONG, "stream": True}) for _ in range(3)]
    for caller in leaves:
        caller.recv(100)
        caller.close()
    received = b""
    while b"[DONE]" not in received:
        piece = stays.recv(65536)
        assert piece
        received += piece
    stays.close()
    assert received.count(b'"content":"') == 61  # the role's empty one, and 60 tokens


def test_a_client_that_does_not_read_gets_everything_once_it_does(service: Service) -> None:
    """Its answer, about 20 MB, fits no buffer on the way; other callers are served meanwhile."""
    body = {**LONG, "stream": True, "n": 64, "max_tokens": 200, "logprobs": True, "top_logprobs": 10}
    with send_raw(service, body) as caller:
        for _ in range(20):
            assert httpx.get(service.url + "/livez").status_code == 200
        # The engine is done, so what is missing waits in the worker, on this connection's account.
        wait_until(lambda: service.gauge("qloop_sequences_running") == 0, 30, "the engine's end")
        received = bytearray()
        while piece := caller.recv(2**20):
            received += piece
            if received.endswith(b"0\r\n\r\n"):
                break
    assert received.count(b'"finish_reason":"length"') == 64
    assert received.count(b'"logprob":') >= 64 * 200 * 11
    assert received.count(b"data: [DONE]") == 1


# --- a server in this process, whose interval a test can choose ---


@pytest.fixture
def near_url(slow_service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The same app and engine, with a comment every 20 ms; uvicorn without Gunicorn."""
    monkeypatch.setattr(server.app, "KEEP_ALIVE_INTERVAL_S", 0.02)
    port = free_port()
    app = server.app.create_app(Settings(home=slow_service.home, port=port))
    runner = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None))
    thread = threading.Thread(target=runner.run)
    thread.start()
    wait_until(lambda: app.state.serving.is_ready and runner.started, 30, "the server in this process")
    yield f"http://127.0.0.1:{port}"
    runner.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def test_silent_streams_are_kept_alive_and_the_sdk_does_not_mind(near_url: str, slow_service: Service) -> None:
    blocker = send_raw(slow_service, {**LONG, "n": 4, "max_tokens": 30})  # the stream below waits for half a second
    wait_until(lambda: slow_service.gauge("qloop_sequences_running") == 4, 10, "a busy engine")
    body = {"messages": LONG["messages"], "stream": True}
    raw = httpx.post(near_url + CHAT, json=body, timeout=30).text
    assert raw.count(": keep-alive\n\n") >= 3 and raw.endswith("data: [DONE]\n\n")
    with openai.OpenAI(base_url=near_url + "/v1", api_key="none", max_retries=0) as client:
        chunks = list(client.chat.completions.create(model=MODEL, **body))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "user\n你好\nassistant\n"
    whole = httpx.post(near_url + CHAT, json={**body, "stream": False}, timeout=30)
    assert whole.json()["choices"][0]["finish_reason"] == "stop"
    many = httpx.post(near_url + COMPLETIONS, json={"prompt": ["你", "好"], "stream": True, "echo": True}, timeout=30)
    assert many.text.endswith("data: [DONE]\n\n")
    blocker.close()


def test_a_defect_is_a_500_with_its_request_id(near_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing known to us causes one, so one is made: the answer's shape must hold for those we do not know."""

    def defect(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(server.app.Serving, "targets", defect)
    response = httpx.get(near_url + "/v1/models", headers={"X-Request-Id": "r-1"})
    assert (response.status_code, response.headers["x-request-id"]) == (500, "r-1")
    assert response.json()["error"]["code"] == "internal_error" and "secret" not in response.text


# --- the engine's end, and adapters, seen through HTTP ---


def test_without_an_engine_everything_says_so_and_lives(start_service: StartService) -> None:
    service = start_service(workers=1, fake_tokens_per_s=50)
    with httpx.stream("POST", service.url + CHAT, json={**LONG, "stream": True}, timeout=20) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        service.engine.kill()
        rest = [line for line in lines if line]
    assert '"code":"engine_unavailable"' in rest[-1] and "[DONE]" not in rest[-1]
    wait_until(lambda: httpx.get(service.url + "/readyz").status_code == 503, 5, "not ready")
    assert httpx.get(service.url + "/livez").status_code == 200
    assert service.gauge("qloop_engine_ready") == 0
    refused = httpx.post(service.url + CHAT, json=LONG)
    assert refused.status_code == 503 and refused.headers["retry-after"].isdigit()
    assert refused.json()["error"]["code"] == "engine_unavailable"


@contextlib.asynccontextmanager
async def operator(service: Service) -> AsyncIterator[EngineClient]:
    client = EngineClient(service.socket_path)
    client.start()
    await client.wait_ready(20)
    try:
        yield client
    finally:
        await client.close()


async def test_a_loaded_adapter_is_found_by_the_next_request_through_any_worker(
    service: Service, tmp_path: Any
) -> None:
    entry = publish(Registry(service.home / "adapters"), tmp_path / "a", "xiaozhi")
    limits = httpx.Limits(max_keepalive_connections=0)  # a new connection for every request: any worker may get it
    async with operator(service) as client, httpx.AsyncClient(base_url=service.url, limits=limits) as http:
        for _ in range(5):
            await client.load_adapter("xiaozhi")
            bodies = [{"model": name, "prompt": "abc"} for name in ("xiaozhi", entry.id)] * 8
            answers = await asyncio.gather(*(http.post(COMPLETIONS, json=body) for body in bodies))
            assert [answer.status_code for answer in answers] == [200] * 16
            await client.unload_adapter("xiaozhi")
            gone = await asyncio.gather(*(http.post(COMPLETIONS, json=body) for body in bodies))
            assert [answer.status_code for answer in gone] == [404] * 16
        await client.load_adapter("xiaozhi")
        cards = {card["id"]: card for card in (await http.get("/v1/models")).json()["data"]}
        assert set(cards) == {MODEL, "xiaozhi"}
        assert (cards["xiaozhi"]["parent"], cards["xiaozhi"]["root"]) == (MODEL, entry.id)
        assert (await http.get(f"/v1/models/{entry.id}")).json()["id"] == entry.id
        base, adapted = [
            (await http.post(COMPLETIONS, json={"model": name, "prompt": "你好世界", "max_tokens": 3})).json()
            for name in (MODEL, "xiaozhi")
        ]
        assert base["system_fingerprint"] != adapted["system_fingerprint"]
        assert base["choices"][0]["text"] != adapted["choices"][0]["text"] and adapted["model"] == "xiaozhi"
        await client.unload_adapter("xiaozhi")


def test_the_tokenizer_of_these_tests_splits_characters() -> None:
    assert len(make_tokenizer().encode("🙂").ids) > 1
