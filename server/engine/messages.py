"""What crosses the engine socket. Token ids only: text never does.

This is the bottom layer: workers, supervisor, trainer and engine all import it and it imports none of them.
A frame is a 4-byte big-endian length and one MessagePack value, a member of `ToEngine` or `FromEngine`.
Connection order: both sides send their `Hello` / `Ready` first; different `PROTOCOL_VERSION`s end the connection.
"""

from enum import IntEnum
from typing import Literal

import msgspec

PROTOCOL_VERSION = 4
MAX_FRAME_BYTES = 64 * 1024 * 1024


class FinishReason(IntEnum):
    """Why a sequence ended."""

    STOP = 0  # the model produced a stop id
    LENGTH = 1  # max_tokens, or the model's context is full
    ABORT = 2  # the worker asked for it; never shown to an API client
    ERROR = 3  # the engine failed or was stopped; `SequenceOutput.error` says how
    DEADLINE = 4  # the request's deadline passed


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """How to choose tokens. Names and meanings as in vLLM's `SamplingParams`; stop *strings* stay in the worker."""

    max_tokens: int = 16  # 0 only computes prompt logprobs
    min_tokens: int = 0
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None  # choice i uses seed + i
    stop_token_ids: tuple[int, ...] = ()  # all of them: the worker adds the model's own
    ignore_eos: bool = False  # True: the model's own stop ids (ModelInfo) do not stop, those in stop_token_ids do
    logprobs: int | None = None  # None: none; k: the chosen token's and the k most likely
    prompt_logprobs: int | None = None  # the same for every prompt token but the first
    logprob_token_ids: tuple[int, ...] = ()  # also give these ids' logprobs at every generated position
    no_repeat_ngram_size: int = 0  # k: no k tokens in a row occur twice, prompt included; 0 allows all
    # Beam search, as transformers' `generate` defines it. Above 1 the n best beams come at the end, best first, and
    # temperature, top_p, top_k, min_p and seed have no effect.
    num_beams: int = 1
    length_penalty: float = 1.0  # a beam's score is its summed logprob / length ** length_penalty
    early_stopping: bool | Literal["never"] = False


class TokenLogprobs(msgspec.Struct, array_like=True, frozen=True):
    """Natural logs of softmax(logits), before temperature, penalties and bias, for one position."""

    token_id: int
    logprob: float
    rank: int  # 1 is the most likely
    top_token_ids: list[int]  # most likely first
    top_logprobs: list[float]
    given_logprobs: list[float]  # for SamplingParams.logprob_token_ids, in that order


class SequenceOutput(msgspec.Struct, array_like=True):
    """News of one sequence: what was added since its last output."""

    request_id: str
    index: int  # which of the n choices
    new_token_ids: list[int]  # the stop id included
    num_tokens: int  # generated so far, these included
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the id that ended it, when finish_reason is STOP
    logprobs: list[TokenLogprobs] | None = None  # one per new token
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # once, with the first output; [0] is None
    error: str | None = None
    num_cached_tokens: int | None = None  # with the first output: prompt tokens that a kept prefix saved


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The base model as the engine runs it: effective limits, not wishes."""

    name: str  # the served name
    path: str  # local folder with tokenizer, template and configuration
    backend: str
    dtype: str
    max_model_len: int  # prompt + generated tokens
    vocab_size: int
    stop_token_ids: tuple[int, ...]  # from generation_config.json and config.json
    max_num_seqs: int
    max_logprobs: int
    kv_cache_tokens: int  # capacity over all running sequences
    weights_hash: str
    unsupported_params: tuple[str, ...] = ()  # sampling parameters this backend must refuse
    has_metrics: bool = False  # it answers ReadMetrics with numbers of its own
    max_adapter_rank: int | None = None  # what the backend was started for; None: any


class AdapterInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter revision that is served. API ids: `name` where `is_current`, and `name@revision`.

    Its weights may be out of the engine's memory for the time being; a request brings them back.
    """

    name: str
    revision: str
    is_current: bool
    rank: int
    created: int  # unix seconds
    int_id: int = 0  # for backends that want a number; never given twice, not even to the same revision
    is_pinned: bool = False  # its weights stay in memory
    method: str = "lora"
    base: str = ""  # the base model as it was named in training
    scores: dict[str, float] = {}  # from its card
    num_virtual: int = 0  # places of the context that its virtual tokens take

    @property
    def id(self) -> str:
        return f"{self.name}@{self.revision}"


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    num_running: int = 0  # sequences
    num_waiting: int = 0
    kv_tokens_used: int = 0
    kv_tokens_total: int = 0
    num_steps: int = 0
    prompt_tokens_total: int = 0
    generated_tokens_total: int = 0
    num_aborted: int = 0
    num_preempted: int = 0
    cached_tokens_total: int = 0  # prompt tokens that a kept prefix saved
    num_adapters: int = 0  # with weights in memory
    num_evicted: int = 0  # times an adapter's weights made room for another's


