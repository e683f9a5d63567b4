"""CSV and TSV with a header -> one object per record. Knows nothing about what the columns mean."""

import csv
from collections.abc import Iterator
from typing import TextIO

from trainer.data.json_values import LONGEST, Found
from trainer.data.rows import RowRefused


def table_values(stream: TextIO, header: str | None = None) -> Iterator[Found]:
    """Records by the line on which they begin; quoted line breaks belong to their field. `header`: of one without."""
    csv.field_size_limit(LONGEST)
    lines = _Lines(stream)
    header = next(lines, "") if header is None else header
    delimiter = max(",\t;", key=header.count)
    names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
    twice = {name for name in names if name and names.count(name) > 1}
    records = csv.reader(lines, delimiter=delimiter)
    while True:
        start = lines.number + 1
        lines.quotes = 0
        try:
            record = next(records)
        except StopIteration:
            return
        except csv.Error:
            yield Found(start, RowRefused("unclosed-quote", "a quoted field is not closed"))
            continue
        if not any(cell.strip() for cell in record):
            continue
        if lines.quotes % 2 and lines.number > start:
            yield Found(start, RowRefused("unclosed-quote", "a quoted field is not closed"))
        elif len(record) != len(names):
            detail = f"{len(record)} columns, the header has {len(names)}"
            yield Found(start, RowRefused("wrong-columns", detail))
        elif twice:
            yield Found(start, RowRefused("duplicate-column", "the header names a column twice"))
        else:
            yield Found(start, dict(zip(names, record, strict=True)))


class _Lines:
    """The lines of a stream, with their number and the quotation marks of those read since `quotes` was cleared."""

    def __init__(self, stream: TextIO) -> None:
        self.number = 0
        self.quotes = 0
        self._stream = stream

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._stream.readline(LONGEST)
        if not line:
            raise StopIteration
        self.number += 1
        self.quotes += line.count('"')
        return line
