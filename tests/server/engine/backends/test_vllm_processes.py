"""The service on the real vLLM, as processes: what it shows, and that nothing of it is left behind."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.server.engine.backends.vllm_setup import TINY_SETTINGS, VLLM, write_model_for_vllm
from tests.services import MODEL, Service, wait_until

pytestmark = VLLM

GONE_S = 10.0
Start = Callable[[int], Service]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_for_vllm(tmp_path_factory.mktemp("model"))


@pytest.fixture
def start(model_folder: Path) -> Iterator[Start]:
    started: list[Service] = []

    def make(workers: int) -> Service:
        service = Service(model_folder, workers, engine="vllm", **TINY_SETTINGS)
        started.append(service)
        return service.wait_ready()

    yield make
    for service in started:
        service.stop()


def family(service: Service) -> list[psutil.Process]:
    children = psutil.Process(service.engine.pid).children(recursive=True)
    assert {"VLLM::EngineCore", "VLLM::Worker"} <= {child.name() for child in children}
    return children


def all_gone(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def test_an_answer_metrics_and_a_clean_end(start: Start) -> None:
    service = start(2)
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 5, "ignore_eos": True}
    answer = httpx.post(service.url + "/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 5
    assert service.gauge("vllm:generation_tokens_total") >= 5
    assert service.gauge("vllm:time_to_first_token_seconds_count") >= 1
    processes = family(service)
    service.engine.send_signal(signal.SIGTERM)
    assert service.engine.wait(60) == 0, service.log
    wait_until(lambda: all_gone(processes), GONE_S, "the end of vLLM's processes")


def test_a_killed_engine_leaves_no_process_of_vllms(start: Start) -> None:
    service = start(0)
    processes = family(service)
    service.engine.kill()
    wait_until(lambda: all_gone(processes), GONE_S, "the end of vLLM's processes")


def test_a_dead_engine_core_ends_the_engine_which_says_so(start: Start) -> None:
    service = start(0)
    processes = family(service)
    next(process for process in processes if process.name() == "VLLM::EngineCore").kill()
    assert service.engine.wait(60) == 1
    assert "vLLM's engine core died" in service.log
    wait_until(lambda: all_gone(processes), GONE_S, "the end of vLLM's processes")
