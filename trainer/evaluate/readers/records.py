"""A benchmark's file -> its records, each an object by names of columns or keys. Knows formats, not questions.

Encodings, JSON, JSONL and CSV are read as training data is; beside that: CSV without a header, workbooks, and lists
below a key (`{"example": […]}`).
"""

import csv
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from trainer.data.files import open_text
from trainer.data.rows import RowRefused
from trainer.data.tables import table_values
from trainer.data.values import values_of
from trainer.errors import DataError
from trainer.evaluate.items import LETTERS
from trainer.evaluate.readers.answers import letters_of
from trainer.evaluate.readers.choice_keys import ANSWER_KEYS, OPTION_KEYS, QUESTION_KEYS, letter_of_column
from trainer.evaluate.readers.workbook import SheetRow, sheet_rows

TABLES = (".csv", ".tsv")
WRAPPERS = ("example", "examples", "data", "questions")  # GAOKAO-Bench, BIG-Bench Hard, and others
_LOOK = 20  # rows by which a table without a header is told


class Record(NamedTuple):
    """`value` is a RowRefused where there is none. `form` is "rows" for a table without a header, "sheet" or ""."""

    source: str
    line: int
    value: Any
    form: str = ""


def records_of(path: Path) -> Iterator[Record]:
    """Every record of the file. Raises ConfigError and DataError, naming the file, where it is broken as a whole."""
    if path.suffix.lower() == ".xlsx":
        return _workbook(path)
    if path.suffix.lower() in TABLES:
        return _table(path)
    return _values(path)


def _values(path: Path) -> Iterator[Record]:
    for found in values_of(path):
        inner = _wrapped(found.value)
        if inner is None:
            yield Record(str(path), found.line, found.value)
        else:
            yield from (Record(str(path), number, value, inner[0]) for number, value in enumerate(inner[1], 1))


def _wrapped(value: Any) -> tuple[str, list[Any]] | None:
    if not isinstance(value, dict):
        return None
    for key in WRAPPERS:
        if isinstance(value.get(key), list) and all(isinstance(item, dict) for item in value[key]):
            return key, value[key]
    return None


def _table(path: Path) -> Iterator[Record]:
    try:
        with open_text(path) as stream:
            rows = _first_rows(stream)
            header = None if not rows or _is_header(rows[0]) else _header_for(rows)
            stream.seek(0)
            for found in table_values(stream, header):
                yield Record(str(path), found.line, found.value, "rows" if header else "")
    except UnicodeDecodeError as error:  # only UTF-16 has bytes that cannot be passed on
        raise DataError(f"{path}: is not valid {error.encoding} ({error.reason}); write it as UTF-8") from None


def _first_rows(stream: Any) -> list[list[str]]:
    lines = iter(lambda: stream.readline(1 << 20), "")
    try:
        return [row for row in islice(csv.reader(islice(lines, 200)), _LOOK) if any(map(str.strip, row))]
    except csv.Error:
        return []


def _is_header(row: list[str]) -> bool:
    names = {name.strip().lower() for name in row}
    letters = sum(letter_of_column(name) is not None for name in names)
    return bool(names & set(QUESTION_KEYS)) and (letters > 1 or bool(names & set(ANSWER_KEYS)) or "query" in names)


def _header_for(rows: list[list[str]]) -> str | None:
    """Of a table of question, options, answer; None when this is none."""
    width = Counter(map(len, rows)).most_common(1)[0][0]
    last = [row[-1] for row in rows if len(row) == width]
    if not 4 <= width <= len(LETTERS) + 2 or 2 * sum(letters_of(cell) is not None for cell in last) < len(last):
        return None
    return ",".join(("question", *LETTERS[: width - 2], "answer"))


def _workbook(path: Path) -> Iterator[Record]:
    sheet: str | None = None
    names: list[str] = []
    for row in sheet_rows(path):
        source = f"{path}#{row.sheet}"
        if row.cells is None:
            yield Record(source, row.line, RowRefused("broken-sheet", "the sheet cannot be read from here on"), "sheet")
        elif row.sheet != sheet:
            sheet, (names, is_header) = row.sheet, _sheet_names(row)
            if not is_header:
                yield Record(source, row.line, _named(names, row.cells), "sheet")
        else:
            yield Record(source, row.line, _named(names, row.cells), "sheet")


def _sheet_names(row: SheetRow) -> tuple[list[str], bool]:
    """Names of the columns and whether the row is a header: question first, answer last, options between."""
    cells = list(row.cells or ())
    while cells and not cells[-1]:
        cells.pop()
    by_place = ["question", *LETTERS[: len(cells) - 2], "answer"]
    if not _is_header(cells):
        return by_place, letters_of(cells[-1]) is None
    has_options = any(letter_of_column(cell) is not None or cell.lower() in OPTION_KEYS for cell in cells)
    return (cells if has_options or len(cells) < 4 else by_place), True


def _named(names: list[str], cells: tuple[str, ...]) -> Any:
    if any(cells[len(names) :]):
        return RowRefused("wrong-columns", f"there are cells beyond the {len(names)} columns of the header")
    return dict(zip(names, cells, strict=False))
