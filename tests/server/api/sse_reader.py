"""Reads a stream strictly, as the WHATWG's text says, and checks what holds for every stream of ours."""

import json
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Streamed:
    """One whole stream: `texts[i]` is choice i's joined text."""

    chunks: list[dict[str, Any]] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)
    roles: dict[int, int] = field(default_factory=dict)
    finishes: dict[int, list[str]] = field(default_factory=dict)
    stop_reasons: dict[int, Any] = field(default_factory=dict)
    logprobs: dict[int, list[Any]] = field(default_factory=dict)
    errors: list[dict[str, Any]] = field(default_factory=list)
    num_done: int = 0
    num_comments: int = 0


def read_stream(body: str) -> Streamed:
    result = Streamed()
    assert body.endswith("\n\n")
    for event in body[:-2].split("\n\n"):
        if event.startswith(":"):
            result.num_comments += 1
            continue
        assert event.startswith("data: ") and "\n" not in event, event
        assert result.num_done == 0, "an event after [DONE]"
        if event == "data: [DONE]":
            result.num_done += 1
        elif "error" in (chunk := json.loads(event[6:])):
            result.errors.append(chunk["error"])
        else:
            _add(result, chunk)
    return result


def _add(result: Streamed, chunk: dict[str, Any]) -> None:
    result.chunks.append(chunk)
    for choice in chunk["choices"]:
        index = choice["index"]
        assert index not in result.finishes, "a chunk after the finish"
        delta = choice.get("delta", {"content": choice.get("text", "")})
        if "role" in delta:
            assert not result.texts.get(index), "the role comes first"
            result.roles[index] = result.roles.get(index, 0) + 1
        result.texts[index] = result.texts.get(index, "") + (delta.get("content") or "")
        if choice["logprobs"] is not None:
            entries = choice["logprobs"].get("content", choice["logprobs"].get("tokens"))
            result.logprobs.setdefault(index, []).extend(entries)
        if choice["finish_reason"] is not None:
            result.finishes.setdefault(index, []).append(choice["finish_reason"])
            result.stop_reasons[index] = choice["stop_reason"]


def stream(url: str, body: dict[str, Any], client: httpx.Client) -> Streamed:
    response = client.post(url, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return read_stream(response.text)
