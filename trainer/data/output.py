"""Where the rows of a data command go: a JSONL file that appears whole or not at all, its ledger, and the progress bar.

Knows nothing about what is done with the rows.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from tqdm import tqdm

from server.errors import ConfigError
from trainer.data.files import names_of, select
from trainer.data.rows import Row
from trainer.data.texts import to_line

Item = TypeVar("Item")


class RowFile:
    """Rows as JSONL, written aside and renamed when the block ends well; an error leaves what was there before."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_rows = 0
        self._aside = path.with_name(f".{path.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._aside.open("w", encoding="utf-8", newline="\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if error is None:
            os.replace(self._aside, self.path)
        else:
            self._aside.unlink(missing_ok=True)

    def write(self, row: Row) -> None:
        self._file.write(to_line(row))
        self.num_rows += 1


def ledger_path(output: Path) -> Path:
    """`clean.jsonl` has its ledger in `clean.rejects.jsonl`."""
    return output.with_name(f"{output.stem}.rejects.jsonl")


def check_output(output: Path, inputs: Sequence[str | Path]) -> None:
    """Raises ConfigError when writing `output` or its ledger would destroy an input, or cannot be done."""
    check_writable("--output", inputs, output, ledger_path(output))


def check_writable(option: str, inputs: Sequence[str | Path], *paths: Path) -> None:
    """Raises ConfigError when one of the files to write is a folder or an input."""
    read = {file.resolve() for file in names_of(select(inputs))}
    for path in paths:
        if path.is_dir():
            raise ConfigError(f"{option} {path}: is a folder; name a file")
        if path.resolve() in read:
            raise ConfigError(f"{option} {path}: would overwrite the input {path}; name another file")


def progress(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """`items` with a bar on stderr, if that is a terminal."""
    yield from tqdm(items, desc=what, total=total, unit=" rows", disable=None, mininterval=0.5)
