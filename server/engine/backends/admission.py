"""Which requests a backend can never serve, decided from limits alone.

Shared by all backends. Knows nothing about queues, memory in use or weights.
"""

import math
from collections.abc import Container, Iterable

from server.engine.backends.base import RequestRefused
from server.engine.messages import Generate, ModelInfo

INVALID = "invalid_request"


def check_request(request: Generate, model: ModelInfo, adapter_ids: Container[str]) -> None:
    """Raise RequestRefused, with the code and parameter for the client, unless `request` can run some day."""
    _check_adapter(request, adapter_ids)
    _check_tokens(request, model)
    _check_length(request, model)
    _check_logprobs(request, model)


def _check_adapter(request: Generate, adapter_ids: Container[str]) -> None:
    if request.adapter is not None and request.adapter not in adapter_ids:
        raise RequestRefused("model_not_found", f"The adapter '{request.adapter}' is not loaded.", "model")


def _check_length(request: Generate, model: ModelInfo) -> None:
    num_prompt, num_new = len(request.prompt_token_ids), request.params.max_tokens
    if num_prompt + num_new > model.max_model_len:
        raise RequestRefused(
            "context_length_exceeded",
            f"This model's maximum context length is {model.max_model_len} tokens. However, you requested "
            f"{num_prompt + num_new} tokens ({num_prompt} in the messages, {num_new} in the completion). "
            "Please reduce the length of the messages or completion.",
        )


def _check_tokens(request: Generate, model: ModelInfo) -> None:
    params = request.params
    if not request.prompt_token_ids:
        raise RequestRefused(INVALID, "The prompt must have at least one token.", "prompt")
    _check_ids(request.prompt_token_ids, model, "prompt")
    _check_ids(params.stop_token_ids, model, "stop_token_ids")
    _check_ids(params.logit_bias, model, "logit_bias")
    _check_ids(params.logprob_token_ids, model, "logprob_token_ids")
    if not all(math.isfinite(bias) for bias in params.logit_bias.values()):
        raise RequestRefused(INVALID, "logit_bias values must be finite numbers.", "logit_bias")


def _check_ids(ids: Iterable[int], model: ModelInfo, param: str) -> None:
    lowest, highest = min(ids, default=0), max(ids, default=0)
    if lowest < 0 or highest >= model.vocab_size:
        bad = lowest if lowest < 0 else highest
        raise RequestRefused(
            INVALID, f"Token id {bad} in {param} is outside the vocabulary (0 to {model.vocab_size - 1}).", param
        )


def _check_logprobs(request: Generate, model: ModelInfo) -> None:
    params = request.params
    for param, count in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if count is not None and not 0 <= count <= model.max_logprobs:
            raise RequestRefused(INVALID, f"{param} must be between 0 and {model.max_logprobs}, not {count}.", param)
