"""The bodies of OpenAI's requests, with vLLM's sampling extensions, as pydantic models.

A field that is not here is not accepted: `parse` refuses it by name (or lists it, where the operator chose so).
References: OpenAI API reference, "Create chat completion" and "Create completion"; vLLM, "OpenAI-Compatible Server".
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from server.errors import InvalidRequest

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20
INT32 = 2**31 - 1
INT64 = 2**63 - 1

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
TokenId = Annotated[int, Field(ge=0, le=INT32)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
ROLES = ("system", "developer", "user", "assistant", "tool")


class _Body(BaseModel):
    """Strict: `"5"` is not a number here, as it is not for OpenAI."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())


class _Part(_Body):
    """Inside a body the same holds as at its top: nulls and neutral values may stand, other unknown names may not."""

    place: ClassVar[str]
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, values: Any, info: ValidationInfo) -> Any:
        if not isinstance(values, dict):
            return values
        ignored: dict[str, None] | None = info.context
        fields = {}
        for name, value in values.items():
            if name in cls.model_fields:
                fields[name] = value
            elif value is None or value in cls.neutral.get(name, ()):
                continue
            elif ignored is not None:
                ignored[f"{cls.place}.{name}"] = None
            else:
                fields[name] = value  # refused by pydantic, which knows the whole path
        return fields


class StreamOptions(_Part):
    place = "stream_options"
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"include_obfuscation": (False,)}

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class TextPart(_Part):
    place = "messages[].content[]"

    type: Literal["text"]
    text: str


class ChatMessage(_Part):
    place = "messages[]"
    # What the SDK writes into the answers that callers send back.
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"annotations": ([],)}

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    # What the template does with these is the template's affair; `chat.py` refuses those it would drop.
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None


class SamplingBody(_Body):
    """What chat and text completions have in common. None means: the model's own default."""

    # Parameters of OpenAI's that this server has no use for, with the values that ask for nothing.
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(1, ge=1, le=MAX_CHOICES)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    max_tokens: int | None = Field(None, ge=0, le=INT32)
    min_tokens: int | None = Field(0, ge=0, le=INT32)
    temperature: float | None = Field(None, ge=0.0, le=2.0)
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    top_k: int | None = Field(None, ge=-1, le=INT32)  # -1 and 0 keep all
    min_p: Probability | None = None
    repetition_penalty: float | None = Field(None, gt=0.0, le=10.0)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100.0, le=100.0)]] | None = None
    seed: int | None = Field(None, ge=-INT64 - 1, le=INT64)
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = False
    include_stop_str_in_output: bool | None = False
    skip_special_tokens: bool | None = True
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    user: str | None = None
    metadata: dict[str, str] | None = None

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_continuous_usage(self) -> bool:
        return self.wants_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class ChatRequest(SamplingBody):
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "parallel_tool_calls": (True, False),  # without tools both mean the same
        "prediction": (),
        "prompt_cache_key": (),
        "reasoning_effort": ("none", "medium"),  # OpenAI's defaults, older and newer
        "response_format": ({"type": "text"},),
        "safety_identifier": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0, le=INT32)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool | None = True
    continue_final_message: bool | None = False
    chat_template_kwargs: dict[str, Any] | None = None


Prompt = str | list[TokenId] | list[str] | list[list[TokenId]]


class CompletionRequest(SamplingBody):
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"best_of": (1,), "suffix": ("",)}

    prompt: Prompt
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)


class TokenizeRequest(_Body):
    """vLLM's `/tokenize`: either a raw prompt or a chat."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = True
    continue_final_message: bool | None = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = False


class DetokenizeRequest(_Body):
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    model: str | None = None
    tokens: list[TokenId]


Body = TypeVar("Body", ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)


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
