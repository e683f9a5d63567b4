"""Services and model folders that many tests share: made once per test process, gone with it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.models import write_fake_model
from tests.services import Service

StartService = Callable[..., Service]

# The same examples in every run: a failure in somebody's change is that change's.
hypothesis.settings.register_profile("qloop", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("qloop")


@pytest.fixture(scope="session")
def fake_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_model(tmp_path_factory.mktemp("fake") / "tiny")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 with weights, for engines that compute. Copy it before you change it."""
    from tests.server.engine.backends.folders import write_model  # torch: only where it is needed

    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def adapter_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on every linear map of that model; it visibly changes the text."""
    from tests.server.engine.backends.folders import write_adapter

    return write_adapter(tmp_path_factory.mktemp("adapter"), model_folder)


@pytest.fixture(scope="session")
def start_session_service(fake_model: Path) -> Iterator[StartService]:
    yield from _factory(fake_model)


@pytest.fixture
def start_service(fake_model: Path) -> Iterator[StartService]:
    """A function that starts a service with settings of the test's own; stopped after the test."""
    yield from _factory(fake_model)


@pytest.fixture(scope="session")
def service(start_session_service: StartService) -> Service:
    """Two workers, no keys, as fast as it goes."""
    return start_session_service(workers=2, max_body_mib=1)


@pytest.fixture(scope="session")
def slow_service(start_session_service: StartService) -> Service:
    """Two workers; 50 tokens a second and sequence, 4 of them at once, 4 waiting."""
    return start_session_service(workers=2, fake_tokens_per_s=50, max_num_seqs=4, max_queue=4)


def _factory(model_folder: Path) -> Iterator[StartService]:
    started: list[Service] = []

    def start(workers: int = 1, **settings: object) -> Service:
        started.append(Service(model_folder, workers, **settings))
        return started[-1].wait_ready()

    yield start
    for one in started:
        one.stop()
