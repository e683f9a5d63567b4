"""The desk of adapters, with a real registry and the fake backend: what is served, what rests, what is refused."""

import errno
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.engine.adapter_checks import AdapterChecks
from server.engine.adapter_desk import AdapterBusy, AdapterDesk, NoRoom, NotYet
from server.engine.adapter_state import StateFile
from server.engine.adapters import AdapterTable
from server.engine.backends.base import AdapterError, RequestRefused
from server.engine.backends.fake import FakeBackend, FakeOptions
from server.errors import ConfigError
from server.store.registry import Registry, RegistryError, UnknownAdapter
from server.text.identity import TextIdentity
from tests.server.engine.adapters import publish

MakeDesk = Callable[..., AdapterDesk]
TURN_END = 7  # the token that the template writes after an answer


@pytest.fixture
def backend(fake_model: Path) -> FakeBackend:
    backend = FakeBackend(FakeOptions(model_path=fake_model, served_name="tiny"))
    backend.load()
    return backend


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "adapters")
    publish(registry, tmp_path / "own", "own")
    publish(registry, tmp_path / "foreign", "foreign", base_hash="0123456789abcdef")
    return registry


@pytest.fixture
def make_desk(backend: FakeBackend, registry: Registry, tmp_path: Path) -> MakeDesk:
    """As a new engine process has it, in the same home; `in_use` are ids that running requests name."""

    def make(max_loaded: int = 8, in_use: set[str] | None = None, max_rank: int | None = None) -> AdapterDesk:
        checks = AdapterChecks(backend.model, TextIdentity("tokenizer", "template", "prompt", TURN_END), max_rank)
        table = AdapterTable(registry, backend.model, checks, StateFile(tmp_path / "state.json"))
        used = in_use if in_use is not None else set()
        desk = AdapterDesk(backend, table, max_loaded, used.__contains__)
        desk.restore()
        return desk

    return make


def ids(desk: AdapterDesk) -> set[str]:
    return {adapter.id for adapter in desk.table.list()}


# --- what is served ---


def test_a_start_serves_what_fits_and_says_what_does_not(make_desk: MakeDesk, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="qloop.engine"):
        desk = make_desk()
    assert [adapter.name for adapter in desk.table.list()] == ["own"]
    assert "adapter foreign@" in caplog.text and "is not served: it was trained on" in caplog.text


def test_a_new_current_revision_takes_the_name_and_the_old_one_stays(
    make_desk: MakeDesk, registry: Registry, tmp_path: Path
) -> None:
    desk = make_desk()
    (old,) = desk.table.list()
    new = publish(registry, tmp_path / "newer", "own", seed=1)
    assert desk.due(["own", "foreign"]) == ["own"]
    assert desk.load("own", None, None).revision == new.revision
    assert {a.revision: a.is_current for a in desk.table.list()} == {old.revision: False, new.revision: True}
    assert desk.table.find("own", None) == desk.table.find("own", new.revision)
    assert desk.due(["own", "foreign"]) == []


def test_integer_ids_are_never_given_twice(make_desk: MakeDesk, registry: Registry, tmp_path: Path) -> None:
    seen = []
    for round_ in range(3):
        desk = make_desk()
        if round_:
            desk.load("own", None, None)
        seen += [adapter.int_id for adapter in desk.table.list()]
        for adapter in desk.hide("own", None):
            desk.release(adapter)
        seen.append(desk.load("own", None, None).int_id)
        for adapter in desk.hide("own", None):
            desk.release(adapter)
    assert len(set(seen)) == len(seen) == 6


def test_a_restart_brings_back_older_revisions_pins_and_what_was_unloaded(
    make_desk: MakeDesk, registry: Registry, tmp_path: Path
) -> None:
    publish(registry, tmp_path / "quiet", "quiet")
    desk = make_desk()
    old = desk.table.find("own", None)
    publish(registry, tmp_path / "newer", "own", seed=1)
    desk.load("own", None, True)
    desk.hide("quiet", None)
    again = make_desk()
    assert ids(again) == ids(desk) and old is not None and old.id in ids(again)
    assert [a.is_pinned for a in again.table.list()] == [a.is_pinned for a in desk.table.list()]
    assert again.due(["own", "quiet"]) == []
    publish(registry, tmp_path / "louder", "quiet", seed=3)
    assert again.due(["own", "quiet"]) == ["quiet"] and "quiet" in {a.name for a in make_desk().table.list()}


