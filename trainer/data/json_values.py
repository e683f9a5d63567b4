"""JSON text to values, one at a time: lines, arrays, and objects spread over lines. Knows nothing about rows' keys.

Memory is bounded by the longest value (`LONGEST` characters): an array is decoded through a window that slides over
the file. A value that is not valid JSON costs itself only: the next one is found by brackets, or by the keys that the
values before it began with.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, TextIO

from trainer.data.rows import Note, RowRefused

LONGEST = 1 << 24  # characters of one value
_STEP = 1 << 18
_SPACE = re.compile(r"[ \t\r\n,]*")
_TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"|[][{}]', re.DOTALL)
_WORD = re.compile(r".[^,\]}\s]*", re.DOTALL)
_FIRST_KEY = re.compile(r'\{\s*"([^"\\]{1,64})"\s*:')
_CUT = 12  # an error this near the window's end may be a value that goes on
CONTROL = Note("raw-control-character", "a control character stands unescaped in a JSON string")


class Found(NamedTuple):
    """One value of a file, or why it cannot be had. `line`: line of the file, or position in an array."""

    line: int
    value: Any  # a RowRefused when there is none
    notes: tuple[Note, ...] = ()


class LostTrack(ValueError):
    """The file is broken in a way that hides where its next value starts."""

    def __init__(self, position: int) -> None:
        super().__init__(
            f"row {position} is not valid JSON, or has more than {LONGEST} characters; where the next one starts "
            "cannot be told"
        )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise RowRefused("duplicate-key", "a key stands twice in one object")
    return made


_STRICT = json.JSONDecoder(object_pairs_hook=_object)
_LENIENT = json.JSONDecoder(object_pairs_hook=_object, strict=False)


def parse(line: int, text: str) -> Found:
    """One value; unescaped control characters in strings are let through, and noted."""
    try:
        return Found(line, _STRICT.decode(text))
    except RowRefused as refusal:
        return Found(line, refusal)
    except (ValueError, RecursionError) as error:
        fault = error
    try:
        return Found(line, _LENIENT.decode(text), (CONTROL,))
    except RowRefused as refusal:
        return Found(line, refusal)
    except (ValueError, RecursionError):
        return Found(line, RowRefused("bad-json", _reason(fault)))


def line_values(stream: TextIO) -> Iterator[Found]:
    """One value a line; blank lines are skipped."""
    number = 0
    while text := stream.readline(LONGEST):
        number += 1
        if len(text) == LONGEST and not text.endswith("\n"):
            while text and not text.endswith("\n"):
                text = stream.readline(LONGEST)
            yield Found(number, RowRefused("row-too-large", f"the line has more than {LONGEST} characters"))
        elif text.strip():
            yield parse(number, text.strip())


def array_values(stream: TextIO) -> Iterator[Found]:
    """The elements of an array, or of several arrays in a row, by position. Raises LostTrack."""
    window = _Window(stream)
    position, open_array = 0, False
    while mark := window.next_mark():
        if mark == "[" and not open_array:
            window.at, open_array = window.at + 1, True
        elif mark == "]" and open_array:
            window.at, open_array = window.at + 1, False
        elif not open_array:
            yield Found(position + 1, RowRefused("bad-json", "text stands after the end of the array"))
            return
        else:
            position += 1
            yield window.value(position)
    if open_array:
        yield Found(position + 1, RowRefused("bad-json", "the file ends before its array does"))


def object_values(stream: TextIO) -> Iterator[Found]:
    """Objects one after another, each over several lines, by position. Raises LostTrack."""
    window = _Window(stream)
    position = 0
    while window.next_mark():
        position += 1
        yield window.value(position)


class _Window:
    """The part of a file that is being looked at: `text`, read up to `at`."""

    def __init__(self, stream: TextIO) -> None:
        self.text = ""
        self.at = 0
        self._stream = stream
        self._ended = False
        self._first_keys: set[str] = set()

    def next_mark(self) -> str:
        """The next character beside white space and commas, "" at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]  # it matches ""
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def value(self, position: int) -> Found:
        """The value at `at`, which is moved behind it."""
        while True:
            try:
                value, end = _STRICT.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - _CUT
                if cut and self._more(position):
                    continue
                return self._recover(position)
            except (RowRefused, ValueError, RecursionError):
                return self._recover(position)
            if end == len(self.text) and self._more(position):
                continue  # a number may go on
            self._learn_key()
            self.at = end
            return Found(position, value)

    def _recover(self, position: int) -> Found:
        end = self._next_start(position)  # may move `at`
        piece, self.at = self.text[self.at : end], end
        return parse(position, piece.rstrip(" \t\r\n,"))

    def _next_start(self, position: int) -> int:
        """Where the value at `at` ends: its closing bracket, unless another value starts before it."""
        while True:
            end = _closing(self.text, self.at)
            following = self._following()
            if end is not None and (following is None or following >= end):
                return end
            if following is not None:
                return following
            if not self._more(position):
                return len(self.text)

    def _following(self) -> int | None:
        if not self._first_keys:
            return None
        keys = "|".join(re.escape(key) for key in sorted(self._first_keys))
        found = re.compile(rf'\{{\s*"(?:{keys})"\s*:').search(self.text, self.at + 1)
        return found.start() if found else None

    def _learn_key(self) -> None:
        if len(self._first_keys) < 8:
            found = _FIRST_KEY.match(self.text, self.at)
            if found:
                self._first_keys.add(found[1])

    def _more(self, position: int | None = None) -> bool:
        """Reads on; what stands before `at` is forgotten. Moves `at`. False at the end of the file."""
        if self._ended:
            return False
        if position is not None and len(self.text) - self.at > LONGEST:
            raise LostTrack(position)
        rest = self.text[self.at :]
        step = self._stream.read(max(_STEP, len(rest)))
        self.text, self.at, self._ended = rest + step, 0, not step
        return bool(step)


def _closing(text: str, start: int) -> int | None:
    """Where the brackets opened at `start` are all closed again; None if they are not, or do not match."""
    if text[start] not in '{["':
        return _WORD.match(text, start).end()  # type: ignore[union-attr]  # it matches one character at least
    pending: list[str] = []
    for token in _TOKEN.finditer(text, start):
        mark = token[0]
        if mark in "{[":
            pending.append("}" if mark == "{" else "]")
        elif mark in "}]" and (not pending or pending.pop() != mark):
            return None
        if not pending:
            return token.end()
    return None


def _reason(error: Exception) -> str:
    """What is wrong and where; json's messages never hold the text itself."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg[:60]}, character {error.pos + 1}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number is too long"
