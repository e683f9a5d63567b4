"""The bodies of OpenAI's requests, with vLLM's sampling extensions, as pydantic models.

A field that is not here is not accepted: `parsing` refuses it by name (or lists it, where the operator chose so).
References: OpenAI API reference, "Create chat completion" and "Create completion"; vLLM, "OpenAI-Compatible Server";
transformers, `GenerationConfig`.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20
MAX_BEAMS = 16
MAX_LENGTH_PENALTY = 10.0
MAX_SALT_CHARS = 128
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
    # vLLM's: with `logprobs`, these tokens' are shown at every position instead of the likeliest ones'.
    logprob_token_ids: list[TokenId] | None = Field(None, max_length=MAX_LOGPROBS)
    user: str | None = None
    metadata: dict[str, str] | None = None
    # How the engine treats the request: vLLM's names.
    priority: int | None = Field(0, ge=-INT32 - 1, le=INT32)
    cache_salt: str | None = Field(None, min_length=1, max_length=MAX_SALT_CHARS)
    timeout: float | None = Field(None, gt=0.0)  # seconds
    # transformers' `generate`; `generation.py` says how these and the fields above become one.
    num_beams: int | None = Field(1, ge=1, le=MAX_BEAMS)
    num_return_sequences: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_new_tokens: int | None = Field(None, ge=1, le=INT32)
    min_new_tokens: int | None = Field(None, ge=0, le=INT32)
    do_sample: bool | None = None
    no_repeat_ngram_size: int | None = Field(0, ge=0, le=INT32)
    early_stopping: bool | Literal["never"] | None = False
    length_penalty: float | None = Field(1.0, ge=-MAX_LENGTH_PENALTY, le=MAX_LENGTH_PENALTY)
    use_beam_search: bool | None = False  # vLLM's: n is the number of beams

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


# --- adapters, for operators ---


class LoadAdapterRequest(_Body):
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    name: str  # or name@revision
    path: str | None = None
    pinned: bool | None = None
    promote: bool | None = None


class PromoteRequest(_Body):
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    revision: str
    force: str | None = None  # why, for one that the gate refused; its card keeps it


class RollbackRequest(_Body):
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}


class LoadLoraRequest(_Body):
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    is_3d_lora_weight: bool = False


class UnloadLoraRequest(_Body):
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    lora_name: str
    lora_int_id: int | None = None
