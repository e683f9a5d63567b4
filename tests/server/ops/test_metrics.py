"""`/metrics` over two workers: one scrape counts the whole service, exactly."""

import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.conftest import StartService
from tests.services import MODEL, Service, wait_until

PROMPT = "你好"


@pytest.fixture(scope="module")
def counted(start_session_service: StartService) -> Service:
    return start_session_service(workers=2)


def sum_of(text: str, name: str, **labels: str) -> float:
    total = 0.0
    for given, value in re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE):
        if all(f'{key}="{wanted}"' in given for key, wanted in labels.items()):
            total += float(value)
    return total


def test_counts_are_exact_over_all_workers(counted: Service) -> None:
    before = httpx.get(counted.url + "/metrics").text
    bodies = [{"prompt": PROMPT, "max_tokens": 3, "ignore_eos": True, "stream": bool(i % 2)} for i in range(100)]

    def ask(body: dict[str, object]) -> int:
        return httpx.post(counted.url + "/v1/completions", json=body).status_code  # a new connection every time

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, bodies)) == {200}
        assert set(pool.map(ask, [{"prompt": ""}] * 20)) == {400}
    wait_until(lambda: _answers(counted) - sum_of(before, "qloop_answers_total") == 100, 5, "100 answers counted")
    after = httpx.get(counted.url + "/metrics").text

    def grown(name: str, **labels: str) -> float:
        return sum_of(after, name, **labels) - sum_of(before, name, **labels)

    assert grown("qloop_http_requests_total", method="POST") == 120
    assert grown("qloop_http_requests_total", route="/v1/completions", code="200") == 100
    assert grown("qloop_http_requests_total", route="/v1/completions", code="400") == 20
    assert grown("qloop_answers_total", endpoint="completions", model=MODEL, outcome="ok") == 100
    assert grown("qloop_generated_tokens_total", model=MODEL) == 300
    num_prompt = httpx.post(counted.url + "/tokenize", json={"prompt": PROMPT}).json()["count"]
    assert grown("qloop_prompt_tokens_total", model=MODEL) == 100 * num_prompt
    assert grown("qloop_answer_seconds_count", model=MODEL) == 100
    assert grown("qloop_time_to_first_token_seconds_count", model=MODEL) == 100
    served_by = set(re.findall(r"\[(\d+)\] qloop.access: POST /v1/completions", counted.log))
    assert len(served_by) == 2, "both workers had a share in this"


def _answers(service: Service) -> float:
    return sum_of(httpx.get(service.url + "/metrics").text, "qloop_answers_total")


def test_gauges_return_to_zero(counted: Service) -> None:
    httpx.post(counted.url + "/v1/completions", json={"prompt": PROMPT})
    for name in ("running", "waiting"):
        wait_until(lambda name=name: counted.gauge(f"qloop_sequences_{name}") == 0, 5, f"nothing {name}")  # type: ignore[misc]
    wait_until(lambda: counted.gauge("qloop_kv_tokens_used") == 0, 5, "no memory in use")
    assert counted.gauge("qloop_engine_ready") == 1 and counted.gauge("qloop_kv_tokens_total") > 0


def test_labels_stay_bounded(counted: Service) -> None:
    for i in range(5):
        httpx.get(f"{counted.url}/made-up-{i}")
        httpx.get(f"{counted.url}/v1/models/made-up-{i}")
        httpx.post(counted.url + "/v1/completions", json={"prompt": PROMPT, "model": f"made-up-{i}"})
    response = httpx.get(counted.url + "/metrics")
    assert "made-up" not in response.text
    assert response.headers["content-type"].startswith("text/plain")
