"""Services with the fake engine at a set pace: these tests are about processes, not about tokens."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.service import Supervised, running
from tests.models import write_fake_model
from tests.services import ROOT

Serve = Callable[..., Supervised]


@pytest.fixture(scope="session")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a context that a stream does not fill while a test looks at it."""
    return write_fake_model(tmp_path_factory.mktemp("fake") / "long", context=8192)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the code that a test may break."""
    target = tmp_path / "tree"
    for name in ("server", "webchat"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "gunicorn.conf.py", target)
    return target


@pytest.fixture
def serve(tmp_path: Path, long_model: Path) -> Iterator[Serve]:
    """Start a service; it and all its processes are gone when the test ends."""

    with contextlib.ExitStack() as stack:

        def start(tree: Path = ROOT, **settings: str) -> Supervised:
            home = tmp_path / "home"
            home.mkdir(exist_ok=True)
            defaults = {"QLOOP_MODEL": str(long_model), "QLOOP_ENGINE": "fake", "QLOOP_FAKE_TOKENS_PER_S": "50"}
            return stack.enter_context(running(Supervised(home, tree, defaults | settings)))

        yield start
