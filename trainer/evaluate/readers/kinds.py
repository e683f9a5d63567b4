"""A benchmark's file -> drafts of its items: which kind of questions it holds, and each record read as that kind.

One kind per file, told by its first records: a multiple-choice question that lost its options is refused, and does not
become a question with a reference answer.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from trainer.data.rows import RowRefused
from trainer.errors import DataError
from trainer.evaluate.readers import bbh, sql, text
from trainer.evaluate.readers.answers import letters_of
from trainer.evaluate.readers.choice import Choice, choices, has_options
from trainer.evaluate.readers.choice_keys import ANSWER_KEYS
from trainer.evaluate.readers.inline_options import question_in
from trainer.evaluate.readers.option_text import is_option_text, option_text
from trainer.evaluate.readers.records import Record, records_of
from trainer.evaluate.readers.schema import Databases

Kind = Literal["choice", "text", "sql", "bbh"]
Shape = Literal["choice", "option_text", "exact", "text", "sql", "bbh", "none"]
Draft = Choice | text.Asked | sql.Query | RowRefused
_LOOK = 50  # records by which a file's shape is told
_OF_KIND: dict[Kind, tuple[Shape, ...]] = {
    "choice": ("choice", "option_text"), "text": ("text", "exact"), "sql": ("sql",), "bbh": ("bbh",),
}  # fmt: skip


@dataclass(frozen=True)
class Questions:
    """What a file holds: its shape, a record that shows it, and its questions in order, each with its record."""

    shape: Shape
    sample: Record
    drafts: Iterator[tuple[Record, Draft]]


def questions_of(path: Path, kind: Kind | None) -> Questions:
    """Raises ConfigError and DataError, naming the file, where it is broken as a whole or empty."""
    records = records_of(path)
    head = list(islice(records, _LOOK))
    if not head:
        raise DataError(f"{path}: holds no question")
    shape = _shape(path, head, kind)
    sample = next((record for record in head if isinstance(record.value, dict)), head[0])
    return Questions(shape, sample, _read(chain(head, records), _reader(shape, path)))


def _shape(path: Path, head: list[Record], kind: Kind | None) -> Shape:
    votes = Counter(_shape_of(path, record) for record in head if isinstance(record.value, dict | list))
    if kind is not None:
        allowed = _OF_KIND[kind]
        return max(allowed, key=lambda shape: (votes[shape], -allowed.index(shape)))
    return votes.most_common(1)[0][0] if votes else "text"


def _shape_of(path: Path, record: Record) -> Shape:
    value = record.value
    if not isinstance(value, dict):
        return "text"
    if "table_metadata" in value or "column_names_original" in value:
        return "none"  # describes databases
    if sql.is_sql(value):
        return "sql"
    if record.form == "rows" or has_options(value):
        return "choice"
    if is_option_text(value):
        return "option_text"
    if "options" in value and "label" in value:
        return "exact"  # AGIEval's mathematics: both are null
    if bbh.is_bbh(path, value):
        return "bbh"
    return "choice" if _has_inline_options(value) else "text"


def _has_inline_options(value: dict[str, Any]) -> bool:
    answer = next((value[key] for key in ANSWER_KEYS if value.get(key)), None)
    letters = answer if isinstance(answer, list) else [answer]
    if not letters or not all(isinstance(letter, str) and letters_of(letter) for letter in letters):
        return False
    return any(isinstance(item, str) and question_in(item) is not None for item in value.values())


def _reader(shape: Shape, path: Path) -> Callable[[Any], list[Any]]:
    if shape == "choice":
        return lambda value: choices(_object(value))
    if shape == "option_text":
        return lambda value: [option_text(_object(value))]
    if shape == "exact":
        return lambda value: [text.exact(_object(value))]
    if shape == "bbh":
        return lambda value: [bbh.task_item(value)]
    if shape == "sql":
        databases = Databases(path.parent)
        return lambda value: [sql.query_of(_object(value), databases)]
    return text.asked if shape == "text" else lambda value: []


def _read(records: Iterator[Record], read: Callable[[Any], list[Any]]) -> Iterator[tuple[Record, Draft]]:
    for record in records:
        try:
            if isinstance(record.value, RowRefused):
                raise record.value
            found = read(record.value)
        except RowRefused as refusal:
            found = [refusal]
        yield from ((record, draft) for draft in found)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowRefused("wrong-shape", f"an object is expected, this is a {type(value).__name__}")
    return value
