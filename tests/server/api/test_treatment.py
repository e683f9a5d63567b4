"""Tenants and their prefixes, cached tokens in usage, priority, deadlines: what the engine is told and says."""

import asyncio
import base64
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.api.near import near_server
from tests.server.api.sse_reader import read_stream
from tests.server.api.test_load import LONG, is_empty
from tests.services import Service, wait_until

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PROMPT = {"prompt": "你好", "max_tokens": 2}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def test_tenants_never_share_a_salt_and_keys_never_leave(fake_model: Path) -> None:
    keys = ("first-key", "second-key")
    async with near_server(fake_model, api_keys=keys) as (backend, http):

        async def salt(key: str, path: str = COMPLETIONS, **given: Any) -> str:
            body = {**PROMPT, **given} if path == COMPLETIONS else {"messages": LONG["messages"], **given}
            assert (await http.post(path, json=body, headers=bearer(key))).status_code == 200
            return backend.requests[-1].cache_salt

        seen = {
            (key, given): await salt(key, cache_salt=given) for key in keys for given in (None, "a", "b", "first-key")
        }
        assert len(set(seen.values())) == len(seen), "one salt for each key and value"
        for (key, given), value in seen.items():
            assert await salt(key, CHAT, cache_salt=given) == value, "the same in every request and endpoint"
            assert len(value) == 64 and not any(other in value for other in keys)
        basic = base64.b64encode(b"anyone:first-key").decode()
        await http.post(COMPLETIONS, json=PROMPT, headers={"Authorization": f"Basic {basic}"})
        assert backend.requests[-1].cache_salt == seen["first-key", None], "however the key was sent"


async def test_without_keys_only_the_callers_salt_counts(fake_model: Path) -> None:
    async with near_server(fake_model) as (backend, http):
        for given in (None, "a", "b"):
            await http.post(COMPLETIONS, json={**PROMPT, "cache_salt": given}, headers=bearer("whatever"))
        salts = [request.cache_salt for request in backend.requests]
        assert salts[0] == "" and len(set(salts)) == 3


@pytest.mark.parametrize("is_stream", [False, True])
async def test_cached_tokens_in_usage(fake_model: Path, is_stream: bool) -> None:
    """Of each prompt once, however many choices it has."""
    async with near_server(fake_model) as (backend, http):
        body = {"prompt": ["你好", "你"], "max_tokens": 2, "n": 2, "stream": is_stream}
        if is_stream:
            body["stream_options"] = {"include_usage": True}

        async def usage() -> dict[str, Any]:
            response = await http.post(COMPLETIONS, json=body)
            answer = read_stream(response.text).chunks[-1] if is_stream else response.json()
            result: dict[str, Any] = answer["usage"]
            return result

        assert "prompt_tokens_details" not in await usage()
        for count in (0, 3):
            backend.num_cached_tokens = count
            assert (await usage())["prompt_tokens_details"] == {"cached_tokens": 2 * count}


async def test_engine_counters_in_metrics(fake_model: Path) -> None:
    async with near_server(fake_model) as (_, http):
        text, deadline = "", time.monotonic() + 10
        while "qloop_cached_tokens_total 12345.0" not in text:  # it comes with the engine's first heartbeat
            assert time.monotonic() < deadline, text
            await asyncio.sleep(0.01)
            text = (await http.get("/metrics")).text
        assert "# TYPE qloop_cached_tokens_total counter" in text and "qloop_preemptions_total 67.0" in text


async def test_priority_and_timeout_reach_the_engine(fake_model: Path) -> None:
    async with near_server(fake_model) as (backend, http):
        for given, header, expected in (
            ({}, None, (0, None)),
            ({"priority": -7, "timeout": 20}, None, (-7, 20.0)),
            ({"priority": 3}, "12.5", (3, 12.5)),
            ({"timeout": 20}, "30", (0, 20.0)),  # both hold: the earlier one ends it
            ({"timeout": 20.5}, "10", (0, 10.0)),
        ):
            headers = {"X-Request-Timeout": header} if header else {}
            response = await http.post(COMPLETIONS, json={**PROMPT, **given}, headers=headers)
            assert response.status_code == 200, response.text
            assert (backend.requests[-1].priority, backend.requests[-1].deadline_s) == expected


@pytest.mark.parametrize("value", ["", "soon", "0", "-1", "nan", "inf", "5s"])
def test_a_timeout_header_must_be_seconds(http: httpx.Client, value: str) -> None:
    response = http.post(COMPLETIONS, json=PROMPT, headers={"X-Request-Timeout": value})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_value", "X-Request-Timeout")


@pytest.mark.parametrize("is_queued", [False, True])
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_deadline_ends_the_answer_and_frees_the_engine(
    slow_service: Service, is_queued: bool, is_stream: bool
) -> None:
    """50 tokens a second: 400 tokens would take 8 s. Queued: behind four others whose own deadline is later."""
    wait_until(lambda: is_empty(slow_service), 20, "an idle engine")
    url = slow_service.url + CHAT
    with httpx.Client(timeout=30) as client:
        if is_queued:
            blocker = client.send(client.build_request("POST", url, json={**LONG, "n": 4, "stream": True}), stream=True)
        start = time.monotonic()
        response = client.post(url, json={**LONG, "stream": is_stream}, headers={"X-Request-Timeout": "0.3"})
        assert 0.25 < time.monotonic() - start < 4
        if is_queued:
            blocker.close()
    if is_stream:
        streamed = read_stream(response.text)
        assert (response.status_code, streamed.num_done, len(streamed.errors)) == (200, 0, 1)
        assert "".join(streamed.texts.values()) == "" if is_queued else "".join(streamed.texts.values())
        error = streamed.errors[0]
    else:
        assert response.status_code == 504
        error = response.json()["error"]
    assert (error["code"], error["type"]) == ("deadline_exceeded", "timeout_error")
    wait_until(lambda: is_empty(slow_service), 3, "nothing running or waiting")
