"""Our sampling parameters -> vLLM's, one to one, and which requests vLLM cannot honour."""

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind
from vllm.sampling_params import SamplingParams as VllmParams

from server.engine.backends.admission import INVALID
from server.engine.backends.base import RequestRefused
from server.engine.messages import Generate, ModelInfo

WHOLE_VOCABULARY = -1
MAX_SCORED_TOKENS = 16
# Of the second of vLLM's two samplers, which GPUs have. It checks them too late: its engine core would end.
MAX_LOGIT_BIAS = 1024
MAX_STOPS_HELD_BACK = 128


def check_params(request: Generate, model: ModelInfo) -> None:
    """Raise RequestRefused for what vLLM refuses, or would answer wrongly. Shared limits were checked before."""
    params = request.params
    if len(request.prompt_token_ids) >= model.max_model_len:
        raise RequestRefused(
            "context_length_exceeded",
            f"This model's maximum context length is {model.max_model_len} tokens, and the prompt has "
            f"{len(request.prompt_token_ids)}. The vllm engine needs room for one more, even where none is asked for.",
        )
    if params.logprob_token_ids and params.max_tokens > MAX_SCORED_TOKENS:
        raise RequestRefused(
            INVALID,
            f"logprob_token_ids can be given for at most {MAX_SCORED_TOKENS} tokens on the vllm engine, which reads "
            f"the whole vocabulary for each: lower max_tokens ({params.max_tokens}), or serve with QLOOP_ENGINE=hf.",
            "logprob_token_ids",
        )
    if len(params.logit_bias) > MAX_LOGIT_BIAS:
        message = (
            f"logit_bias can name at most {MAX_LOGIT_BIAS} tokens on the vllm engine, not {len(params.logit_bias)}."
        )
        raise RequestRefused(INVALID, message, "logit_bias")
    if params.min_tokens and (count := len(set(_stops(request, model)))) > MAX_STOPS_HELD_BACK:
        message = f"min_tokens on the vllm engine goes with at most {MAX_STOPS_HELD_BACK} stop token ids, not {count}."
        raise RequestRefused(INVALID, message, "stop_token_ids")
    try:
        vllm_params(request, 0, model)
    except VLLMValidationError as error:
        raise RequestRefused(INVALID, str(error), error.parameter) from None


def vllm_params(request: Generate, index: int, model: ModelInfo) -> VllmParams:
    """Parameters of choice `index`, which vLLM runs as a request of its own, as it would do itself.

    vLLM knows no stop ids of the model here, so all of them are given. When both a top k and given ids are wanted
    vLLM has no way to ask for both, and in one of its two samplers given ids spoil the logprobs of every other request
    of the batch: then the whole vocabulary is asked for.
    """
    params = request.params
    return VllmParams(
        max_tokens=max(params.max_tokens, 1),  # it computes at least one; the backend drops it
        min_tokens=params.min_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias or None,
        seed=None if params.seed is None else _seed(params.seed + index),
        stop_token_ids=_stops(request, model),
        ignore_eos=True,
        logprobs=WHOLE_VOCABULARY if params.logprob_token_ids else params.logprobs,
        prompt_logprobs=params.prompt_logprobs if index == 0 else None,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        skip_clone=True,  # nobody else has this object
    )


def _stops(request: Generate, model: ModelInfo) -> list[int]:
    return [*request.params.stop_token_ids, *(() if request.params.ignore_eos else model.stop_token_ids)]


def _seed(seed: int) -> int:
    """Of 64 bits with a sign, as vLLM keeps it; -1, which means none to vLLM, becomes another."""
    folded = (seed + 2**63) % 2**64 - 2**63
    return folded if folded != -1 else 2**63 - 1
