"""Rows on disk, for what must see all rows before it can write the first: memory holds 24 bytes per row.

Knows nothing about duplicates, labels or output files.
"""

import json
import tempfile
from array import array
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from trainer.data.rows import Row


class Spool:
    """Rows in the order of their coming, in an unnamed file that goes with this object."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="qloop-rows-")  # noqa: SIM115  # closed by __exit__
        self._offsets = array("q", [0])
        self._sources: dict[str, int] = {}
        self._names: list[str] = []
        self._source_ids = array("q")
        self._lines = array("q")

    def __enter__(self) -> "Spool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, row: Row) -> int:
        """Keep a row; its number, counted from 0."""
        self._file.seek(self._offsets[-1])
        kept = [row.messages, row.text, row.chosen, row.rejected, row.tools, dict(row.extra)]
        size = self._file.write(json.dumps(kept, ensure_ascii=True).encode())
        self._offsets.append(self._offsets[-1] + size)
        if row.source not in self._sources:
            self._sources[row.source] = len(self._names)
            self._names.append(row.source)
        self._source_ids.append(self._sources[row.source])
        self._lines.append(row.line)
        return len(self) - 1

    def __getitem__(self, number: int) -> Row:
        start, end = self._offsets[number], self._offsets[number + 1]
        self._file.seek(start)
        return self._row(number, json.loads(self._file.read(end - start)))

    def __iter__(self) -> Iterator[Row]:
        return (self[number] for number in range(len(self)))

    def place(self, number: int) -> tuple[str, int]:
        """Source and line of a row, without reading it."""
        return self._names[self._source_ids[number]], self._lines[number]

    def _row(self, number: int, kept: list[Any]) -> Row:
        messages, text, chosen, rejected, tools, extra = kept
        source, line = self.place(number)
        return Row(source, line, tuple(messages), text, chosen, rejected, tools, extra=extra)
