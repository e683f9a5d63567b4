"""Settings of transformers' `generate` through the API: what the engine is told, what is reported, what is refused."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.engine.messages import SamplingParams
from tests.server.api.near import MAX_NUM_SEQS, OpenBackend, near_server
from tests.server.api.sse_reader import read_stream
from tests.server.engine.adapters import write_folder

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
IGNORED = "x-ignored-params"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "你好"}]},
    COMPLETIONS: {"prompt": "你好abc"},
}
# As people who fine-tune Qwen2 call `model.generate`.
GENERATE = {
    "num_beams": 5,
    "do_sample": False,
    "min_new_tokens": 1,
    "max_new_tokens": 40,
    "no_repeat_ngram_size": 2,
    "num_return_sequences": 3,
    "temperature": 0.15,
    "early_stopping": True,
}
Near = tuple[OpenBackend, httpx.AsyncClient]


@pytest.fixture
async def near(fake_model: Path) -> AsyncIterator[Near]:
    async with near_server(fake_model) as both:
        yield both


async def told(near: Near, path: str = CHAT, **given: Any) -> tuple[SamplingParams, int, str | None]:
    """What reached the engine: parameters and n; and what the response says was ignored."""
    backend, http = near
    response = await http.post(path, json={**BODIES[path], **given})
    assert response.status_code == 200, response.text
    return backend.requests[-1].params, backend.requests[-1].n, response.headers.get(IGNORED)


async def refusal(near: Near, path: str = CHAT, **given: Any) -> dict[str, Any]:
    backend, http = near
    response = await http.post(path, json={**BODIES[path], **given})
    assert response.status_code == 400 and not backend.requests, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


async def test_without_max_tokens_an_answer_may_fill_what_virtual_tokens_leave(
    fake_model: Path, tmp_path: Path
) -> None:
    async with near_server(fake_model, adapter_roots=(tmp_path,)) as (backend, http):
        path = str(write_folder(tmp_path / "soft", num_virtual_tokens=7))
        added = await http.post("/v1/adapters", json={"name": "soft", "path": path})
        assert added.status_code == 200, added.text
        answered = await http.post(CHAT, json={**BODIES[CHAT], "model": "soft"})
        assert answered.status_code == 200, answered.text
        request = backend.requests[-1]
        assert len(request.prompt_token_ids) + request.params.max_tokens == backend.model.max_model_len - 7


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_call_of_generate_is_taken_whole(near: Near, path: str) -> None:
    params, n, ignored = await told(near, path, **GENERATE)
    assert (params.num_beams, n, params.max_tokens, params.min_tokens) == (5, 3, 40, 1)
    assert (params.no_repeat_ngram_size, params.early_stopping, params.length_penalty) == (2, True, 1.0)
    assert params.temperature == 0.0
    assert ignored == "temperature"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_beams_come_at_the_end_best_first_and_all_are_counted(near: Near, path: str) -> None:
    _, http = near
    body = {**BODIES[path], **GENERATE}
    answer = (await http.post(path, json=body)).json()
    texts = [choice["message"]["content"] if path == CHAT else choice["text"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len({text for text in texts if text}) > 1
    streamed = read_stream((await http.post(path, json={**body, "stream": True})).text)
    assert streamed.texts == dict(enumerate(texts)) and streamed.num_done == 1
    assert [len(streamed.finishes[index]) for index in range(3)] == [1, 1, 1]
    if path == CHAT:
        assert streamed.roles == {0: 1, 1: 1, 2: 1}
    # The fake model's answers differ only in where they begin, so all are of one length.
    one = (await http.post(path, json={**body, "num_return_sequences": 1})).json()
    assert answer["usage"]["completion_tokens"] == 3 * one["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize(
    ("given", "ignored"),
    [
        ({"num_beams": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 0}, 5),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 0}, 5),
        ({"num_beams": 2, "temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0, "seed": None}, 0),
        ({"num_beams": 2, "temperature": 1, "top_k": 0, "early_stopping": "never", "length_penalty": 0.5}, 0),
        ({"early_stopping": True, "length_penalty": 2}, 2),
        ({"num_beams": 1, "early_stopping": False, "length_penalty": 1}, 0),
        ({"use_beam_search": True, "n": 2, "temperature": 0.7}, 1),
    ],
    ids=str,
)
async def test_what_has_no_effect_is_reported(near: Near, given: dict[str, Any], ignored: int) -> None:
    params, _, header = await told(near, **given)
    named = header.split(", ") if header else []
    assert len(named) == ignored and set(named) <= set(given)
    if given.get("num_beams", 1) > 1 or given.get("do_sample") is False:
        assert (params.temperature, params.top_p, params.top_k, params.min_p, params.seed) == (0.0, 1.0, 0, 0.0, None)


async def test_ignored_and_unknown_parameters_are_listed_together(fake_model: Path) -> None:
    async with near_server(fake_model, unknown_params="warn") as near:
        assert (await told(near, num_beams=2, seed=3, cheese=1))[2] == "cheese, seed"


async def test_beam_parameters_reach_the_engine_only_with_beams(near: Near) -> None:
    params, _, _ = await told(near, num_beams=4, early_stopping="never", length_penalty=-0.5)
    assert (params.num_beams, params.early_stopping, params.length_penalty) == (4, "never", -0.5)
    params, _, _ = await told(near, early_stopping="never", length_penalty=-0.5, num_beams=1)
    assert (params.num_beams, params.early_stopping, params.length_penalty) == (1, False, 1.0)


async def test_do_sample(near: Near) -> None:
    assert (await told(near, do_sample=False))[0].temperature == 0.0
    assert (await told(near, do_sample=True, temperature=0.7))[0].temperature == 0.7
    assert (await told(near, temperature=0.7, seed=5))[0].seed == 5
    near[0].requests.clear()
    assert (await refusal(near, do_sample=True, temperature=0))["param"] == "temperature"


@pytest.mark.parametrize("n", [1, 3])
async def test_vllms_beam_search_takes_n_as_the_number_of_beams(near: Near, n: int) -> None:
    params, told_n, ignored = await told(near, use_beam_search=True, n=n, length_penalty=0.5 if n > 1 else 1.0)
    assert (params.num_beams, told_n, params.temperature, ignored) == (n, n, 0.0, None)
    assert (await told(near, use_beam_search=False))[0].num_beams == 1


@pytest.mark.parametrize(
    ("path", "given", "names"),
    [
        (CHAT, {"max_new_tokens": 5, "max_tokens": 6}, ("max_new_tokens", "max_tokens")),
        (CHAT, {"max_new_tokens": 5, "max_completion_tokens": 6}, ("max_new_tokens", "max_completion_tokens")),
        (COMPLETIONS, {"max_new_tokens": 5, "max_tokens": 6}, ("max_new_tokens", "max_tokens")),
        (CHAT, {"min_new_tokens": 1, "min_tokens": 0}, ("min_new_tokens", "min_tokens")),
        (CHAT, {"num_return_sequences": 2, "n": 1, "num_beams": 2}, ("num_return_sequences", "n")),
        (CHAT, {"use_beam_search": True, "n": 3, "num_beams": 2}, ("num_beams", "n")),
        (CHAT, {"use_beam_search": True, "do_sample": True}, ("use_beam_search", "do_sample")),
    ],
    ids=str,
)
async def test_names_for_the_same_must_agree(
    near: Near, path: str, given: dict[str, Any], names: tuple[str, str]
) -> None:
    error = await refusal(near, path, **given)
    assert error["code"] == "invalid_value" and error["param"] == names[0]
    assert all(repr(name) in error["message"] for name in names)


async def test_names_for_the_same_may_both_be_given(near: Near) -> None:
    given = {"max_new_tokens": 5, "max_tokens": 5, "max_completion_tokens": 5, "num_return_sequences": 2, "n": 2}
    params, n, _ = await told(near, **given, min_new_tokens=1, min_tokens=1)
    assert (params.max_tokens, params.min_tokens, n) == (5, 1, 2)
    assert (await told(near, max_new_tokens=5, max_tokens=None))[0].max_tokens == 5


@pytest.mark.parametrize(
    ("path", "given", "param"),
    [
        (CHAT, {"num_beams": 2, "do_sample": True}, "do_sample"),
        (CHAT, {"num_beams": 2, "n": 3}, "n"),
        (CHAT, {"num_beams": 2, "num_return_sequences": 3}, "n"),
        (CHAT, {"num_beams": MAX_NUM_SEQS + 1}, "num_beams"),
        (CHAT, {"use_beam_search": True, "n": 17}, "n"),
        (CHAT, {"num_beams": 2, "logprobs": True}, "logprobs"),
        (CHAT, {"num_beams": 2, "prompt_logprobs": 0}, "prompt_logprobs"),
        (COMPLETIONS, {"num_beams": 2, "logprobs": 0}, "logprobs"),
        (COMPLETIONS, {"num_beams": 2, "echo": True, "logprobs": 1}, "logprobs"),
        (COMPLETIONS, {"num_beams": 2, "echo": True, "max_tokens": 0}, "max_tokens"),
    ],
    ids=str,
)
async def test_what_beams_cannot_do(near: Near, path: str, given: dict[str, Any], param: str) -> None:
    error = await refusal(near, path, **given)
    assert error["param"] == param and "beam" in error["message"]


async def test_echo_alone_goes_with_beams(near: Near) -> None:
    assert (await told(near, COMPLETIONS, num_beams=2, echo=True))[0].num_beams == 2


async def test_stop_strings_cut_a_finished_beam(near: Near) -> None:
    _, http = near
    body = {"prompt": "abc", "num_beams": 2, "n": 2, "stop": "c", "max_tokens": 30}
    answer = (await http.post(COMPLETIONS, json=body)).json()
    assert answer["choices"][0]["text"] == "ab" and answer["choices"][0]["stop_reason"] == "c"


# --- a backend that cannot ---


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"use_beam_search": True, "n": 2}, "use_beam_search"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size"),
        (GENERATE, "num_beams"),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_the_fake_engine_has_no_beams(http: httpx.Client, path: str, given: dict[str, Any], param: str) -> None:
    response = http.post(path, json={**BODIES[path], **given})
    assert response.status_code == 400
    assert (response.json()["error"]["code"], response.json()["error"]["param"]) == ("unsupported_parameter", param)


NEUTRAL = {
    "num_beams": 1,
    "do_sample": False,
    "num_return_sequences": 1,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "early_stopping": False,
    "length_penalty": 1.0,
    "use_beam_search": False,
    "priority": 0,
}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_neutral_values_pass_everywhere(http: httpx.Client, path: str) -> None:
    for given in (NEUTRAL, dict.fromkeys([*NEUTRAL, "max_new_tokens", "cache_salt", "timeout"]), {"do_sample": True}):
        response = http.post(path, json={**BODIES[path], **given})
        assert response.status_code == 200, response.text
        assert IGNORED not in response.headers


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 17}, "num_beams"),
        ({"num_beams": True}, "num_beams"),
        ({"do_sample": 1}, "do_sample"),
        ({"num_return_sequences": 0}, "num_return_sequences"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
        ({"early_stopping": "always"}, "early_stopping"),
        ({"early_stopping": 1}, "early_stopping"),
        ({"length_penalty": 11}, "length_penalty"),
        ({"use_beam_search": "yes"}, "use_beam_search"),
        ({"priority": 2**31}, "priority"),
        ({"priority": 0.5}, "priority"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": "5"}, "timeout"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_salt": "x" * 129}, "cache_salt"),
    ],
    ids=str,
)
def test_values_out_of_range(http: httpx.Client, given: dict[str, Any], param: str) -> None:
    response = http.post(CHAT, json={**BODIES[CHAT], **given})
    assert response.status_code == 400
    assert (response.json()["error"]["code"], response.json()["error"]["param"]) == ("invalid_value", param)
