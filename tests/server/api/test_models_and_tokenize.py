"""`/v1/models`, `/tokenize`, `/detokenize`, health: shapes."""

from typing import Any

import httpx
import pytest

from tests.models import CONTEXT, make_tokenizer
from tests.services import MODEL, Service

TOKENIZER = make_tokenizer()


def test_the_base_model(http: httpx.Client) -> None:
    listed = http.get("/v1/models").json()
    assert listed["object"] == "list" and len(listed["data"]) == 1
    card = listed["data"][0]
    created = card.pop("created")
    assert isinstance(created, int)
    assert card == {
        "id": MODEL,
        "object": "model",
        "owned_by": "qloop",
        "root": MODEL,
        "parent": None,
        "max_model_len": CONTEXT,
    }


@pytest.mark.parametrize("path", ["/v1/models/tiny/chat", "/v1/models/tiny%2Fchat", "/v1/models/tiny%2fchat"])
def test_ids_with_slashes(http: httpx.Client, path: str) -> None:
    assert http.get(path).json()["id"] == MODEL


@pytest.mark.parametrize("text", ["你好🙂", "", "a<|im_start|>b\n", "x" * 5_000])
def test_tokenize_and_back(http: httpx.Client, text: str) -> None:
    answer = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == TOKENIZER.encode(text).ids
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == CONTEXT
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}


def test_tokenize_a_chat(http: httpx.Client) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "<|im_end|>"}], "model": MODEL}
    answer = http.post("/tokenize", json=body).json()
    usage = http.post("/v1/chat/completions", json={**body, "max_tokens": 1}).json()["usage"]
    assert answer["count"] == usage["prompt_tokens"] and answer["token_strs"] is None
    assert answer["tokens"].count(TOKENIZER.token_to_id("<|im_end|>")) == 1  # the template's; the user's is text
    without = http.post("/tokenize", json={**body, "add_generation_prompt": False}).json()
    assert without["count"] < answer["count"]


def test_health(http: httpx.Client, service: Service) -> None:
    assert http.get("/livez").json() == {"status": "ok"}
    ready = http.get("/readyz").json()
    assert ready == {"status": "ready", "model": MODEL, "engine_pid": service.engine.pid}


def test_request_ids(http: httpx.Client) -> None:
    assert http.get("/livez", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for bad in (b"", b"a b", b"x" * 129, b"\xe9"):
        made = http.get("/nope", headers={b"X-Request-Id": bad}).headers["x-request-id"]
        assert made and made.encode() != bad


def test_the_page(http: httpx.Client) -> None:
    response = http.get("/")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/html")
