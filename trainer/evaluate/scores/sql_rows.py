"""Whether two results are the same one, as Spider's test-suite evaluation asks (Zhong, Yu & Klein 2020, arXiv
2010.02840).

Names of columns do not count, nor their order: some order of the found columns must give the expected rows.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

from trainer.evaluate.scores.sql_run import Cell, Rows

_MAX_ORDERS: Final = 1000
_RELATIVE: Final = 1e-6
_ABSOLUTE: Final = 1e-9
_Row = Sequence[Cell]


def same_rows(expected: Rows, found: Rows, *, ordered: bool) -> bool:
    """Equal number of columns, equal rows with their duplicates, in the same sequence if `ordered`.

    Numbers are equal to 1e-6 (relative), an integer equals a float of its value, text equals text letter by letter,
    NULL equals NULL, a number is never equal to text. Columns that hold different values cannot stand for each other;
    of the orders that are left, the first 1000 are tried.
    """
    if len(expected.columns) != len(found.columns) or len(expected.rows) != len(found.rows):
        return False
    if not expected.rows:
        return True
    orders = itertools.islice(_orders(expected.rows, found.rows), _MAX_ORDERS)
    return any(_equal(expected.rows, [[row[c] for c in order] for row in found.rows], ordered) for order in orders)


def _orders(expected: Sequence[_Row], found: Sequence[_Row]) -> Iterator[list[int]]:
    """Every order of the found columns in which each holds the values of the expected one; as they are comes
    first."""
    theirs = [_column(found, index) for index in range(len(found[0]))]
    fitting = []
    for index in range(len(expected[0])):
        own = _column(expected, index)
        same = [other for other, column in enumerate(theirs) if _all_close(own, column)]
        fitting.append(sorted(same, key=lambda other: other != index))
    # Equal columns are interchangeable, but which of two columns with equal values goes with which is not known.
    yield from _choices(fitting, [])


def _choices(fitting: Sequence[Sequence[int]], taken: list[int]) -> Iterator[list[int]]:
    if len(taken) == len(fitting):
        yield list(taken)
        return
    for index in fitting[len(taken)]:
        if index not in taken:
            yield from _choices(fitting, [*taken, index])


def _equal(expected: Sequence[_Row], found: Sequence[_Row], ordered: bool) -> bool:
    if ordered:
        return all(map(_all_close, expected, found))
    if Counter(map(tuple, expected)) == Counter(map(tuple, found)):
        return True
    inexact = [
        any(isinstance(row[index], float) for row in (*expected, *found)) for index in range(len(expected[0]))
    ]  # such columns sort last: a hair between two floats must not decide which rows are compared
    return any(inexact) and all(map(_all_close, _sorted(expected, inexact), _sorted(found, inexact)))


def _sorted(rows: Sequence[_Row], inexact: Sequence[bool]) -> list[_Row]:
    columns = sorted(range(len(inexact)), key=lambda index: inexact[index])
    return sorted(rows, key=lambda row: [_key(row[index]) for index in columns])


def _column(rows: Sequence[_Row], index: int) -> list[Cell]:
    return sorted((row[index] for row in rows), key=_key)


def _key(cell: Cell) -> tuple[int, float, str]:
    if cell is None:
        return (0, 0.0, "")
    if isinstance(cell, int | float):
        return (1, cell, "")
    return (2, 0.0, cell) if isinstance(cell, str) else (3, 0.0, cell.hex())


def _all_close(expected: _Row, found: _Row) -> bool:
    return all(map(_close, expected, found))


def _close(expected: Cell, found: Cell) -> bool:
    if isinstance(expected, int | float) and isinstance(found, int | float):
        if isinstance(expected, float) or isinstance(found, float):
            return expected == found or math.isclose(expected, found, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)
        return expected == found
    return expected == found