# --- worker (or supervisor, or trainer) -> engine ---


class Hello(msgspec.Struct, tag="hello"):
    """The first frame of every client. Its two first fields never change shape, so any two versions can refuse."""

    protocol_version: int
    role: Literal["worker", "supervisor", "client"]
    pid: int


class Generate(msgspec.Struct, tag="generate", omit_defaults=True, kw_only=True):
    """One request; it becomes n sequences."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    n: int = 1
    adapter: str | None = None  # AdapterInfo.id; None is the base model
    priority: int = 0  # lower runs first
    deadline_s: float | None = None  # from arrival at the engine
    cache_salt: str = ""  # prefixes are shared only between requests of the same salt (a tenant)


class Abort(msgspec.Struct, tag="abort"):
    request_id: str
    index: int | None = None  # None: all choices


class LoadAdapter(msgspec.Struct, tag="load_adapter"):
    """Load a registry revision; `revision=None` means the name's current one, and makes the engine take it over."""

    call_id: str
    name: str
    revision: str | None = None
    pin: bool | None = None  # None leaves it as it is


class UnloadAdapter(msgspec.Struct, tag="unload_adapter"):
    """Stop serving a revision, or without one all of the name's. The registry keeps them."""

    call_id: str
    name: str
    revision: str | None = None
    cancel: bool = False  # end its running requests with an error instead of waiting for them


class ListAdapters(msgspec.Struct, tag="list_adapters"):
    call_id: str


class ReadMetrics(msgspec.Struct, tag="read_metrics"):
    call_id: str


class AckAdapters(msgspec.Struct, tag="ack_adapters"):
    """This worker now routes by `version` of the adapter list."""

    version: int


class StartDrain(msgspec.Struct, tag="start_drain"):
    """Refuse new requests, finish running ones, keep the process. Supervisor only."""


ToEngine = (
    Hello | Generate | Abort | LoadAdapter | UnloadAdapter | ListAdapters | ReadMetrics | AckAdapters | StartDrain
)


# --- engine -> worker ---


class Ready(msgspec.Struct, tag="ready"):
    protocol_version: int
    pid: int
    model: ModelInfo
    adapters: list[AdapterInfo]
    adapters_version: int
    is_draining: bool


class Refused(msgspec.Struct, tag="refused"):
    """The engine will not talk to this client; the connection closes after it."""

    protocol_version: int
    message: str


class Accepted(msgspec.Struct, tag="accepted"):
    request_id: str
    num_prompt_tokens: int


class Rejected(msgspec.Struct, tag="rejected"):
    """`code` is one of: context_length_exceeded, model_not_found, invalid_request, invalid_adapter, overloaded,
    draining, deadline_exceeded."""

    request_id: str
    code: str
    message: str
    param: str | None = None
    retry_after_s: int | None = None


class Outputs(msgspec.Struct, tag="outputs"):
    """All news of one step for one worker; a slow reader gets several steps merged."""

    items: list[SequenceOutput]


class Adapters(msgspec.Struct, tag="adapters"):
    version: int
    adapters: list[AdapterInfo]


class AdapterReply(msgspec.Struct, tag="adapter_reply"):
    """Answers Load/UnloadAdapter, after every worker acknowledged the new list.

    `error_code` is one of: model_not_found, invalid_adapter, adapter_busy, overloaded.
    """

    call_id: str
    error_code: str | None = None
    error: str | None = None
    adapters: list[AdapterInfo] = []


class AdapterStates(msgspec.Struct, tag="adapter_states"):
    """Answers ListAdapters, with ids; what is served comes in `Adapters`."""

    call_id: str
    max_loaded: int
    loaded: list[str]  # weights in memory
    unloading: list[str]  # hidden, and waiting for its last request
    refused: dict[str, str]  # published, but cannot be served, and why


class Metrics(msgspec.Struct, tag="metrics"):
    """Answers ReadMetrics."""

    call_id: str
    text: str  # Prometheus text of what the backend counts under names of its own; often empty


class Draining(msgspec.Struct, tag="draining"):
    pass


class Heartbeat(msgspec.Struct, tag="heartbeat"):
    """Sent by the step loop itself several times a second, so that a hung loop falls silent."""

    stats: EngineStats


FromEngine = (
    Ready
    | Refused
    | Accepted
    | Rejected
    | Outputs
    | Adapters
    | AdapterReply
    | AdapterStates
    | Metrics
    | Draining
    | Heartbeat
)
