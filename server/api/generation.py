"""The settings of transformers' `generate` and vLLM's `use_beam_search`, written in OpenAI's terms.

So that a call of `model.generate(...)` moves to this server with its arguments as they are. What contradicts itself
is refused; what has no effect is named, as `generate` warns of it. Reference: transformers, `GenerationConfig`.
"""

from collections.abc import Iterator, Mapping

from server.api.protocol import MAX_BEAMS, SamplingBody
from server.errors import InvalidRequest

# transformers' name -> OpenAI's names for the same; the last one is what the other modules read.
_TWINS = {
    "max_new_tokens": ("max_completion_tokens", "max_tokens"),
    "min_new_tokens": ("min_tokens",),
    "num_return_sequences": ("n",),
}
# What only sampling, and what only beam search uses, with the values that ask for nothing.
_SAMPLING = {"temperature": (0.0, 1.0), "top_p": (1.0,), "top_k": (-1, 0), "min_p": (0.0,), "seed": ()}
_BEAMS = {"early_stopping": (False,), "length_penalty": (1.0,)}


def settle(body: SamplingBody) -> list[str]:
    """Give `n`, `max_tokens`, `min_tokens`, `num_beams` and `do_sample` their final values, in place.

    Returns the names of the parameters that have no effect. Raises InvalidRequest where two contradict each other.
    """
    for alias, twins in _TWINS.items():
        _settle_alias(body, alias, twins)
    if body.use_beam_search:
        _settle_vllm_beams(body)
    has_beams = num_beams(body) > 1
    if has_beams and body.do_sample:
        raise InvalidRequest(
            "'do_sample': true with 'num_beams' above 1 would be beam sampling, which this server does not offer. "
            "Leave one of them out.",
            param="do_sample",
            code="unsupported_parameter",
        )
    if has_beams:
        body.do_sample = False
    return [
        *(_given(body, _SAMPLING) if body.do_sample is False else ()),
        *(() if has_beams else _given(body, _BEAMS)),
    ]


def num_beams(body: SamplingBody) -> int:
    return body.num_beams or 1


def _settle_alias(body: SamplingBody, alias: str, twins: tuple[str, ...]) -> None:
    value = getattr(body, alias)
    if value is None:
        return
    for twin in twins:
        if twin in body.model_fields_set and getattr(body, twin) != value:
            raise _contradiction(alias, value, twin, getattr(body, twin))
    setattr(body, twins[-1], value)


def _settle_vllm_beams(body: SamplingBody) -> None:
    """vLLM's beam search has n beams and returns all of them; without choice among them even one is greedy."""
    n = body.n or 1
    if "num_beams" in body.model_fields_set and num_beams(body) != n:
        raise _contradiction("num_beams", num_beams(body), "n", n, "with 'use_beam_search' n is the number of beams")
    if n > MAX_BEAMS:
        raise InvalidRequest(
            f"'use_beam_search' takes n as the number of beams; at most {MAX_BEAMS}, not {n}.",
            param="n",
            code="invalid_value",
        )
    if body.do_sample:
        raise _contradiction("use_beam_search", True, "do_sample", True, "beams are not sampled")
    body.num_beams, body.do_sample = n, False


def _given(body: SamplingBody, names: Mapping[str, tuple[float, ...]]) -> Iterator[str]:
    """Those of `names` whose value asks for something."""
    for name, neutral in names.items():
        value = getattr(body, name)
        if value is not None and value not in neutral:
            yield name


def _contradiction(
    name: str, value: object, other: str, other_value: object, why: str = "both mean the same"
) -> InvalidRequest:
    return InvalidRequest(
        f"{name!r} ({value}) and {other!r} ({other_value}) contradict each other: {why}. Give one of them.",
        param=name,
        code="invalid_value",
    )
