"""For any text: the joined stream is the whole answer's text, and the stream keeps its rules."""

import unicodedata
from typing import Any

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.server.api.sse_reader import Streamed, stream

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CHARACTERS = st.one_of(
    st.sampled_from("你好世界睡不着怎么办。，？"),
    st.sampled_from("abcAB 12\n\t<|>im_end"),
    st.sampled_from("🙂👩‍👩‍👧‍👦🏳️‍🌈e\u0301n\u0303\u0308한글\u200d\ufeff"),
    st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"),
)
PIECES = st.sampled_from(["你好", "<|im_end|>", "🙂🙂", "aab", "ab", "\n\n", "The user "])
TEXTS = st.one_of(
    st.text(CHARACTERS, min_size=1, max_size=40),
    st.lists(PIECES, min_size=1, max_size=10).map("".join),
)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A text and the parameters around it; stop strings are mostly taken from the text, whole and overlapping."""
    text = draw(TEXTS)
    body: dict[str, Any] = {
        "n": draw(st.integers(1, 3)),
        "max_tokens": draw(st.one_of(st.just(200), st.integers(1, 30))),
        "include_stop_str_in_output": draw(st.booleans()),
    }
    if draw(st.booleans()):
        body["stop"] = draw(st.lists(_stops(text), min_size=1, max_size=4))
    usage = draw(st.sampled_from([None, {}, {"include_usage": True}, "continuous", {"include_usage": False}]))
    if usage is not None:
        both = {"include_usage": True, "continuous_usage_stats": True}
        body["stream_options"] = both if usage == "continuous" else usage
    return text, body


def _stops(text: str) -> st.SearchStrategy[str]:
    places = st.tuples(st.integers(0, len(text) - 1), st.integers(1, 6))
    taken = places.map(lambda place: unicodedata.normalize("NFC", text[place[0] : place[0] + place[1]]) or "x")
    return st.one_of(taken, st.just(text), st.sampled_from(["\n", "assistant", "r\n", "🙂", "没有"]))


def expected_text(full: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The rule said slowly: the first stop string to be complete ends the text, of several the longest."""
    for end in range(1, len(full) + 1):
        found = [stop for stop in stops if full[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return full[: end if include else end - len(longest)], longest
    return full, None


def whole(url: str, body: dict[str, Any], http: httpx.Client) -> dict[str, Any]:
    response = http.post(url, json={k: v for k, v in body.items() if k != "stream_options"})
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


def assert_same(streamed: Streamed, answer: dict[str, Any], body: dict[str, Any]) -> None:
    choices = answer["choices"]
    assert [choice["index"] for choice in choices] == list(range(body["n"]))
    for choice in choices:
        index = choice["index"]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        assert streamed.texts[index] == text
        assert "\ufffd" not in text
        assert streamed.finishes[index] == [choice["finish_reason"]]
        assert streamed.stop_reasons[index] == choice["stop_reason"]
    assert set(streamed.texts) == set(streamed.finishes) == set(range(body["n"]))
    assert (streamed.num_done, streamed.errors) == (1, [])
    assert len({chunk["id"] for chunk in streamed.chunks}) == 1
    assert_usage(streamed.chunks, answer["usage"], body.get("stream_options") or {})


def assert_usage(chunks: list[dict[str, Any]], usage: dict[str, int], options: dict[str, bool]) -> None:
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    if not options.get("include_usage"):
        assert not any("usage" in chunk for chunk in chunks)
        assert all(chunk["choices"] for chunk in chunks)
        return
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == usage
    assert all(chunk["choices"] for chunk in chunks[:-1])
    before = [chunk["usage"] for chunk in chunks[:-1]]
    if options.get("continuous_usage_stats"):
        counts = [one["completion_tokens"] for one in before]
        assert counts == sorted(counts) and before[-1] == usage
        assert {one["prompt_tokens"] for one in before} == {usage["prompt_tokens"]}
    else:
        assert set(before) == {None}


@settings(max_examples=200)
@given(bodies())
@example(("你好", {"n": 1, "max_tokens": 200, "stop": ["user\n你好\nassistant\n"]}))  # the whole text
@example(("ababab🙂", {"n": 3, "max_tokens": 200, "stop": ["bab", "abab", "ab", "ab"]}))  # overlapping, twice the same
def test_chat(http: httpx.Client, drawn: tuple[str, dict[str, Any]]) -> None:
    text, body = drawn
    body = {**body, "messages": [{"role": "user", "content": text}]}
    answer = whole(CHAT, body, http)
    streamed = stream(CHAT, body, http)
    assert_same(streamed, answer, body)
    assert streamed.roles == dict.fromkeys(range(body["n"]), 1)
    if body["max_tokens"] == 200:  # room for the whole echo: what must come out is known
        full = unicodedata.normalize("NFC", f"user\n{text}\nassistant\n")
        expected, stop = expected_text(full, body.get("stop", []), body.get("include_stop_str_in_output", False))
        assert (streamed.texts[0], streamed.stop_reasons[0]) == (expected, stop)
        assert streamed.finishes[0] == ["stop"]


@settings(max_examples=100)
@given(TEXTS, st.integers(1, 3), st.one_of(st.none(), st.integers(0, 3)), st.booleans(), st.booleans())
def test_completions(http: httpx.Client, text: str, n: int, logprobs: int | None, echo: bool, usage: bool) -> None:
    body = {
        "prompt": "Say: " + text,  # rotated by up to two ids for the second and third choice: never inside a character
        "n": n,
        "max_tokens": 6,
        "echo": echo,
        "logprobs": logprobs,
        "stream_options": {"include_usage": usage},
    }
    answer = whole(COMPLETIONS, body, http)
    streamed = stream(COMPLETIONS, body, http)
    assert_same(streamed, answer, body)
    for choice in answer["choices"]:
        if logprobs is None:
            assert choice["logprobs"] is None
        else:
            assert streamed.logprobs[choice["index"]] == choice["logprobs"]["tokens"]


@settings(max_examples=60)
@given(TEXTS, st.integers(1, 3), st.integers(0, 5), st.integers(1, 30))
def test_there_is_one_logprob_per_completion_token(
    http: httpx.Client, text: str, n: int, top: int, max_tokens: int
) -> None:
    body = {
        "messages": [{"role": "user", "content": text}],
        "n": n,
        "max_tokens": max_tokens,
        "logprobs": True,
        "top_logprobs": top,
    }
    answer = whole(CHAT, body, http)
    entries = [choice["logprobs"]["content"] for choice in answer["choices"]]
    assert sum(map(len, entries)) == answer["usage"]["completion_tokens"]
    assert all(len(entry["top_logprobs"]) == top for entry in entries[0])
    streamed = stream(CHAT, body, http)
    assert [streamed.logprobs[i] for i in range(n)] == entries
    # The bytes of all tokens are the text, which a limit may have cut inside a character.
    for choice, tokens in zip(answer["choices"], entries, strict=True):
        text_bytes = b"".join(bytes(entry["bytes"]) for entry in tokens if entry["token"] != "<|im_end|>")
        assert text_bytes.decode("utf-8", "ignore") == choice["message"]["content"]


@pytest.mark.parametrize("stream_options", [{"include_usage": True}, None])
def test_a_stop_string_cuts_logprobs_too(http: httpx.Client, stream_options: Any) -> None:
    body = {
        "messages": [{"role": "user", "content": "你好，世界"}],
        "stop": ["世"],
        "logprobs": True,
        "n": 1,
        "stream_options": stream_options,
    }
    answer = whole(CHAT, body, http)
    assert answer["choices"][0]["message"]["content"] == "user\n你好，"
    assert len(answer["choices"][0]["logprobs"]["content"]) == answer["usage"]["completion_tokens"]
    assert_same(stream(CHAT, body, http), answer, body)
