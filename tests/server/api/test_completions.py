"""`/v1/completions`: kinds of prompts, echo, log probabilities."""

from typing import Any

import httpx
import pytest

from tests.models import make_tokenizer
from tests.server.api.sse_reader import stream

PATH = "/v1/completions"
TOKENIZER = make_tokenizer()
TEXT = "你好，世界🙂"
IDS: list[int] = TOKENIZER.encode(TEXT).ids
PADDING_ID = TOKENIZER.get_vocab_size() + 3


def complete(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = http.post(PATH, json=body)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


def test_text_and_its_ids_are_the_same_prompt(http: httpx.Client) -> None:
    as_text, as_ids = (complete(http, prompt=prompt, max_tokens=50) for prompt in (TEXT, IDS))
    assert as_text["choices"] == as_ids["choices"] and as_text["choices"][0]["text"] == TEXT
    assert as_text["usage"] == as_ids["usage"]
    assert as_text["usage"]["prompt_tokens"] == len(IDS)


def test_sixteen_tokens_when_nothing_is_said(http: httpx.Client) -> None:
    assert complete(http, prompt="1" * 30)["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("prompts", [["一", "你好🙂", "The user"], [[5, 6], [7], IDS]])
@pytest.mark.parametrize("echo", [False, True])
def test_many_prompts(http: httpx.Client, prompts: list[Any], echo: bool) -> None:
    body = {"prompt": prompts, "n": 2, "max_tokens": 5, "echo": echo}
    answer = complete(http, **body)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    for number, prompt in enumerate(prompts):
        alone = complete(http, **{**body, "prompt": prompt})
        texts = [choice["text"] for choice in alone["choices"]]
        assert [choice["text"] for choice in answer["choices"][2 * number : 2 * number + 2]] == texts
    streamed = stream(PATH, body, http)
    assert [streamed.texts[i] for i in range(6)] == [choice["text"] for choice in answer["choices"]]
    assert [len(streamed.finishes[i]) for i in range(6)] == [1] * 6


def test_echo(http: httpx.Client) -> None:
    choice = complete(http, prompt="<|im_start|>你好", max_tokens=2, echo=True)["choices"][0]
    assert choice["text"].startswith("<|im_start|>你好") and choice["logprobs"] is None


@pytest.mark.parametrize("n", [1, 3])
def test_echo_with_logprobs(http: httpx.Client, n: int) -> None:
    body = {"prompt": TEXT, "max_tokens": 3, "echo": True, "logprobs": 2, "n": n}
    answer = complete(http, **body)
    for choice in answer["choices"]:
        shape = choice["logprobs"]
        assert choice["text"].startswith(TEXT)
        assert {len(values) for values in shape.values()} == {len(IDS) + 3}
        assert shape["token_logprobs"][0] is None and shape["top_logprobs"][0] is None
        assert all(value <= 0 for value in shape["token_logprobs"][1:])
        assert shape["text_offset"] == sorted(shape["text_offset"])
    streamed = stream(PATH, body, http)
    for choice in answer["choices"]:
        assert streamed.texts[choice["index"]] == choice["text"]
        assert streamed.logprobs[choice["index"]] == choice["logprobs"]["tokens"]


@pytest.mark.parametrize("logprobs", [None, 0, 3])
def test_scoring_a_prompt_generates_nothing(http: httpx.Client, logprobs: int | None) -> None:
    body = {"prompt": TEXT, "max_tokens": 0, "echo": True, "logprobs": logprobs}
    answer = complete(http, **body)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (TEXT, "length")
    assert answer["usage"]["completion_tokens"] == 0
    if logprobs is not None:
        assert len(choice["logprobs"]["tokens"]) == len(IDS)
    assert stream(PATH, body, http).texts == {0: TEXT}


def test_logprobs_of_chosen_tokens(http: httpx.Client) -> None:
    """vLLM's `logprob_token_ids`: those tokens stand where the likeliest ones stood, in the order asked for."""
    asked = [IDS[2], IDS[0], IDS[1]]
    body = {"max_tokens": 3, "ignore_eos": True, "logprob_token_ids": asked, "temperature": 0}
    texts = [TOKENIZER.decode([token_id]) for token_id in asked]
    shape = complete(http, **body, prompt=IDS, logprobs=0)["choices"][0]["logprobs"]
    for position, chosen in zip(shape["top_logprobs"], shape["tokens"], strict=True):
        assert list(position)[:3] == texts and set(position) == {*texts, chosen}
    chat = {**body, "messages": [{"role": "user", "content": "x"}], "logprobs": True}
    answer = http.post("/v1/chat/completions", json=chat).json()["choices"][0]["logprobs"]["content"]
    assert len(answer) == 3
    for entry in answer:
        assert [top["token"] for top in entry["top_logprobs"]] == texts
        assert all(top["logprob"] < 0 for top in entry["top_logprobs"])


def test_prompt_logprobs_in_vllms_shape(http: httpx.Client) -> None:
    entries = complete(http, prompt=IDS, max_tokens=1, prompt_logprobs=2)["choices"][0]["prompt_logprobs"]
    assert entries[0] is None and len(entries) == len(IDS)
    assert all(
        set(entry[str(i)]) == {"logprob", "rank", "decoded_token"}
        for entry, i in zip(entries, IDS, strict=True)
        if entry
    )


def test_ids_that_only_the_model_has(http: httpx.Client) -> None:
    """Embeddings have padding rows; they are shown as nothing, and are no defect."""
    prompt = [PADDING_ID, *IDS]
    body = {"prompt": prompt, "max_tokens": len(prompt), "echo": True, "logprobs": 20}
    answer = complete(http, **body)
    assert answer["choices"][0]["text"] == TEXT * 2
    assert stream(PATH, body, http).texts[0] == TEXT * 2
    chat = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 20}
    assert http.post("/v1/chat/completions", json=chat).status_code == 200


def test_stop_ids_and_ignore_eos(http: httpx.Client) -> None:
    choice = complete(http, prompt=IDS, max_tokens=50, stop_token_ids=[IDS[1]])["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"], choice["text"]) == ("stop", IDS[1], "你好")
    choice = complete(http, prompt=IDS, max_tokens=50, ignore_eos=True)["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)
    assert complete(http, prompt=IDS, max_tokens=50, min_tokens=30)["usage"]["completion_tokens"] > 30
