"""What became of every row: a JSON line for each that was dropped, changed or is worth a look; counts for the screen.

Never holds a row's text.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from trainer.data.files import LEDGER_NAME
from trainer.data.rows import Action, LedgerLine, Row
from trainer.errors import DataError

FILE_NAME = LEDGER_NAME
_ACTIONS: tuple[Action, ...] = ("dropped", "repaired", "shortened", "kept")
_SHOWN = 3  # dropped rows that are named on the screen


class Ledger:
    """Counts rows by what happened to them; writes each line at once when it has a path."""

    def __init__(self, path: Path | None = None) -> None:
        self.num_rows = 0  # rows read, used or not
        self.rows: Counter[Action] = Counter()  # rows by action
        self.codes: Counter[tuple[Action, str]] = Counter()
        self.first_dropped: list[LedgerLine] = []
        self._closing = ExitStack()
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._closing.enter_context(
                path.open("w", encoding="utf-8", errors="backslashreplace", buffering=1)
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._closing.close()

    @property
    def num_used(self) -> int:
        return self.num_rows - self.rows["dropped"]

    @property
    def ratio(self) -> float:
        """Dropped rows among those read."""
        return self.rows["dropped"] / self.num_rows if self.num_rows else 0.0

    def take(self, items: Iterable[Row | LedgerLine]) -> Iterator[Row]:
        """The rows among what a reader yields; everything is counted, every note and refusal written."""
        for item in items:
            self.record(item)
            if isinstance(item, Row):
                yield item

    def record(self, item: Row | LedgerLine) -> None:
        """One thing that a reader yields. A used row with notes has one line, named after the gravest of them."""
        self.num_rows += 1
        if isinstance(item, LedgerLine):
            self.add(item)
        elif item.notes:
            self._note(item)

    def _note(self, row: Row) -> None:
        first = min(row.notes, key=lambda note: _ACTIONS.index(note.action))
        self._count(first.action, *((note.action, note.code) for note in row.notes))
        also = [note.code for note in row.notes if note is not first]
        self._write(LedgerLine(row.source, row.line, first.action, first.code, first.detail), also)

    def add(self, line: LedgerLine) -> None:
        """One thing that happened to a row which was read before: dropped or shortened by a later step."""
        self._count(line.action, (line.action, line.code))
        if line.action == "dropped" and len(self.first_dropped) < _SHOWN:
            self.first_dropped.append(line)
        self._write(line, [])

    def check_ratio(self, max_ratio: float) -> None:
        """Raises DataError when nothing is left, or when a greater part than `max_ratio` was dropped."""
        if self.num_used <= 0:
            raise DataError(f"none of the {self.num_rows} rows can be used{self._examples()}")
        if self.ratio > max_ratio:
            raise DataError(
                f"{self.rows['dropped']} of {self.num_rows} rows ({self.ratio:.1%}) cannot be used, max_reject_ratio "
                f"is {max_ratio:.1%}{self._examples()}; mend the data, or raise max_reject_ratio"
            )

    def summary(self) -> str:
        """Lines for the screen: totals, then each reason with its count."""
        changed = ", ".join(f"{self.rows[action]} {action}" for action in _ACTIONS[:3])
        return "\n".join([f"rows: {self.num_rows} read, {self.num_used} used, {changed}", *self.reasons()])

    def reasons(self) -> list[str]:
        """One line per action: how many rows by reason."""
        lines = []
        for action in _ACTIONS:
            found = [(code, count) for (kind, code), count in self.codes.most_common() if kind == action]
            if found:
                lines.append(f"  {action}: " + ", ".join(f"{code} {count}" for code, count in found))
        return lines

    def _count(self, action: Action, *codes: tuple[Action, str]) -> None:
        self.rows[action] += 1
        self.codes.update(codes)

    def _examples(self) -> str:
        return "; first: " + "; ".join(map(place, self.first_dropped)) if self.first_dropped else ""

    def _write(self, line: LedgerLine, also: list[str]) -> None:
        if self._file is None:
            return
        fields = {"source": line.source, "line": line.line, "action": line.action, "code": line.code}
        extra = {"detail": line.detail} | ({"also": also} if also else {})
        self._file.write(json.dumps(fields | extra, ensure_ascii=False) + "\n")


def place(line: LedgerLine) -> str:
    """For the screen: where and why."""
    return f"{line.source}:{line.line} {line.code} ({line.detail})"
