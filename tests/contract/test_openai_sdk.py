"""The official `openai` SDK against real workers: sync, async, streams, errors."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest

from tests.services import MODEL, Service

MESSAGES: Any = [{"role": "user", "content": "你好🙂"}]
ANSWER = "user\n你好🙂\nassistant\n"


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=service.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(service: Service) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=service.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(model=MODEL, messages=MESSAGES)
    choice = completion.choices[0]
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (ANSWER, "assistant", "stop")
    assert completion.id.startswith("chatcmpl-") and completion.object == "chat.completion"
    assert completion.model == MODEL
    assert completion.usage is not None and completion.usage.total_tokens > 0
    assert completion.system_fingerprint is not None and re.fullmatch("fp_[0-9a-f]{12}", completion.system_fingerprint)
    again = client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert again.system_fingerprint == completion.system_fingerprint and again.id != completion.id


def test_chat_stream(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, n=2, stream_options=options)
    )
    text = "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices if c.index == 0)
    assert text == ANSWER
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["stop", "stop"]
    assert chunks[-1].usage is not None and chunks[-1].choices == []


async def test_async_chat_and_stream(async_client: openai.AsyncOpenAI) -> None:
    whole = await async_client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert whole.choices[0].message.content == ANSWER

    async def read() -> str:
        stream = await async_client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert await asyncio.gather(*(read() for _ in range(32))) == [ANSWER] * 32


def test_the_sdks_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == ANSWER


def test_an_answer_can_be_sent_back(client: openai.OpenAI) -> None:
    message = client.chat.completions.create(model=MODEL, messages=MESSAGES).choices[0].message
    again = client.chat.completions.create(model=MODEL, messages=[*MESSAGES, message, *MESSAGES], max_tokens=2)
    assert again.choices[0].finish_reason == "length"


def test_logprobs(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=3)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and completion.usage is not None
    assert len(logprobs.content) == completion.usage.completion_tokens
    assert all(len(entry.top_logprobs) == 3 and entry.logprob <= 0 for entry in logprobs.content)


def test_completions(client: openai.OpenAI) -> None:
    completion = client.completions.create(model=MODEL, prompt="你好", max_tokens=50)
    assert completion.choices[0].text == "你好" and completion.choices[0].finish_reason == "stop"
    stream = client.completions.create(model=MODEL, prompt="你好", max_tokens=50, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "你好"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_errors_are_the_sdks_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=MESSAGES)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("nope")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=9)
    assert (bad.value.code, bad.value.param) == ("invalid_value", "temperature")
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body={"cheese": 1})
    assert (bad.value.code, bad.value.param) == ("unknown_parameter", "cheese")


def test_request_ids(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=MESSAGES, extra_headers={"X-Request-Id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"
    assert client.chat.completions.create(model=MODEL, messages=MESSAGES)._request_id


def test_settings_of_generate_as_extra_body(client: openai.OpenAI) -> None:
    extra = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 1, "num_beams": 1}
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=MESSAGES, temperature=0.15, extra_body=extra
    )
    usage = raw.parse().usage
    assert raw.headers["x-ignored-params"] == "temperature"
    assert usage is not None and usage.completion_tokens == 3
    assert usage.prompt_tokens_details is not None and usage.prompt_tokens_details.cached_tokens == 0


def test_a_deadline_is_the_sdks_own_error(client: openai.OpenAI) -> None:
    extra: Any = {"timeout": 1e-6, "ignore_eos": True}
    with pytest.raises(openai.InternalServerError) as late:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=300, extra_body=extra)
    assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")
    with pytest.raises(openai.APIError) as late_stream:
        list(
            client.chat.completions.create(
                model=MODEL, messages=MESSAGES, max_tokens=300, extra_body=extra, stream=True
            )
        )
    assert late_stream.value.code == "deadline_exceeded"
