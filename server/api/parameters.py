"""From a validated body to the engine's sampling parameters: defaults, limits and combinations."""

from typing import Any

from server.api.choice import ChoiceOptions
from server.api.generation import num_beams
from server.api.protocol import SamplingBody
from server.api.serving import Serving
from server.engine.messages import SamplingParams
from server.errors import InvalidRequest

MAX_ID_DIGITS = 10
_BUILT_IN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
# Without sampling, and so in beams: the most likely token, whatever the model's generation_config.json says.
_GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
_NEUTRAL = SamplingParams()


def sampling_params(
    body: SamplingBody, serving: Serving, *, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    """A settled body's value beats the model's generation_config.json, which beats the neutral value.

    Raises InvalidRequest for what only this model can judge: token ids, or parameters its backend refuses.
    """
    _check_supported(body, serving)
    chosen = {name: _chosen(body, serving, name) for name in _BUILT_IN}
    if body.do_sample is False:
        chosen |= _GREEDY
    elif body.do_sample and chosen["temperature"] == 0.0:
        raise InvalidRequest(
            "'do_sample': true needs a 'temperature' above 0.", param="temperature", code="invalid_value"
        )
    if (body.min_tokens or 0) > max_tokens:
        raise InvalidRequest(
            f"'min_tokens' ({body.min_tokens}) is larger than max_tokens ({max_tokens}).", param="min_tokens"
        )
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("'stream_options' needs 'stream': true.", param="stream_options", code="invalid_value")
    if body.prompt_logprobs is not None and body.stream:
        message = "'prompt_logprobs' is only given with 'stream': false."
        raise InvalidRequest(message, param="prompt_logprobs", code="invalid_value")
    return SamplingParams(
        **{**chosen, "top_k": max(int(chosen["top_k"]), 0)},  # type: ignore[arg-type]
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=_logit_bias(body, serving),
        seed=None if body.do_sample is False else body.seed,
        stop_token_ids=tuple(sorted(_stop_ids(body, serving))),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        logprob_token_ids=_logprob_ids(body, serving, logprobs),
        no_repeat_ngram_size=body.no_repeat_ngram_size or 0,
        **_beam_params(body),
    )


def _beam_params(body: SamplingBody) -> dict[str, Any]:
    """Nothing where there is one beam: the length penalty of a single text has no effect."""
    if num_beams(body) == 1:
        return {}
    return {
        "num_beams": num_beams(body),
        "length_penalty": 1.0 if body.length_penalty is None else body.length_penalty,
        "early_stopping": body.early_stopping or False,
    }


def _check_supported(body: SamplingBody, serving: Serving) -> None:
    """Neutral values may stand: they ask for nothing. -1 is `top_k`'s second one."""
    for name in serving.model.unsupported_params:
        value = getattr(body, name, None)
        if value is None or value == getattr(_NEUTRAL, name) or (name, value) == ("top_k", -1):
            continue
        given = "use_beam_search" if name == "num_beams" and body.use_beam_search else name
        raise InvalidRequest(
            f"The {serving.model.backend} engine does not support {given!r}.", param=given, code="unsupported_parameter"
        )


def choice_options(body: SamplingBody, serving: Serving) -> ChoiceOptions:
    return ChoiceOptions(
        stop_strings=tuple(body.stop_strings),
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        hidden_stop_ids=frozenset(model_stop_ids(serving)),
        logprob_token_ids=tuple(body.logprob_token_ids or ()),
    )


def model_stop_ids(serving: Serving) -> set[int]:
    """The engine's (from the model's configuration) and the token that ends a turn in the chat template.

    Base models name another end token than their template writes; without the second they never stop.
    """
    turn_end = serving.text.renderer.turn_end_id
    return set(serving.model.stop_token_ids) | ({turn_end} if turn_end is not None else set())


def _chosen(body: SamplingBody, serving: Serving, name: str) -> float:
    value = getattr(body, name)
    if value is None and name in serving.model.unsupported_params:
        value = _BUILT_IN[name]
    elif value is None:
        value = serving.text.sampling_defaults.get(name, _BUILT_IN[name])
    return float(value)


def _stop_ids(body: SamplingBody, serving: Serving) -> set[int]:
    asked = set(body.stop_token_ids or ())
    for token_id in asked:
        _check_id(token_id, serving, "stop_token_ids")
    return asked if body.ignore_eos else asked | model_stop_ids(serving)


def _logprob_ids(body: SamplingBody, serving: Serving, logprobs: int | None) -> tuple[int, ...]:
    ids = tuple(body.logprob_token_ids or ())
    if ids and logprobs is None:
        message = "'logprob_token_ids' needs 'logprobs'."
        raise InvalidRequest(message, param="logprob_token_ids", code="invalid_value")
    for token_id in ids:
        _check_id(token_id, serving, "logprob_token_ids")
    return ids


def _logit_bias(body: SamplingBody, serving: Serving) -> dict[int, float]:
    bias = {}
    for key, value in (body.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) <= MAX_ID_DIGITS):
            raise InvalidRequest(f"'logit_bias' has the key {key[:20]!r}; keys are token ids.", param="logit_bias")
        _check_id(int(key), serving, "logit_bias")
        bias[int(key)] = value
    return bias


def _check_id(token_id: int, serving: Serving, param: str) -> None:
    if token_id >= serving.model.vocab_size:
        raise InvalidRequest(
            f"{param!r} names token {token_id}, but the vocabulary ends at {serving.model.vocab_size - 1}.", param=param
        )
