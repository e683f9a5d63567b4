"""Data files -> rows. Knows JSON shapes; knows nothing about tokens, templates or models.

Accepted per row: `messages` (OpenAI), alpaca (`instruction`, `input`, `output`, `system`, `history`), sharegpt
(`conversations` of `from`/`value`), and `text` for pre-training. A row that cannot be used becomes a `Reject` with its
line and reason: nothing is dropped silently.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from server.errors import ConfigError

Message = dict[str, str]
ROLES = ("system", "user", "assistant")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class Row:
    """One usable row: `messages` for sft, `text` for pt."""

    source: str
    line: int  # 1-based line of a JSONL file, 1-based position in a JSON array
    messages: tuple[Message, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class Reject:
    """One line of the ledger."""

    source: str
    line: int
    reason: str


class RowRefused(ValueError):
    """Why a row cannot be used."""


def read_rows(path: Path, stage: Literal["pt", "sft"]) -> Iterator[Row | Reject]:
    """Every row of a .jsonl or .json file, in order. Raises ConfigError when the file as a whole cannot be read."""
    convert = _to_text if stage == "pt" else _to_messages
    for line, value in _values(path):
        yield value if isinstance(value, Reject) else _row(path, line, value, convert)


def check_messages(messages: list[Message]) -> tuple[Message, ...]:
    """One optional system turn, then user and assistant in turn, ending with the assistant. Raises RowRefused."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    for position, message in enumerate(turns):
        expected = ROLES[1 + position % 2]
        if message["role"] != expected:
            raise RowRefused(f"turn {position + 1} is {message['role']}, {expected} was expected")
        if not message["content"].strip():
            raise RowRefused(f"the {message['role']}'s text in turn {position + 1} is empty")
    if not turns or turns[-1]["role"] != "assistant":
        raise RowRefused("there is no assistant's turn at the end, so nothing to learn")
    return tuple(messages)


def _row(path: Path, line: int, value: Any, convert: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Row | Reject:
    try:
        if not isinstance(value, dict):
            raise RowRefused(f"a JSON object is expected, this is a {type(value).__name__}")
        return Row(str(path), line, **convert(value))
    except RowRefused as error:
        return Reject(str(path), line, str(error))


def _values(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    if path.suffix == ".json" and raw.lstrip()[:1] == b"[":
        yield from _array(path, raw)
        return
    for line, part in enumerate(raw.split(b"\n"), start=1):
        if part.strip():
            yield line, _parse_line(path, line, part)


def _array(path: Path, raw: bytes) -> Iterator[tuple[int, Any]]:
    try:
        values = json.loads(raw)
    except ValueError as error:
        raise ConfigError(
            f"{path}: is not a valid JSON array ({error}); mend it, or write one object per line"
        ) from None
    yield from enumerate(values, start=1)


def _parse_line(path: Path, line: int, part: bytes) -> Any:
    try:
        return json.loads(part.decode("utf-8"))
    except UnicodeDecodeError:
        return Reject(str(path), line, "is not UTF-8 text")
    except ValueError as error:
        return Reject(str(path), line, f"is not valid JSON ({error})")


def _to_text(value: Mapping[str, Any]) -> dict[str, Any]:
    text = _string(value, "text")
    if not text.strip():
        raise RowRefused("the text is empty")
    return {"text": text}


def _to_messages(value: Mapping[str, Any]) -> dict[str, Any]:
    if "messages" in value:
        messages = _openai(value["messages"])
    elif "conversations" in value:
        messages = _sharegpt(value)
    elif "instruction" in value:
        messages = _alpaca(value)
    else:
        raise RowRefused(f"no messages, conversations or instruction; its keys are {sorted(map(str, value))[:8]}")
    return {"messages": check_messages(messages)}


def _openai(items: Any) -> list[Message]:
    messages = []
    for item in _objects(items, "messages"):
        role = item.get("role")
        if role not in ROLES:
            raise RowRefused(f"role {role!r} is not one of {', '.join(ROLES)}")
        messages.append(_message(role, _string(item, "content")))
    return messages


def _sharegpt(value: Mapping[str, Any]) -> list[Message]:
    messages = [_message("system", _string(value, "system"))] if value.get("system") else []
    for item in _objects(value["conversations"], "conversations"):
        speaker = item.get("from")
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
            raise RowRefused(f"from {speaker!r} is not one of {', '.join(_SHAREGPT_ROLES)}")
        messages.append(_message(_SHAREGPT_ROLES[speaker], _string(item, "value")))
    return messages


def _alpaca(value: Mapping[str, Any]) -> list[Message]:
    messages = [_message("system", _string(value, "system"))] if value.get("system") else []
    for pair in value.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RowRefused("history must be a list of [question, answer] pairs")
        messages += [_message("user", pair[0]), _message("assistant", pair[1])]
    question = _string(value, "instruction")
    if value.get("input"):
        question += "\n" + _string(value, "input")
    return [*messages, _message("user", question), _message("assistant", _string(value, "output"))]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _objects(items: Any, key: str) -> list[Mapping[str, Any]]:
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise RowRefused(f"{key} must be a list of objects")
    return items


def _string(value: Mapping[str, Any], key: str) -> str:
    text = value.get(key)
    if not isinstance(text, str):
        raise RowRefused(f"{key} must be a string, it is {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowRefused(f"{key} holds a lone surrogate, which no tokenizer can encode") from None
    return text
