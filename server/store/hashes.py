"""Content hashes of files and folders, with a cache so that a large model is read once.

The cache is keyed by absolute path, size and modification time; losing it only costs time.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from server.errors import ConfigError

REVISION_LENGTH = 12
REVISION_FILES = ("adapter_config.json", "adapter_model.safetensors")
# Bookkeeping that changes when another library version saves the same model.
_INERT_CONFIG_KEYS = frozenset(
    {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
)


def file_hash(path: Path) -> str:
    """sha256 of the file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_hash(text: str) -> str:
    """sha256 of the text's UTF-8 bytes, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def folder_hash(
    folder: Path, names: Sequence[str] = REVISION_FILES, *, hash_file: Callable[[Path], str] = file_hash
) -> str:
    """The revision that names this content: 12 hex digits over the named files' names and bytes."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\0{hash_file(folder / name)}\n".encode())
    return digest.hexdigest()[:REVISION_LENGTH]


def weights_hash(folder: Path, *, cache_path: Path | None = None) -> str:
    """sha256 over a model folder's safetensors files and the architecture in its config.json.

    `cache_path` is a JSON file that remembers each file's hash (`Home.hash_cache`); None reads every byte again.
    Raises ConfigError when the folder holds no safetensors file or no readable config.json.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder}: no *.safetensors file; a model folder with safetensors weights is needed")
    cache = HashCache(cache_path)
    digest = hashlib.sha256(_architecture(folder).encode())
    for file in files:
        digest.update(f"{file.name}\0{cache.file_hash(file)}\n".encode())
    cache.save()
    return digest.hexdigest()


class HashCache:
    """File hashes remembered in one JSON file; a missing, broken or read-only cache is only slower."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._entries = _read_entries(path)
        self._added: dict[str, str] = {}

    def file_hash(self, file: Path) -> str:
        status = file.stat()
        key = f"{file.resolve()}:{status.st_size}:{status.st_mtime_ns}"
        known = self._entries.get(key)
        if known is None:
            known = self._added[key] = self._entries[key] = file_hash(file)
        return known

    def save(self) -> None:
        """Merge what this process learned into the file, written aside and renamed."""
        if self._path is None or not self._added:
            return
        try:
            write_json(self._path, {**_read_entries(self._path), **self._added})
        except OSError:
            return
        self._added.clear()


def write_json(path: Path, value: Any) -> None:
    """Write JSON aside in the same folder, then rename, so that a reader never sees half a file."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text aside in the same folder, flush it to disk, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _read_entries(path: Path | None) -> dict[str, str]:
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in value.items() if isinstance(v, str)} if isinstance(value, dict) else {}


def _architecture(folder: Path) -> str:
    try:
        config: Mapping[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / 'config.json'}: cannot be read as JSON ({error})") from None
    kept = {key: value for key, value in config.items() if key not in _INERT_CONFIG_KEYS}
    return json.dumps(kept, sort_keys=True)
