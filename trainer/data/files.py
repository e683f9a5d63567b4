"""Which files are meant, and how their bytes become text. Knows nothing about rows.

Text is decoded with `surrogateescape`: a byte that is wrong in the file's encoding costs one row, not the file.
"""

import codecs
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import TextIO

from server.errors import ConfigError

LEDGER_NAME = "rejects.jsonl"  # what the trainer itself writes about data is no data
SUFFIXES = (".csv", ".json", ".jsonl", ".text", ".tsv", ".txt")
_LIMITED = re.compile(r"(?P<path>.+)#(?P<rows>[0-9]+)")
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Selection:
    """What one path stands for; `limit` is the number of rows to read from all its files together."""

    files: tuple[Path, ...]
    limit: int | None = None


def select(paths: Iterable[str | Path]) -> list[Selection]:
    """Files, folders (every data file below, in order), globs and `path#1000`. Raises ConfigError, naming the path."""
    return [_selection(str(path)) for path in paths]


def open_text(path: Path) -> TextIO:
    """The file as text with its own line ends. Raises ConfigError when it cannot be read."""
    try:
        return path.open(encoding=encoding_of(path), errors="surrogateescape", newline="")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def encoding_of(path: Path) -> str:
    """A byte order mark decides; else UTF-8, unless most lines of the first block beyond ASCII are GB18030 only."""
    try:
        with path.open("rb") as file:
            block = file.read(_BLOCK)
            for mark, encoding in _MARKS:
                if block.startswith(mark):
                    return encoding
            while block and block.isascii():
                block = file.read(_BLOCK)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    return "gb18030" if _looks_chinese_legacy(block) else "utf-8"


def _looks_chinese_legacy(block: bytes) -> bool:
    lines = [line for line in block.split(b"\n") if not line.isascii()]
    legacy = sum(not _decodes(line, "utf-8") and _decodes(line, "gb18030") for line in lines)
    return legacy > sum(_decodes(line, "utf-8") for line in lines)


def _decodes(line: bytes, encoding: str) -> bool:
    """A character cut by the end of the block does not count against the encoding."""
    try:
        codecs.getincrementaldecoder(encoding)().decode(line)
    except UnicodeDecodeError:
        return False
    return True


def _selection(path: str) -> Selection:
    path = str(Path(path).expanduser()) if path.startswith("~") else path
    if Path(path).exists():
        return Selection(_below(Path(path)))
    limited = _LIMITED.fullmatch(path)
    if limited:
        return Selection(_selection(limited["path"]).files, int(limited["rows"]))
    found = [file for match in sorted(glob(path, recursive=True)) for file in _below(Path(match))]
    if not found:
        raise ConfigError(f"{path}: cannot be read (no such file, folder or pattern)")
    return Selection(tuple(dict.fromkeys(found)))


def _below(path: Path) -> tuple[Path, ...]:
    if not path.is_dir():
        return (path,)
    files = sorted(file for file in path.rglob("*") if _is_data(file.relative_to(path)) and file.is_file())
    if not files:
        raise ConfigError(f"{path}: holds no data file ({', '.join(SUFFIXES)})")
    return tuple(files)


def _is_data(path: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not is_hidden and not path.name.endswith(LEDGER_NAME)


def names_of(selections: Sequence[Selection]) -> list[Path]:
    """Every file once, in reading order."""
    return list(dict.fromkeys(file for selection in selections for file in selection.files))
