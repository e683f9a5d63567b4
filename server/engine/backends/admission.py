"""Which requests a backend can never serve, decided from limits alone.

Shared by all backends. Knows nothing about queues, memory in use or weights.
"""

import math
from collections.abc import Container, Iterable

from server.engine.backends.base import RequestRefused
from server.engine.messages import Generate, ModelInfo, SamplingParams

INVALID = "invalid_request"
_NEUTRAL = SamplingParams()


def check_request(request: Generate, model: ModelInfo, adapter_ids: Container[str]) -> None:
    """Raise RequestRefused, with the code and parameter for the client, unless `request` can run some day."""
    _check_adapter(request, adapter_ids)
    _check_supported(request, model)
    _check_tokens(request, model)
    _check_length(request, model)
    _check_logprobs(request, model)
    _check_beams(request, model)


def _check_adapter(request: Generate, adapter_ids: Container[str]) -> None:
    if request.adapter is not None and request.adapter not in adapter_ids:
        raise RequestRefused("model_not_found", f"The adapter '{request.adapter}' is not loaded.", "model")


def _check_supported(request: Generate, model: ModelInfo) -> None:
    for name in model.unsupported_params:
        if getattr(request.params, name) != getattr(_NEUTRAL, name):
            raise RequestRefused(INVALID, f"The {model.backend} engine does not support '{name}'.", name)


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


def _check_beams(request: Generate, model: ModelInfo) -> None:
    params = request.params
    if params.no_repeat_ngram_size < 0:
        raise RequestRefused(INVALID, "no_repeat_ngram_size must not be negative.", "no_repeat_ngram_size")
    if not 1 <= params.num_beams <= model.max_num_seqs:
        message = f"num_beams must be between 1 and {model.max_num_seqs} on this server, not {params.num_beams}."
        raise RequestRefused(INVALID, message, "num_beams")
    if params.num_beams == 1:
        return
    if request.n > params.num_beams:
        raise RequestRefused(INVALID, f"n ({request.n}) must not be larger than num_beams ({params.num_beams}).", "n")
    if params.max_tokens < 1:
        raise RequestRefused(INVALID, "max_tokens must be at least 1 in a beam search.", "max_tokens")
    for param, count in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if count is not None:
            message = (
                f"{param} cannot be given with num_beams above 1: beams replace each other until the search ends, "
                "and log probabilities are not kept for them. Use num_beams=1, or leave out logprobs and echo's."
            )
            raise RequestRefused(INVALID, message, param)
