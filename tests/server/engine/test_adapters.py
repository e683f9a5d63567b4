"""The table of loaded adapters, with a real registry and the fake backend."""

import logging
from pathlib import Path

import pytest

from server.engine.adapters import AdapterTable
from server.engine.backends.base import AdapterError
from server.engine.backends.fake import FakeBackend, FakeOptions
from server.store.registry import Registry, RegistryError
from tests.server.engine.adapters import publish


@pytest.fixture
def backend(fake_model: Path) -> FakeBackend:
    return FakeBackend(FakeOptions(model_path=fake_model, served_name="tiny"))


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "adapters")
    publish(registry, tmp_path / "own", "own")
    publish(registry, tmp_path / "foreign", "foreign", base_hash="0123456789abcdef")
    return registry


def test_an_adapter_of_another_base_is_refused_with_both_names(backend: FakeBackend, registry: Registry) -> None:
    table = AdapterTable(registry, backend.load())
    with pytest.raises(AdapterError, match=r"trained on tiny \(weights 0123456789ab\).*runs tiny \(weights fake\)"):
        table.load(backend, "foreign", None)
    assert table.list() == []


def test_a_start_serves_what_fits_and_says_what_does_not(
    backend: FakeBackend, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    table = AdapterTable(registry, backend.load())
    with caplog.at_level(logging.WARNING, logger="qloop.engine"):
        table.load_current(backend)
    assert [adapter.name for adapter in table.list()] == ["own"]
    assert "adapter foreign@" in caplog.text and "is not served: it was trained on" in caplog.text


def test_a_new_current_revision_takes_the_name_and_the_old_one_stays(
    backend: FakeBackend, registry: Registry, tmp_path: Path
) -> None:
    table = AdapterTable(registry, backend.load())
    old = table.load(backend, "own", None)
    new = publish(registry, tmp_path / "newer", "own", seed=1)
    assert table.load(backend, "own", None).revision == new.revision
    assert {a.revision: a.is_current for a in table.list()} == {old.revision: False, new.revision: True}
    assert table.find("own", None) == table.find("own", new.revision)
    assert table.version == 2


def test_an_unknown_adapter(backend: FakeBackend, registry: Registry) -> None:
    table = AdapterTable(registry, backend.load())
    with pytest.raises(RegistryError, match="nobody"):
        table.load(backend, "nobody", None)