def test_a_current_revision_that_cannot_be_served_leaves_the_name_where_it_was(
    make_desk: MakeDesk, registry: Registry, tmp_path: Path
) -> None:
    desk = make_desk()
    good = desk.table.find("own", None)
    bad = publish(registry, tmp_path / "bad", "own", seed=1, base_hash="f" * 64)
    with pytest.raises(AdapterError, match="trained on"):
        desk.load("own", None, None)
    for same in (desk, make_desk()):
        assert same.table.find("own", None) is not None and good is not None
        assert same.table.find("own", None).revision == good.revision  # type: ignore[union-attr]
        assert list(same.refused) and bad.id in same.refused and same.due(["own"]) == []


@pytest.mark.parametrize("text", ["{", "[]", '{"format_version": 9}', '{"served": 3}'])
def test_a_damaged_state_file_costs_only_what_it_alone_knew(make_desk: MakeDesk, tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    assert {adapter.name for adapter in make_desk().table.list()} == {"own"}


def test_a_rollback_while_the_engine_was_down_is_followed_later(
    make_desk: MakeDesk, registry: Registry, tmp_path: Path
) -> None:
    """What was unloaded is forgotten as soon as something newer is served under the name."""
    desk = make_desk()
    (old,) = desk.hide("own", None)
    new = publish(registry, tmp_path / "newer", "own", seed=1)
    again = make_desk()
    assert again.table.find("own", new.revision) is not None and again.table.unloaded == {}
    registry.rollback("own", old.revision)
    assert again.due(["own"]) == ["own"]


def test_a_removed_revision_goes(make_desk: MakeDesk, registry: Registry) -> None:
    desk = make_desk()
    (own,) = desk.table.list()
    assert desk.removed() == []
    shutil.rmtree(registry.path / "own")
    assert desk.removed() == [own] and desk.table.list() == []
    desk.release(own)
    assert own.id not in desk.residents


# --- a disk with faults ---


def lose_sight_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks at it gets an I/O error."""
    look = os.stat

    def stat(file: Any, *args: Any, **options: Any) -> os.stat_result:
        if isinstance(file, (str, Path)) and Path(file) == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return look(file, *args, **options)

    monkeypatch.setattr(os, "stat", stat)


def test_weights_that_cannot_be_read_refuse_only_their_adapter(
    make_desk: MakeDesk, registry: Registry, tmp_path: Path
) -> None:
    publish(registry, tmp_path / "good", "good")
    own = registry.get("own")
    weights = own.path / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to("/proc/self/mem")  # a file whose first byte is an I/O error
    desk = make_desk()
    assert {adapter.name for adapter in desk.table.list()} == {"good"}
    assert "cannot be read" in desk.refused[own.id] and "Input/output error" in desk.refused[own.id]
    with pytest.raises(RegistryError, match="cannot be read"):
        desk.load("own", None, None)


def test_weights_that_go_during_the_check_are_a_refusal(make_desk: MakeDesk, registry: Registry) -> None:
    own = registry.get("own")
    (own.path / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="cannot be read"):
        make_desk().table.checks.check_content(own)


@pytest.mark.parametrize("fault", [OSError(errno.EIO, "Input/output error"), ConfigError("cannot be read")], ids=repr)
def test_a_backend_that_cannot_read_an_adapter_is_a_refusal(
    make_desk: MakeDesk, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    desk = make_desk()
    (own,) = desk.table.list()
    desk.residents.forget(own.id)

    def load_adapter(adapter: object, path: Path) -> None:
        raise fault

    monkeypatch.setattr(backend, "load_adapter", load_adapter)
    with pytest.raises(RequestRefused) as caught:
        desk.want(own.id, 0)
    assert caught.value.code == "invalid_adapter" and "cannot be read" in str(caught.value)
    with pytest.raises(AdapterError, match="cannot be read"):
        desk.load("own", None, None)
    assert "cannot be read" in make_desk().refused[own.id]


def test_a_folder_that_cannot_be_looked_at_is_not_gone(
    make_desk: MakeDesk, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(registry, tmp_path / "good", "good")
    desk = make_desk()
    own = registry.get("own")
    lose_sight_of(own.path, monkeypatch)
    assert desk.removed() == [] and desk.due(["own", "good"]) == []
    with pytest.raises(RegistryError, match="Input/output error"):
        desk.load("own", None, None)
    assert own.id in desk.refused and desk.due(["own"]) == [] and own.id in desk.refused
    assert {adapter.name for adapter in make_desk().table.list()} == {"good"}


def test_an_engine_that_cannot_write_its_state_serves_on(
    make_desk: MakeDesk, registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state.json" / "in the way").mkdir(parents=True)
    desk = make_desk()
    assert desk.load("own", None, True).is_pinned
    assert "cannot be written" in caplog.text and "would forget the latest pins" in caplog.text
    shutil.rmtree(tmp_path / "state.json")
    publish(registry, tmp_path / "good", "good")
    desk.load("good", None, None)  # the next change writes what could not be written then
    assert {adapter.name: adapter.is_pinned for adapter in make_desk().table.list()} == {"own": True, "good": False}


# --- what is refused ---


def refused(desk: AdapterDesk, words: str, name: str = "own") -> None:
    for adapter in desk.table.list():
        desk.hide(adapter.name, adapter.revision)
        desk.release(adapter)
    with pytest.raises(AdapterError, match=words):
        desk.load(name, None, None)
    assert desk.table.find(name, None) is None and any(name in adapter_id for adapter_id in desk.refused)


def test_another_base(make_desk: MakeDesk) -> None:
    refused(make_desk(), r"trained on tiny \(weights 0123456789ab\).*runs tiny \(weights fake\)", "foreign")


def test_a_rank_above_the_limit(make_desk: MakeDesk) -> None:
    refused(make_desk(max_rank=3), r"rank is 4.*at most 3.*QLOOP_MAX_ADAPTER_RANK")


def test_files_changed_in_place(make_desk: MakeDesk, registry: Registry) -> None:
    desk = make_desk()
    path = registry.get("own").path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    refused(desk, "were changed after it was published")


@pytest.mark.parametrize("what", ["tokenizer", "chat template", "default system prompt"])
def test_another_text_side(make_desk: MakeDesk, registry: Registry, tmp_path: Path, what: str) -> None:
    publish(registry, tmp_path / "x", "own", seed=1, **{what.replace(" ", "_") + "_hash": "another"})
    refused(make_desk(), f"trained with another {what}")


def test_the_same_text_side_is_fine(make_desk: MakeDesk, registry: Registry, tmp_path: Path) -> None:
    hashes = {"tokenizer_hash": "tokenizer", "chat_template_hash": "template", "default_system_prompt_hash": "prompt"}
    publish(registry, tmp_path / "x", "own", seed=1, **hashes)
    assert make_desk().table.find("own", None) is not None


def test_stop_tokens_that_would_not_stop(make_desk: MakeDesk, registry: Registry, tmp_path: Path) -> None:
    publish(registry, tmp_path / "x", "own", seed=1, stop_token_ids=(TURN_END, 4321))
    refused(make_desk(), "trained to stop at token 4321, which is no stop token")
    publish(registry, tmp_path / "y", "own", seed=2, stop_token_ids=(TURN_END,))  # the template writes it
    assert make_desk().table.find("own", None) is not None


def test_unknown_ones(make_desk: MakeDesk) -> None:
    desk = make_desk()
    with pytest.raises(UnknownAdapter, match="nobody"):
        desk.load("nobody", None, None)
    with pytest.raises(UnknownAdapter, match="0123456789ab"):
        desk.load("own", "0123456789ab", None)
    with pytest.raises(UnknownAdapter, match="is served"):
        desk.hide("foreign", None)
    assert desk.refused.keys() == {adapter_id for adapter_id in desk.refused if adapter_id.startswith("foreign@")}


# --- slots ---


def more(registry: Registry, tmp_path: Path, count: int) -> list[str]:
    return [publish(registry, tmp_path / f"m{i}", f"m{i}", seed=i).id for i in range(count)]


def test_the_longest_unused_one_makes_room_and_comes_back(
    make_desk: MakeDesk, registry: Registry, tmp_path: Path
) -> None:
    names = more(registry, tmp_path, 3)
    desk = make_desk(max_loaded=2)
    assert set(names) < ids(desk) and len(desk.residents) == 2
    for adapter_id in [*names, *names, names[2], names[1], names[2]]:
        assert desk.want(adapter_id, 0)
    assert set(desk.residents.ids) == {names[1], names[2]}
    assert desk.want(names[0], 0) and set(desk.residents.ids) == {names[0], names[2]}
    assert desk.residents.num_evicted > 3


def test_what_is_not_proven_yet_is_not_served_and_gives_its_slot_away(
    make_desk: MakeDesk, backend: FakeBackend, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = more(registry, tmp_path, 2)
    looks = 0

    def probe(self: FakeBackend, adapter_id: str) -> bool:
        nonlocal looks
        looks += 1
        return looks > 5

    monkeypatch.setattr(FakeBackend, "probe_adapter", probe)
    monkeypatch.setattr("server.engine.residents.AWAITED_S", 0.0)
    desk = make_desk(max_loaded=1)  # the first look, at the start
    assert len(desk.residents) == 1 and {first, second} < ids(desk)
    with pytest.raises(NotYet, match="self-test"):
        desk.load("m0", None, None)
    assert not desk.want(second, 0)  # nobody uses the other: its slot is taken
    assert first not in desk.residents and second not in desk.residents and len(desk.residents) == 1
    assert not desk.want(second, 0) and not desk.want(second, 0) and desk.want(second, 0)
    assert second in desk.residents and desk.load("m0", None, True).is_pinned and first in desk.residents


def test_two_that_are_not_proven_yet_do_not_drive_each_other_out(
    make_desk: MakeDesk, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = make_desk(max_loaded=1)
    first, second = more(registry, tmp_path, 2)
    looks: dict[str, int] = {}

    def probe(self: FakeBackend, adapter_id: str) -> bool:
        looks[adapter_id] = looks.get(adapter_id, 0) + 1
        return looks[adapter_id] > 2

    monkeypatch.setattr(FakeBackend, "probe_adapter", probe)
    for _ in range(2):
        with pytest.raises(NotYet, match="self-test"):
            desk.load("m0", None, None)
        with pytest.raises(NoRoom):
            desk.load("m1", None, None)
    assert desk.load("m0", None, None).id == first
    with pytest.raises(NotYet, match="self-test"):
        desk.load("m1", None, None)
    assert looks == {first: 3, second: 1}


def test_pinned_ones_and_those_in_use_stay(make_desk: MakeDesk, registry: Registry, tmp_path: Path) -> None:
    names = more(registry, tmp_path, 3)
    in_use: set[str] = set()
    desk = make_desk(max_loaded=2, in_use=in_use)
    desk.load("m0", None, True)
    assert desk.want(names[1], 0)
    in_use.add(names[1])
    assert not desk.want(names[2], 0) and set(desk.residents.ids) == {names[0], names[1]}
    with pytest.raises(NoRoom):
        desk.load("m2", None, None)
    assert desk.want(names[1], 0) and not desk.want(names[1], 1)  # it has to make room for one that waits
    assert desk.want(names[0], 1)  # a pinned one never has to
    in_use.clear()
    assert desk.want(names[2], 0)
    desk.load("m2", None, True)
    with pytest.raises(AdapterError, match="QLOOP_MAX_ADAPTERS"):
        desk.load("m1", None, True)
    with pytest.raises(RequestRefused) as caught:
        desk.want(names[1], 0)
    assert caught.value.code == "overloaded"
    desk.load("m2", None, False)
    assert desk.want(names[1], 0)


def test_one_that_was_damaged_while_it_rested_is_refused_by_the_request(
    make_desk: MakeDesk, registry: Registry, tmp_path: Path
) -> None:
    names = more(registry, tmp_path, 2)
    desk = make_desk(max_loaded=1)
    assert desk.want(names[1], 0)
    (registry.get("m0").path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(RequestRefused) as caught:
        desk.want(names[0], 0)
    assert (caught.value.code, caught.value.param) == ("invalid_adapter", "model")
    assert names[0] not in ids(desk) and names[0] in desk.refused and desk.want(names[1], 0)


def test_who_unloads_what_leaves_already_gets_it_named(make_desk: MakeDesk) -> None:
    desk = make_desk()
    (own,) = desk.hide("own", None)
    assert desk.hide("own", None) == desk.hide("own", own.revision) == [own]
    with pytest.raises(UnknownAdapter, match="is served"):
        desk.hide("own", "0" * 12)
    desk.release(own)
    with pytest.raises(UnknownAdapter, match="is served"):
        desk.hide("own", None)


def test_unloading_what_leaves_already_does_not_unload_what_came_after(
    make_desk: MakeDesk, registry: Registry, tmp_path: Path
) -> None:
    desk = make_desk()
    (old,) = desk.hide("own", None)
    new = publish(registry, tmp_path / "newer", "own", seed=1)
    assert desk.load("own", None, None).revision == new.revision
    assert desk.hide("own", old.revision) == [old] and desk.table.unloaded == {}
    assert {adapter.revision for adapter in desk.hide("own", None)} == {old.revision, new.revision}
    assert desk.table.unloaded == {"own": new.revision}


def test_one_that_is_being_unloaded_is_busy(make_desk: MakeDesk) -> None:
    desk = make_desk()
    (own,) = desk.hide("own", None)
    with pytest.raises(AdapterBusy, match="being unloaded"):
        desk.load("own", None, None)
    desk.release(own)
    assert desk.load("own", None, None).id == own.id
