"""Excel workbooks (.xlsx) -> rows of text, sheet by sheet. Knows nothing about questions.

A workbook is a zip of XML, and may come from anywhere: its unpacked size is bounded before anything is unpacked,
formulas are never run (the value that Excel stored is read), and links are not followed.
"""

import datetime
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from trainer.errors import DataError

MAX_UNPACKED = 128 << 20  # bytes; a workbook of 100 000 questions has about 40 MiB
MAX_COLUMNS = 32
_LAST_ROW = 1 << 20  # of Excel


class SheetRow(NamedTuple):
    """`cells` is None where the sheet is broken from here on."""

    sheet: str
    line: int
    cells: tuple[str, ...] | None


def sheet_rows(path: Path) -> Iterator[SheetRow]:
    """Every row that is not blank. Raises DataError, naming the file, when it is no workbook or too large."""
    import openpyxl  # late: half a second

    _check_size(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of styles and extensions, which do not matter here
        try:
            book = openpyxl.load_workbook(path, read_only=True, data_only=True, keep_links=False)
        except Exception as error:  # a damaged file makes the library raise nearly anything
            raise DataError(f"{path}: is not a readable .xlsx workbook ({type(error).__name__})") from None
        try:
            for sheet in book.worksheets:
                yield from _rows(sheet)
        finally:
            book.close()


def _rows(sheet: Any) -> Iterator[SheetRow]:
    line = 0
    try:
        for line, row in enumerate(sheet.iter_rows(max_col=MAX_COLUMNS, max_row=_LAST_ROW), 1):
            cells = tuple(map(_text, row))
            if any(cells):
                yield SheetRow(sheet.title, line, cells)
    except Exception:  # as above
        yield SheetRow(sheet.title, line + 1, None)


def _text(cell: Any) -> str:
    """What a reader of the sheet sees, as far as the value tells it."""
    value = cell.value
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and "%" in str(cell.number_format):
        return f"{value * 100:g}%"
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        value = value.date()
    return str(value).strip()


def _check_size(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())  # zipfile reads no member beyond this
            entities = size <= MAX_UNPACKED and any(map(_has_entities, _parts(archive)))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged zip makes the library raise nearly anything
        raise DataError(f"{path}: is not a readable .xlsx workbook ({type(error).__name__})") from None
    if size > MAX_UNPACKED:
        raise DataError(f"{path}: unpacks to {size >> 20} MiB, more than {MAX_UNPACKED >> 20}; split it")
    if entities:
        raise DataError(f"{path}: defines XML entities, which no workbook needs; save it again in Excel")


def _parts(archive: zipfile.ZipFile) -> Iterator[bytes]:
    for member in archive.infolist():
        if member.filename.endswith((".xml", ".rels")):
            yield archive.read(member)


def _has_entities(xml: bytes) -> bool:
    return b"<!DOCTYPE" in xml or b"<!ENTITY" in xml or b"<\0!\0D\0O\0C\0T\0Y\0P\0E" in xml
