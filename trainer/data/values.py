"""A file -> its values, whatever its name says: the first characters decide how it is read."""

import re
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from trainer.data.files import open_text
from trainer.data.json_values import Found, LostTrack, array_values, line_values, object_values, parse
from trainer.data.plain_text import dialogue_values, document_values, is_dialogue
from trainer.data.rows import RowRefused
from trainer.data.shapes import ANSWER_KEYS, QUESTION_KEYS, TEXT_KEYS
from trainer.data.tables import table_values
from trainer.data.turns import looks_like_turn
from trainer.errors import DataError

Reader = Callable[[TextIO], Iterator[Found]]
_HEAD = 1 << 16
_JSON = re.compile(r'\s*(?:\[\s*(?:[\[\]{"0-9tfn-]|$)|\{\s*(?:["}]|$))')
_JSON_AS_TEXT = re.compile(r'\s*(?:\[\s*)?(?:\{\s*"|\[\s*[{"])')  # prose may begin with a bracket, too
_COLUMNS = frozenset((*QUESTION_KEYS, *ANSWER_KEYS, *TEXT_KEYS))


def values_of(path: Path) -> Iterator[Found]:
    """Every value of the file. Raises ConfigError (unreadable), DataError (broken beyond its rows)."""
    with open_text(path) as stream:
        try:
            reader = _reader(stream.read(_HEAD), path.suffix.lower())
            stream.seek(0)
            yield from reader(stream)
        except LostTrack as error:
            raise DataError(f"{path}: {error}; mend it there, or write one object per line (.jsonl)") from None
        except UnicodeDecodeError as error:  # only UTF-16 has bytes that cannot be passed on
            raise DataError(f"{path}: is not valid {error.encoding} ({error.reason}); write it as UTF-8") from None


def _reader(head: str, suffix: str) -> Reader:
    lines = head.splitlines()
    if (_JSON_AS_TEXT if suffix in (".txt", ".text") else _JSON).match(head):
        return _json_reader(head)
    if suffix in (".csv", ".tsv") or (lines and _is_header(lines[0])):
        return table_values
    if suffix in (".jsonl", ".json"):
        return line_values
    return dialogue_values if is_dialogue(head) else document_values


def _json_reader(head: str) -> Reader:
    lines = [line for line in head.split("\n") if line.strip()]
    first = lines[0].strip() if lines else ""
    if head.lstrip()[:1] == "[":
        one_per_line = len(lines) > 1 and lines[1][:1] == "[" and _is_json(first)
        return line_values if one_per_line else _array
    if len(lines) > 1 and first[-1:] in "{[," and not any(map(_is_json, lines[:20])):
        return object_values
    return line_values


def _array(stream: TextIO) -> Iterator[Found]:
    """An array of rows, or one conversation: an array of turns."""
    found = array_values(stream)
    first = list(islice(found, 1))
    if first and looks_like_turn(first[0].value):
        yield _conversation(list(chain(first, found)))
    else:
        yield from chain(first, found)


def _conversation(turns: list[Found]) -> Found:
    faults = [turn.value for turn in turns if isinstance(turn.value, RowRefused)]
    value: Any = faults[0] if faults else [turn.value for turn in turns]
    return Found(1, value, tuple(dict.fromkeys(note for turn in turns for note in turn.notes)))


def _is_json(line: str) -> bool:
    return line[:1] in "{[" and not isinstance(parse(0, line).value, RowRefused)


def _is_header(line: str) -> bool:
    names = [name.strip().strip('"').lower() for name in re.split("[,\t;]", line)]
    return len(names) > 1 and len(_COLUMNS.intersection(names)) > 1
