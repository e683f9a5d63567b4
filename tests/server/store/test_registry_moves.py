"""What a name meant before, imports that do not move it, and the look that sees every change."""

from pathlib import Path

import pytest

from server.store.registry import Moved, Registry, UnknownAdapter
from server.store.registry_watch import PublishedName, RegistryWatch
from tests.server.store.safetensors_files import write_adapter
from tests.server.store.test_registry import card


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "adapters")


@pytest.fixture
def revisions(registry: Registry, tmp_path: Path) -> list[str]:
    """Three of the name "a", the last one current."""
    folders = [write_adapter(tmp_path / str(i), bytes([i]) * 16) for i in range(3)]
    return [registry.publish(folder, "a", card()).revision for folder in folders]


def back(registry: Registry) -> str:
    return registry.rollback("a", registry.previous("a").revision).revision


def test_going_back_twice_goes_two_steps(registry: Registry, revisions: list[str]) -> None:
    assert [back(registry), registry.current("a")] == [revisions[1]] * 2
    assert [back(registry), registry.current("a")] == [revisions[0]] * 2
    with pytest.raises(UnknownAdapter, match="no earlier revision"):
        registry.previous("a")
    registry.promote("a", revisions[2])
    assert back(registry) == revisions[0]


def test_a_promotion_can_be_taken_back(registry: Registry, revisions: list[str]) -> None:
    registry.promote("a", revisions[0])
    registry.promote("a", revisions[0])  # twice is once
    assert [back(registry), back(registry), back(registry)] == [revisions[2], revisions[1], revisions[0]]


def test_removed_revisions_are_passed_over(registry: Registry, revisions: list[str]) -> None:
    registry.remove("a", revisions[1])
    assert back(registry) == revisions[0]


def test_a_rollback_that_somebody_overtook_is_refused(registry: Registry, revisions: list[str]) -> None:
    for wanted in (revisions[1], revisions[0]):  # after the last one there is nothing left to go back to
        assert registry.rollback("a", wanted).revision == wanted
        with pytest.raises(Moved, match="somebody else"):
            registry.rollback("a", wanted)
        assert registry.current("a") == wanted


def test_unknown_names_and_damaged_histories(registry: Registry, revisions: list[str]) -> None:
    with pytest.raises(UnknownAdapter, match="nobody"):
        registry.previous("nobody")
    (registry.path / "a" / "history").write_text("../../etc\n")
    with pytest.raises(UnknownAdapter, match="no earlier"):
        registry.previous("a")
    registry.promote("a", revisions[0])
    assert back(registry) == revisions[2]


def test_a_quiet_publish_moves_nothing_and_its_removal_leaves_nothing(registry: Registry, tmp_path: Path) -> None:
    entry = registry.publish(write_adapter(tmp_path / "run"), "new", card(), make_current=False)
    assert registry.current("new") is None and not entry.is_current
    assert registry.get("new", entry.revision) == entry and registry.entries() == [entry]
    assert registry.revisions("new") == {entry.revision}
    registry.remove("new", entry.revision)
    assert not (registry.path / "new").exists()


def test_the_watch_sees_every_change(registry: Registry, tmp_path: Path) -> None:
    watch = RegistryWatch(registry.path)
    assert watch.look() == {}
    first = registry.publish(write_adapter(tmp_path / "1"), "a", card()).revision
    assert watch.look() == {"a": PublishedName(first, frozenset({first}))}
    second = registry.publish(write_adapter(tmp_path / "2", b"\1" * 16), "a", card()).revision
    assert watch.look() == {"a": PublishedName(second, frozenset({first, second}))}
    registry.promote("a", first)
    assert watch.look()["a"].current == first
    registry.remove("a", second)
    assert watch.look() == {"a": PublishedName(first, frozenset({first}))}
    (registry.path / "a" / "current").write_text("damaged")
    assert watch.look()["a"].current is None
    registry.remove("a")
    assert watch.look() == {}


def test_the_watch_reads_an_old_folder_only_once(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.publish(write_adapter(tmp_path / "1"), "a", card())
    monkeypatch.setattr("server.store.registry_watch.YOUNG_S", -1e9)
    watch = RegistryWatch(registry.path)
    before = watch.look()
    (registry.path / "a" / "current").write_bytes(b"changed without touching the folder")
    assert watch.look() == before
