"""LLaMA-Factory's way to name data: `dataset` holds names, `dataset_dir/dataset_info.json` their files."""

import json
from pathlib import Path
from typing import Any

from server.errors import ConfigError

DEFAULT_FOLDER = "data"
INFO = "dataset_info.json"
ENDINGS = ("", ".json", ".jsonl", ".csv", ".txt")


def dataset_files(names: tuple[str, ...], folder: str | None) -> tuple[str, ...]:
    """The files of `names`; a name that is a file itself stays. Raises ConfigError for an entry that has no file."""
    place = Path(folder or DEFAULT_FOLDER)
    info = _read_info(place / INFO)
    return tuple(_file_of(name, place, info, named=folder is not None) for name in names)


def _file_of(name: str, place: Path, info: dict[str, Any], *, named: bool) -> str:
    entry = info.get(name)
    if isinstance(entry, dict):
        if isinstance(entry.get("file_name"), str):
            return str(place / entry["file_name"])
        raise ConfigError(f"{place / INFO}: {name} has no file_name; download its data and name the file")
    if not named or Path(name).is_absolute() or any(sign in name for sign in "*?[#"):
        return name
    for ending in ENDINGS:
        if (place / (name + ending)).exists():
            return str(place / (name + ending))
    return name if Path(name).exists() else str(place / name)


def _read_info(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be parsed ({error})") from None
    return value if isinstance(value, dict) else {}
