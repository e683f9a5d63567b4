"""Lists of turns -> canonical messages. Knows every way in which files write turns; nothing about their order."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from trainer.data.roles import Role, role_of, spoken
from trainer.data.rows import Message, RowRefused

_NAME_KEYS = ("role", "from", "speaker")
_TEXT_KEYS = ("content", "value", "text")
_PAIRS = (
    ("input", "output"),
    ("human", "assistant"),
    ("user", "assistant"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
)


def text_of(value: Any, where: str) -> str:
    """A string that every tokenizer takes. Raises RowRefused, naming the key."""
    if value is None:
        raise RowRefused("null-text", f"{where} is null")
    if isinstance(value, list):
        raise RowRefused("list-content", f"{where} is a list, a string is expected")
    if not isinstance(value, str):
        raise RowRefused("not-a-string", f"{where} is a {type(value).__name__}, a string is expected")
    if not value.isascii():
        _check_encodable(value, where)
    if "\0" in value:
        raise RowRefused("nul-byte", f"{where} holds a NUL character")
    return value


def messages_of(turns: Any, where: str) -> list[Message]:
    """Messages of a list of turns. Raises RowRefused."""
    if not isinstance(turns, list):
        raise RowRefused("not-a-list", f"{where} must be a list of turns, it is a {type(turns).__name__}")
    if not turns:
        raise RowRefused("empty-conversation", f"{where} has no turns")
    return [message for number, turn in enumerate(turns, 1) for message in _turn(turn, f"turn {number}")]


def looks_like_turn(value: Any) -> bool:
    """Whether a list that starts with `value` is a conversation."""
    if isinstance(value, str):
        return spoken(value) is not None
    return isinstance(value, dict) and _named(value) is not None and _spoken_key(value) is not None


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def tool_call(name: Any, arguments: Any, where: str) -> dict[str, Any]:
    """The canonical form of one call; arguments may be JSON text. Raises RowRefused."""
    if not isinstance(name, str) or not name.strip():
        raise RowRefused("bad-tool-call", f"{where}: a call needs a name")
    if isinstance(arguments, str):
        arguments = _json(text_of(arguments, where), where) if arguments.strip() else {}
    text_of(json.dumps(arguments, ensure_ascii=False), where)  # their texts are learnt as well
    return {"name": text_of(name, where), "arguments": {} if arguments is None else arguments}


def _call(value: Any, where: str) -> dict[str, Any]:
    """Of OpenAI's form, or of an object, or of its JSON text."""
    if isinstance(value, str):
        value = _json(text_of(value, where), where)
    if isinstance(value, dict):
        value = value.get("function", value)
    if not isinstance(value, dict):
        raise RowRefused("bad-tool-call", f"{where}: a call needs a name and arguments")
    return tool_call(value.get("name"), value.get("arguments", value.get("parameters")), where)


def _turn(turn: Any, where: str) -> Iterator[Message]:
    if isinstance(turn, str):
        yield _spoken_turn(turn, where)
    elif isinstance(turn, list) and len(turn) == 2:
        yield message("user", text_of(turn[0], where))
        yield message("assistant", text_of(turn[1], where))
    elif not isinstance(turn, dict):
        raise RowRefused("not-an-object", f"{where} is a {type(turn).__name__}, an object is expected")
    elif _named(turn) is not None:
        yield from _named_turn(turn, where)
    else:
        yield from _pair(turn, where)


def _spoken_turn(turn: str, where: str) -> Message:
    found = spoken(turn)
    if found is None:
        raise RowRefused("unknown-role", f"{where} does not start with a known speaker")
    return message(found[0], text_of(found[1], where))


def _pair(turn: Mapping[str, Any], where: str) -> Iterator[Message]:
    for question, answer in _PAIRS:
        if question in turn and answer in turn:
            if turn.get("system"):
                yield message("system", text_of(turn["system"], f"{where}, system"))
            yield message("user", text_of(turn[question], f"{where}, {question}"))
            yield message("assistant", text_of(turn[answer], f"{where}, {answer}"))
            return
    raise RowRefused("unknown-shape", f"{where} names no speaker (role or from)")


def _named_turn(turn: Mapping[str, Any], where: str) -> Iterator[Message]:
    name = turn[_named(turn) or ""]
    role = role_of(name)
    if role is None:
        raise RowRefused("unknown-role", f"{where}: the speaker is not a known one")
    if role == "tool" and "observation" in turn:  # ChatGLM3: the call and its result are one turn
        yield _calling("", [{"name": turn.get("name"), "arguments": turn.get("parameters", {})}], where)
        yield message("tool", _result(turn["observation"], where))
    elif role == "assistant" and (turn.get("tool_calls") or turn.get("function_call")):
        calls = turn.get("tool_calls") or [turn["function_call"]]
        yield _calling(text_of(turn.get("content") or "", where), calls, where)
    else:
        yield _plain_turn(role, turn.get(_spoken_key(turn) or "content"), where)


def _plain_turn(role: Role, value: Any, where: str) -> Message:
    if role == "call":
        calls = _json(value, where) if isinstance(value, str) else value
        return _calling("", calls if isinstance(calls, list) else [calls], where)
    if role == "tool":
        return message("tool", _result(value, where))
    return message(role, text_of(value, f"{where}, {role}"))


def _calling(content: str, calls: Any, where: str) -> Message:
    if not isinstance(calls, list) or not calls:
        raise RowRefused("bad-tool-call", f"{where}: tool_calls must be a list")
    return {"role": "assistant", "content": content, "tool_calls": [_call(call, where) for call in calls]}


def _result(value: Any, where: str) -> str:
    """A tool's result may be any JSON."""
    return text_of(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), where)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowRefused("bad-tool-call", f"{where}: the call is not valid JSON") from None


def _named(turn: Mapping[str, Any]) -> str | None:
    return next((key for key in _NAME_KEYS if key in turn), None)


def _spoken_key(turn: Mapping[str, Any]) -> str | None:
    return next((key for key in _TEXT_KEYS if key in turn), None)


def _check_encodable(value: str, where: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        if 0xDC80 <= ord(value[error.start]) <= 0xDCFF:  # what surrogateescape makes of a byte that it cannot read
            raise RowRefused("bad-encoding", f"{where} holds bytes that are wrong in the file's encoding") from None
        raise RowRefused("lone-surrogate", f"{where} holds half of a surrogate pair") from None
