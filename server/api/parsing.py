"""From the bytes of a request to a body of `protocol`: JSON, then names, then values.

Knows what is refused and what is dropped, and how pydantic's complaints become errors that name the place.
"""

import json
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
from pydantic import ValidationError

from server.api.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    LoadAdapterRequest,
    LoadLoraRequest,
    PromoteRequest,
    RollbackRequest,
    TokenizeRequest,
    UnloadLoraRequest,
)
from server.errors import InvalidRequest

Body = TypeVar(
    "Body",
    ChatRequest,
    CompletionRequest,
    TokenizeRequest,
    DetokenizeRequest,
    LoadAdapterRequest,
    PromoteRequest,
    RollbackRequest,
    LoadLoraRequest,
    UnloadLoraRequest,
)


def parse(kind: type[Body], raw: bytes, *, is_lenient: bool) -> tuple[Body, list[str]]:
    """The validated body, and the names of the parameters that were ignored (only where lenient).

    Raises InvalidRequest naming the place: broken JSON by its position, a value by its path.
    """
    ignored: dict[str, None] | None = {} if is_lenient else None
    fields = _known_fields(kind, _decode(raw), ignored)
    try:
        return kind.model_validate(fields, context=ignored), list(ignored or ())
    except ValidationError as error:
        raise _invalid_value(error) from None


def _decode(raw: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "it holds a lone surrogate, which is no valid Unicode" if _has_lone_surrogate(raw) else str(error)
        raise InvalidRequest(f"The request body is not valid JSON: {reason}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise InvalidRequest("The request body must be a JSON object.", code="invalid_json")
    return value


def _has_lone_surrogate(raw: bytes) -> bool:
    r"""Such as `"\ud800"`: the decoder calls it truncated, but Python's own reads it."""
    try:
        json.dumps(json.loads(raw), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    except (ValueError, RecursionError):
        pass
    return False


def _known_fields(kind: type[Body], values: dict[str, Any], ignored: dict[str, None] | None) -> dict[str, Any]:
    """Nulls and neutral values dropped, the rest kept; unknown names go into `ignored`, or are refused without one."""
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if value is None and name not in _required(kind):
            continue
        if name in kind.model_fields:
            fields[name] = value
        elif value in kind.neutral.get(name, ()):
            continue
        elif ignored is not None:
            ignored[name] = None
        else:
            raise _unknown(name, kind.neutral)
    return fields


def _required(kind: type[Body]) -> Sequence[str]:
    return [name for name, field in kind.model_fields.items() if field.is_required()]


def _unknown(name: str, neutral: dict[str, tuple[Any, ...]]) -> InvalidRequest:
    if name not in neutral:
        return InvalidRequest(f"Unknown parameter: {name!r}.", param=name, code="unknown_parameter")
    accepted = " or ".join(msgspec.json.encode(value).decode() for value in (*neutral[name], None))
    message = f"This server does not support {name!r}; leave it out (accepted: {accepted})."
    return InvalidRequest(message, param=name, code="unsupported_parameter")


def _invalid_value(error: ValidationError) -> InvalidRequest:
    """The first problem. Of a union's many complaints the one that got deepest is about what the caller meant."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    problem = max(problems, key=lambda p: len(_path(p["loc"]))) if len(problems) > 1 else problems[0]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in _path(problem["loc"])).lstrip(".")
    if problem["type"] == "missing":
        return InvalidRequest(f"Missing required parameter: {path!r}.", param=path, code="missing_required_parameter")
    if problem["type"] == "extra_forbidden":
        return InvalidRequest(f"Unknown parameter: {path!r}.", param=path, code="unknown_parameter")
    return InvalidRequest(f"Invalid value for {path!r}: {problem['msg']}.", param=path, code="invalid_value")


def _path(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """pydantic puts the names of union branches (`list[TextPart]`, `str`) into a path; callers did not write those."""
    return tuple(part for part in location if isinstance(part, int) or (part.isidentifier() and part not in _BRANCHES))


_BRANCHES = {"str", "int", "float", "bool", "constrained"}
