"""Files -> rows and ledger lines, streamed. The one way into the trainer for data of any shape."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from trainer.data.drafts import Draft
from trainer.data.files import Selection, select
from trainer.data.json_values import Found
from trainer.data.order import finished
from trainer.data.repeats import SeenRows
from trainer.data.rows import LedgerLine, Note, Row, RowRefused, Stage
from trainer.data.shapes import CONTENT_KEYS, drafts
from trainer.data.values import values_of

REPEATED = Note("duplicate", "an earlier row says the same", "kept")
_LOOK = 50  # values by which a file's stage is told


def read_rows(
    paths: Iterable[str | Path], stage: Stage | None = None, *, most_per_file: int | None = None
) -> Iterator[Row | LedgerLine]:
    """Every row of the files in order; a LedgerLine where a row cannot be used.

    `paths` may be files, folders, globs and `path#1000` (the first thousand). Without a stage each file is read for the
    one it seems made for; `most_per_file` rows are read of each. What was mended or noticed in a used row stands in its
    notes. Memory does not grow with the files, but for up to 32 bytes per row by which duplicates are told. Raises
    ConfigError (a path that cannot be read) and DataError (a file broken beyond its rows).
    """
    selections = select(paths)  # at once: neither a wrong path nor a file written meanwhile is met half-way
    return _noting_repeats(row for each in selections for row in _selected(each, stage, most_per_file))


def stage_of(path: Path) -> Stage:
    """What the file seems made for, by its first usable value: pairs for dpo, conversations for sft, text for pt."""
    for found in islice(values_of(path), _LOOK):
        for draft in _drafts(found.value):
            if isinstance(draft, RowRefused):
                continue
            if draft.chosen is not None:
                return "dpo"
            return "pt" if draft.messages is None else "sft"
    return "sft"


def _selected(selection: Selection, stage: Stage | None, most_per_file: int | None) -> Iterator[Row | LedgerLine]:
    rows = (islice(_file_rows(path, stage or stage_of(path)), most_per_file) for path in selection.files)
    return islice(chain.from_iterable(rows), selection.limit)


def _file_rows(path: Path, stage: Stage) -> Iterator[Row | LedgerLine]:
    source = str(path)
    return (row for found in values_of(path) for row in _rows(source, found, stage))


def _rows(source: str, found: Found, stage: Stage) -> Iterator[Row | LedgerLine]:
    for draft in _drafts(_for_stage(found.value, stage)):
        try:
            if isinstance(draft, RowRefused):
                raise draft
            draft.notes += found.notes
            yield Row(source, found.line, **finished(draft, stage))
        except RowRefused as refusal:
            yield LedgerLine(source, found.line, "dropped", refusal.code, refusal.detail)


def _for_stage(value: Any, stage: Stage) -> Any:
    """For pt the text is wanted, whatever else the record says."""
    if stage != "pt" or not isinstance(value, dict) or "text" not in value:
        return value
    return {key: item for key, item in value.items() if key == "text" or key not in CONTENT_KEYS}


def _drafts(value: Any) -> list[Draft | RowRefused]:
    try:
        return [value] if isinstance(value, RowRefused) else drafts(value)
    except RowRefused as refusal:
        return [refusal]


def _noting_repeats(rows: Iterable[Row | LedgerLine]) -> Iterator[Row | LedgerLine]:
    seen = SeenRows()
    for row in rows:
        is_repeated = isinstance(row, Row) and seen.add(row)
        yield replace(row, notes=(*row.notes, REPEATED)) if isinstance(row, Row) and is_repeated else row
