import json
import os
from pathlib import Path

import pytest

from server.errors import ConfigError
from server.store.hashes import folder_hash, weights_hash, write_json
from tests.server.store.safetensors_files import write_adapter, write_model, write_safetensors


def test_weights_hash_follows_weights_and_architecture_only(tmp_path: Path) -> None:
    first = weights_hash(write_model(tmp_path / "a", hidden_size=8))
    assert weights_hash(write_model(tmp_path / "b", hidden_size=8, transformers_version="9", use_cache=False)) == first
    assert weights_hash(write_model(tmp_path / "c", hidden_size=16)) != first
    assert weights_hash(write_model(tmp_path / "d", b"\1" * 16, hidden_size=8)) != first


def test_weights_hash_sees_which_file_holds_what(tmp_path: Path) -> None:
    one, two = write_model(tmp_path / "one"), write_model(tmp_path / "two")
    (two / "model.safetensors").rename(two / "other.safetensors")
    assert weights_hash(one) != weights_hash(two)


def test_a_cached_hash_is_used_until_the_file_changes(tmp_path: Path) -> None:
    model, cache = write_model(tmp_path / "m"), tmp_path / "cache" / "hashes.json"
    true_hash = weights_hash(model, cache_path=cache)
    entries = json.loads(cache.read_text())
    assert len(entries) == 1

    write_json(cache, dict.fromkeys(entries, "0" * 64))  # a remembered value, so that its use can be seen
    assert weights_hash(model, cache_path=cache) != true_hash

    file = model / "model.safetensors"
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 1))
    assert weights_hash(model, cache_path=cache) == true_hash


@pytest.mark.parametrize("content", ["", "{", "[]", "\0", '{"a": 1}'])
def test_a_broken_cache_is_only_slower(tmp_path: Path, content: str) -> None:
    model, cache = write_model(tmp_path / "m"), tmp_path / "hashes.json"
    cache.write_text(content)
    assert weights_hash(model, cache_path=cache) == weights_hash(model)


def test_a_cache_that_cannot_be_written_is_only_slower(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert weights_hash(model, cache_path=blocked / "hashes.json") == weights_hash(model)


def test_a_folder_without_weights_or_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="safetensors"):
        weights_hash(tmp_path)
    write_safetensors(tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"config\.json"):
        weights_hash(tmp_path)


def test_a_revision_is_twelve_hex_digits_of_the_content(tmp_path: Path) -> None:
    one, same = write_adapter(tmp_path / "one"), write_adapter(tmp_path / "same")
    (same / "notes.txt").write_text("not part of the revision")
    other = write_adapter(tmp_path / "other", b"\1" * 16)
    assert folder_hash(one) == folder_hash(same) != folder_hash(other)
    assert len(folder_hash(one)) == 12 and int(folder_hash(one), 16) >= 0


def test_written_json_leaves_nothing_aside(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "x.json", {"名": "小智"})
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.json"]
    assert json.loads((tmp_path / "new" / "x.json").read_text(encoding="utf-8")) == {"名": "小智"}
