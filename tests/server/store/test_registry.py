import errno
import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from server.store.card import CARD_NAME, AdapterCard
from server.store.hashes import folder_hash
from server.store.registry import Registry, RegistryError
from tests.server.store.safetensors_files import write_adapter


def card(**facts: Any) -> AdapterCard:
    defaults: dict[str, Any] = dict.fromkeys(
        ("base_weights_hash", "tokenizer_hash", "chat_template_hash", "default_system_prompt_hash"), "0" * 64
    )
    return AdapterCard(
        **defaults | {"base_model": "base", "stop_token_ids": (1, 2), "method": "lora", "rank": 8} | facts
    )


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "adapters")


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_publish_copies_and_points_the_name_at_it(registry: Registry, tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "run")
    entry = registry.publish(source, "xiaozhi", card(scores={"bleu": 0.5}))
    assert entry.path == registry.path / "xiaozhi" / entry.revision
    assert entry.is_current and entry.id == f"xiaozhi@{entry.revision}"
    assert (entry.card.name, entry.card.revision, entry.card.scores) == ("xiaozhi", entry.revision, {"bleu": 0.5})
    assert entry.card.created > 0 and entry.card.stop_token_ids == (1, 2)
    assert (registry.path / "xiaozhi" / "current").read_text() == entry.revision + "\n"
    assert sorted(p.name for p in entry.path.iterdir()) == [
        "adapter_card.json", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert registry.get("xiaozhi") == entry and registry.entries() == [entry]


def test_publishing_the_same_content_again_changes_nothing(registry: Registry, tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "run")
    entry = registry.publish(source, "a", card(run_id="one"))
    before = files_of(entry.path)
    assert registry.publish(source, "a", card(run_id="two")) == entry
    assert files_of(entry.path) == before


def _flip(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")


def _folder_for_weights(folder: Path) -> None:
    _no_weights(folder)
    (folder / "adapter_model.safetensors").mkdir()


def _card_too(folder: Path) -> None:
    _flip(folder)
    (folder / CARD_NAME).write_text("{")


def test_publishing_the_original_again_mends_a_damaged_revision(registry: Registry, tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "run")
    good = registry.publish(source, "a", card(run_id="one", gate="passed"))
    newer = registry.publish(write_adapter(tmp_path / "2", b"\1" * 16), "a", card())
    for damage in (_flip, _no_weights, _foreign_config, _unreadable, _folder_for_weights):
        damage(good.path)
        mended = registry.publish(source, "a", card(run_id="two"), make_current=False)
        assert mended.card == good.card and folder_hash(good.path) == good.revision, damage.__name__
    assert registry.current("a") == newer.revision
    _card_too(good.path)
    assert registry.publish(source, "a", card(run_id="two"), make_current=False).card.run_id == "two"
    assert [path.name for path in registry.path.iterdir() if path.name.startswith(".aside")] == []


def test_a_revision_is_on_the_disk_before_it_is_there(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[int] = set()
    before: dict[str, set[int]] = {}
    flush, rename = os.fsync, os.replace

    def fsync(handle: int) -> None:
        flush(handle)
        flushed.add(os.fstat(handle).st_ino)

    def replace(source: Path, target: Path) -> None:
        before[Path(target).name] = set(flushed)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    entry = registry.publish(write_adapter(tmp_path / "run"), "a", card())
    assert {file.stat().st_ino for file in entry.path.iterdir()} <= before[entry.revision]


def test_a_full_disk_refuses_the_adapter_and_leaves_no_trace(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_adapter(tmp_path / "run")

    def copyfile(*paths: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    with pytest.raises(RegistryError, match=r"cannot be copied into the registry .*No space left"):
        registry.publish(source, "a", card())
    assert registry.entries() == [] and list(registry.path.glob(".aside*")) == []


def test_a_new_revision_moves_current_and_keeps_the_old_one(registry: Registry, tmp_path: Path) -> None:
    first = registry.publish(write_adapter(tmp_path / "1"), "a", card())
    before = files_of(first.path)
    second = registry.publish(write_adapter(tmp_path / "2", b"\1" * 16), "a", card())
    assert second.revision != first.revision and registry.current("a") == second.revision
    assert files_of(first.path) == before and not registry.get("a", first.revision).is_current

    assert registry.promote("a", first.revision).is_current
    assert registry.get("a").revision == first.revision
    with pytest.raises(RegistryError, match="no revision"):
        registry.promote("a", "0" * 12)


@pytest.mark.parametrize("name", ["", "../a", "a/b", "..", "a@b", "小智"])
def test_unusable_names_never_touch_the_disk(registry: Registry, tmp_path: Path, name: str) -> None:
    source = write_adapter(tmp_path / "run")
    for call in (
        lambda: registry.publish(source, name, card()),
        lambda: registry.get(name),
        lambda: registry.remove(name),
    ):
        with pytest.raises(RegistryError, match="not a usable name"):
            call()
    assert not registry.path.exists()
    with pytest.raises(RegistryError, match="not a revision"):
        registry.get("a", "../../etc")


def _no_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def _pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _truncated(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _unreadable(folder: Path) -> None:
    """A file whose first byte is an I/O error."""
    _no_weights(folder)
    (folder / "adapter_model.safetensors").symlink_to("/proc/self/mem")


def _no_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def _foreign_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def _no_tensors(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_weights, "not a trained adapter"),
        (_pickled, "pickled weights are refused"),
        (_truncated, "truncated"),
        (_unreadable, r"cannot be read \(.*Input/output error"),
        (_no_config, r"adapter_config\.json: cannot be read"),
        (_foreign_config, "not a PEFT adapter"),
        (_no_tensors, "holds no tensors"),
    ],
)
def test_a_bad_folder_is_refused_and_leaves_no_trace(
    registry: Registry, tmp_path: Path, damage: Any, message: str
) -> None:
    source = write_adapter(tmp_path / "run")
    damage(source)
    with pytest.raises(RegistryError, match=message):
        registry.publish(source, "a", card())
    assert registry.entries() == [] and registry.current("a") is None
    with pytest.raises(RegistryError, match="no such folder"):
        registry.publish(tmp_path / "missing", "a", card())


def test_torn_folders_are_ignored_then_cleaned(registry: Registry, tmp_path: Path) -> None:
    torn = write_adapter(registry.path / ".aside-torn")
    half = write_adapter(registry.path / "a" / ("0" * 12))  # no card
    assert registry.entries() == []
    with pytest.raises(RegistryError, match=CARD_NAME):
        registry.get("a", "0" * 12)
    registry.publish(write_adapter(tmp_path / "run"), "b", card())
    assert not torn.exists() and half.exists()
    assert [path.name for path in registry.path.iterdir() if path.name.startswith(".aside")] == []


@pytest.mark.parametrize("change", [{"format_version": 99}, {"rank": "8"}, {"stop_token_ids": ["x"]}, {"scores": []}])
def test_a_card_that_cannot_be_trusted_is_named(registry: Registry, tmp_path: Path, change: dict[str, Any]) -> None:
    entry = registry.publish(write_adapter(tmp_path / "run"), "a", card())
    path = entry.path / CARD_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RegistryError, match=rf"{CARD_NAME}.*{next(iter(change))}"):
        registry.get("a")


def test_a_link_out_of_the_registry_is_not_followed(registry: Registry, tmp_path: Path) -> None:
    entry = registry.publish(write_adapter(tmp_path / "run"), "a", card())
    outside = tmp_path / "outside"
    entry.path.rename(outside)
    entry.path.symlink_to(outside)
    with pytest.raises(RegistryError, match="leads out of the registry"):
        registry.get("a")
    assert registry.entries() == []


@pytest.mark.parametrize("content", [b"", b"latest\n", b"\xff", b"../../../etc"])
def test_a_damaged_current_file_is_mended_by_promote(registry: Registry, tmp_path: Path, content: bytes) -> None:
    entry = registry.publish(write_adapter(tmp_path / "run"), "a", card())
    (registry.path / "a" / "current").write_bytes(content)
    with pytest.raises(RegistryError, match="no adapter 'a'"):
        registry.get("a")
    assert [found.is_current for found in registry.entries()] == [False]
    registry.promote("a", entry.revision)
    assert registry.get("a") == entry


def test_remove_takes_old_revisions_or_whole_names(registry: Registry, tmp_path: Path) -> None:
    old = registry.publish(write_adapter(tmp_path / "1"), "a", card())
    new = registry.publish(write_adapter(tmp_path / "2", b"\1" * 16), "a", card())
    with pytest.raises(RegistryError, match="is current"):
        registry.remove("a", new.revision)
    registry.remove("a", old.revision)
    assert [entry.revision for entry in registry.entries()] == [new.revision]
    registry.remove("a")
    assert registry.entries() == [] and not (registry.path / "a").exists()
    with pytest.raises(RegistryError, match="no adapter"):
        registry.remove("a")


def _publish_many(adapters: Path, sources: list[Path]) -> None:
    for source in sources:
        Registry(adapters).publish(source, "a", card())


def test_concurrent_publishers_lose_nothing(registry: Registry, tmp_path: Path) -> None:
    sources = [write_adapter(tmp_path / str(n), bytes([n]) * 16) for n in range(6)]
    context = multiprocessing.get_context("spawn")
    orders = [sources, sources[::-1], sources[3:] + sources[:3]]
    writers = [context.Process(target=_publish_many, args=(registry.path, order)) for order in orders]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    entries = registry.entries()
    assert len(entries) == 6 and sum(entry.is_current for entry in entries) == 1
