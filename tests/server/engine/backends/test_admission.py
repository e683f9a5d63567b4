"""Beam searches and parameters that a backend lacks: refused before anything is computed, whoever asks."""

from typing import Any

import msgspec
import pytest

from server.engine.backends.admission import check_request
from server.engine.backends.base import RequestRefused
from server.engine.messages import ModelInfo
from tests.server.engine.backends.driver import ask

MODEL = ModelInfo(
    name="tiny",
    path="/tiny",
    backend="hf",
    dtype="fp32",
    max_model_len=64,
    vocab_size=100,
    stop_token_ids=(1,),
    max_num_seqs=8,
    max_logprobs=20,
    kv_cache_tokens=512,
    weights_hash="x",
)


@pytest.mark.parametrize(
    ("n", "params", "param"),
    [
        (1, {"num_beams": 0}, "num_beams"),
        (1, {"num_beams": 9}, "num_beams"),
        (3, {"num_beams": 2}, "n"),
        (1, {"num_beams": 2, "max_tokens": 0}, "max_tokens"),
        (1, {"num_beams": 2, "logprobs": 0}, "logprobs"),
        (1, {"num_beams": 2, "prompt_logprobs": 0}, "prompt_logprobs"),
        (1, {"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
    ],
    ids=str,
)
def test_what_no_beam_search_can_be(n: int, params: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestRefused) as caught:
        check_request(ask([5], n=n, **params), MODEL, ())
    assert (caught.value.code, caught.value.param) == ("invalid_request", param)


def test_beam_searches_that_are_fine() -> None:
    for n, beams in ((1, 1), (3, 1), (1, 8), (8, 8)):
        check_request(ask([5], n=n, num_beams=beams, no_repeat_ngram_size=2), MODEL, ())


def test_only_values_that_ask_for_something_are_unsupported() -> None:
    model = msgspec.structs.replace(MODEL, unsupported_params=("num_beams", "no_repeat_ngram_size"))
    check_request(ask([5], num_beams=1, no_repeat_ngram_size=0), model, ())
    for params in ({"num_beams": 2}, {"no_repeat_ngram_size": 1}):
        with pytest.raises(RequestRefused, match=f"hf engine does not support '{next(iter(params))}'"):
            check_request(ask([5], **params), model, ())
