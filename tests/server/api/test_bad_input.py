"""Bad requests: each is a 4xx in OpenAI's envelope that names the place, and the server goes on."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.conftest import StartService
from tests.models import CONTEXT, PADDING_ROWS, make_tokenizer
from tests.services import MODEL

CHAT, COMPLETIONS, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
MESSAGES = [{"role": "user", "content": "你好"}]
VOCAB_SIZE = make_tokenizer().get_vocab_size() + PADDING_ROWS
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def chat(**parameters: Any) -> dict[str, Any]:
    return {"messages": MESSAGES, **parameters}


def assert_error(response: httpx.Response, status: int, code: str | None = None, param: str | None = "any") -> str:
    """The envelope is whole; returns its message."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["code"], str) and isinstance(error["type"], str) and error["message"]
    if code is not None:
        assert error["code"] == code, error
    if param != "any":
        assert error["param"] == param, error
    assert response.headers["x-request-id"]
    message: str = error["message"]
    return message


@pytest.fixture(autouse=True)
def still_answers(http: httpx.Client) -> Iterator[None]:
    """After every bad request the same connection pool gets a good answer."""
    yield
    assert http.post(CHAT, json=chat(max_tokens=1)).status_code == 200


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, TOKENIZE, DETOKENIZE])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"messages": [}',
        b"[]",
        b'"text"',
        b"null",
        b"17",
        b"[" * 100_000,
        b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
        b'{"messages": "\xff\xfe"}',
        b'{"temperature": NaN}',
        b'{"temperature": 1e999}',
        b"\x00\x01\x02",
        b'{"model": "a" "prompt": 1}',
    ],
    ids=lambda body: repr(body[:20]),
)
def test_a_body_that_is_no_json_object(http: httpx.Client, path: str, body: bytes) -> None:
    assert_error(http.post(path, content=body), 400, "invalid_json")


@pytest.mark.parametrize("path", [CHAT, TOKENIZE])
def test_lone_surrogates_are_named(http: httpx.Client, path: str) -> None:
    body = b'{"messages": [{"role": "user", "content": "a\\ud800b"}]}'
    assert "surrogate" in assert_error(http.post(path, content=body), 400, "invalid_json")


def test_nul_and_noncharacters_are_text(http: httpx.Client) -> None:
    text = "a\x00b\ufdd0\uffff\u202e"
    answer = http.post(CHAT, json={"messages": [{"role": "user", "content": text}]}).json()
    assert answer["choices"][0]["message"]["content"] == f"user\n{text}\nassistant\n"
    answer = http.post(COMPLETIONS, json={"prompt": text, "max_tokens": 200}).json()
    assert answer["choices"][0]["text"] == text


BAD_CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "missing_required_parameter", "messages"),
    ({"messages": []}, "invalid_value", "messages"),
    ({"messages": None}, "invalid_value", "messages"),
    ({"messages": "你好"}, "invalid_value", "messages"),
    ({"messages": [17]}, "invalid_value", "messages[0]"),
    ({"messages": [{}]}, "missing_required_parameter", "messages[0].role"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "invalid_value", "messages[0].role"),
    ({"messages": [*MESSAGES, {"role": 5, "content": "x"}]}, "invalid_value", "messages[1].role"),
    ({"messages": [{"role": "user"}]}, "invalid_value", "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "invalid_value", "messages[0].content"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "invalid_value", "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "unknown_parameter", "messages[0].mood"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "unsupported_parameter", "messages[0]"),
    (
        {"messages": [{"role": "assistant", "content": None, "refusal": "no"}]},
        "unsupported_parameter",
        "messages[0].refusal",
    ),
    (chat(model=5), "invalid_value", "model"),
    (chat(n=0), "invalid_value", "n"),
    (chat(n=129), "invalid_value", "n"),
    (chat(n="2"), "invalid_value", "n"),
    (chat(n=1.5), "invalid_value", "n"),
    (chat(n=True), "invalid_value", "n"),
    (chat(stop=""), "invalid_value", "stop"),
    (chat(stop=["a", ""]), "invalid_value", "stop[1]"),
    (chat(stop=["a"] * 17), "invalid_value", "stop"),
    (chat(stop=["a" * 257]), "invalid_value", "stop[0]"),
    (chat(stop=7), "invalid_value", "stop"),
    (chat(logprobs=5), "invalid_value", "logprobs"),
    (chat(logprobs=True, top_logprobs=21), "invalid_value", "top_logprobs"),
    (chat(logprobs=True, top_logprobs=-1), "invalid_value", "top_logprobs"),
    (chat(top_logprobs=2), "invalid_value", "top_logprobs"),
    (chat(prompt_logprobs=21), "invalid_value", "prompt_logprobs"),
    (chat(prompt_logprobs=1, stream=True), "invalid_value", "prompt_logprobs"),
    (chat(logprob_token_ids=[5]), "invalid_value", "logprob_token_ids"),
    (chat(logprob_token_ids=[5] * 21, logprobs=True), "invalid_value", "logprob_token_ids"),
    (chat(logprob_token_ids=[VOCAB_SIZE], logprobs=True), "invalid_request", "logprob_token_ids"),
    (chat(logit_bias={"5": 101}), "invalid_value", "logit_bias"),
    (chat(logit_bias={"five": 1}), "invalid_request", "logit_bias"),
    (chat(logit_bias={"-1": 1}), "invalid_request", "logit_bias"),
    (chat(logit_bias={"٥": 1}), "invalid_request", "logit_bias"),
    (chat(logit_bias={"9" * 5000: 1}), "invalid_request", "logit_bias"),
    (chat(logit_bias={str(VOCAB_SIZE): 1}), "invalid_request", "logit_bias"),
    (chat(logit_bias=[5]), "invalid_value", "logit_bias"),
    (chat(stop_token_ids=[VOCAB_SIZE]), "invalid_request", "stop_token_ids"),
    (chat(stop_token_ids=[-1]), "invalid_value", "stop_token_ids[0]"),
    (chat(temperature=2.01), "invalid_value", "temperature"),
    (chat(temperature=-0.1), "invalid_value", "temperature"),
    (chat(temperature="0.5"), "invalid_value", "temperature"),
    (chat(top_p=0), "invalid_value", "top_p"),
    (chat(top_p=1.1), "invalid_value", "top_p"),
    (chat(top_k=-2), "invalid_value", "top_k"),
    (chat(min_p=1.5), "invalid_value", "min_p"),
    (chat(repetition_penalty=0), "invalid_value", "repetition_penalty"),
    (chat(presence_penalty=2.5), "invalid_value", "presence_penalty"),
    (chat(frequency_penalty=-2.5), "invalid_value", "frequency_penalty"),
    (chat(seed=2**63), "invalid_value", "seed"),
    (chat(seed=10**300), "invalid_value", "seed"),
    (chat(seed=1.5), "invalid_value", "seed"),
    (chat(max_tokens=0), "invalid_value", "max_tokens"),
    (chat(max_tokens=-1), "invalid_value", "max_tokens"),
    (chat(max_completion_tokens=0), "invalid_value", "max_completion_tokens"),
    (chat(max_tokens=10**12), "invalid_value", "max_tokens"),
    (chat(max_tokens=3, min_tokens=4), "invalid_request", "min_tokens"),
    (chat(min_tokens=-1), "invalid_value", "min_tokens"),
    (chat(stream="yes"), "invalid_value", "stream"),
    (chat(stream_options={"include_usage": True}), "invalid_value", "stream_options"),
    (chat(stream=True, stream_options={"include_usage": "yes"}), "invalid_value", "stream_options.include_usage"),
    (chat(stream=True, stream_options={"cheese": 1}), "unknown_parameter", "stream_options.cheese"),
    (chat(user=5), "invalid_value", "user"),
    (chat(metadata={"a": 5}), "invalid_value", "metadata.a"),
    (chat(chat_template_kwargs={"messages": []}), "invalid_request", "chat_template_kwargs"),
    (chat(chat_template_kwargs={"self": 1}), "invalid_request", "chat_template_kwargs"),
    (chat(guided_json={}), "unknown_parameter", "guided_json"),
    (chat(temprature=1), "unknown_parameter", "temprature"),
    (chat(tools=[{"type": "function", "function": {"name": "f"}}]), "unsupported_parameter", "tools"),
    (chat(tool_choice="required"), "unsupported_parameter", "tool_choice"),
    (chat(response_format={"type": "json_object"}), "unsupported_parameter", "response_format"),
    (chat(audio={"voice": "x"}), "unsupported_parameter", "audio"),
    (chat(reasoning_effort="high"), "unsupported_parameter", "reasoning_effort"),
]


@pytest.mark.parametrize(("body", "code", "param"), BAD_CHATS, ids=lambda value: str(value)[:60])
def test_bad_chats(http: httpx.Client, body: dict[str, Any], code: str, param: str) -> None:
    message = assert_error(http.post(CHAT, json=body), 400, code, param)
    assert param in message or code == "invalid_request" or param.partition(".")[0] in message


BAD_COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "missing_required_parameter", "prompt"),
    ({"prompt": None}, "invalid_value", "prompt"),
    ({"prompt": ""}, "invalid_value", "prompt"),
    ({"prompt": []}, "invalid_value", "prompt"),
    ({"prompt": [[]]}, "invalid_value", "prompt"),
    ({"prompt": ["x", ""]}, "invalid_value", "prompt"),
    ({"prompt": ["x"] * 129}, "invalid_value", "prompt"),
    ({"prompt": [VOCAB_SIZE]}, "invalid_request", "prompt"),
    ({"prompt": "x", "max_tokens": 0}, "invalid_value", "max_tokens"),
    ({"prompt": "x", "logprobs": 21}, "invalid_value", "logprobs"),
    ({"prompt": "x", "logprobs": True}, "invalid_value", "logprobs"),
    ({"prompt": "x", "best_of": 2}, "unsupported_parameter", "best_of"),
    ({"prompt": "x", "suffix": "y"}, "unsupported_parameter", "suffix"),
    ({"prompt": "x", "messages": MESSAGES}, "unknown_parameter", "messages"),
]


@pytest.mark.parametrize(("body", "code", "param"), BAD_COMPLETIONS, ids=lambda value: str(value)[:60])
def test_bad_completions(http: httpx.Client, body: dict[str, Any], code: str, param: str) -> None:
    assert_error(http.post(COMPLETIONS, json=body), 400, code, param)


@pytest.mark.parametrize("prompt", [[-1], [1, "x"], [True], [[1], "x"], {"a": 1}, [None], [[["x"]]], [2**40], 1.5])
def test_prompts_of_a_wrong_type_name_the_prompt(http: httpx.Client, prompt: object) -> None:
    response = http.post(COMPLETIONS, json={"prompt": prompt})
    assert_error(response, 400, "invalid_value")
    assert response.json()["error"]["param"].startswith("prompt")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (TOKENIZE, {}),
        (TOKENIZE, {"prompt": "x", "messages": MESSAGES}),
        (TOKENIZE, {"messages": []}),
        (TOKENIZE, {"prompt": 5}),
        (TOKENIZE, {"prompt": "x", "temperature": 1}),
        (DETOKENIZE, {}),
        (DETOKENIZE, {"tokens": "x"}),
        (DETOKENIZE, {"tokens": [VOCAB_SIZE]}),
        (DETOKENIZE, {"tokens": [2**40]}),
        (DETOKENIZE, {"tokens": [-1]}),
    ],
    ids=str,
)
def test_bad_tokenize_calls(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    assert_error(http.post(path, json=body), 400)


@pytest.mark.parametrize(
    ("path", "extra"),
    [(CHAT, chat()), (COMPLETIONS, {"prompt": "x"}), (TOKENIZE, {"prompt": "x"}), (DETOKENIZE, {"tokens": [1]})],
)
@pytest.mark.parametrize("name", ["nope", "", MODEL + "@0123456789ab", "../x", "名", "x" * 10_000])
def test_unknown_models(http: httpx.Client, path: str, extra: dict[str, Any], name: str) -> None:
    assert_error(http.post(path, json={**extra, "model": name}), 404, "model_not_found", "model")


@pytest.mark.parametrize("name", ["nope", "a/b/c", "a%2Fb", "ft:x:y", "%E5%90%8D", "%ff", MODEL + "@x"])
def test_unknown_models_by_path(http: httpx.Client, name: str) -> None:
    assert_error(http.get(f"/v1/models/{name}"), 404, "model_not_found", "model")


def test_too_long_says_both_counts(http: httpx.Client) -> None:
    ids = [1] * 500
    message = assert_error(
        http.post(COMPLETIONS, json={"prompt": ids, "max_tokens": 13}), 400, "context_length_exceeded", "max_tokens"
    )
    assert all(str(count) in message for count in (CONTEXT, 513, 500, 13))
    long = [{"role": "user", "content": "1 " * CONTEXT}]
    for body in ({"messages": long}, {"messages": long, "max_tokens": 5}, {"messages": long, "stream": True}):
        message = assert_error(http.post(CHAT, json=body), 400, "context_length_exceeded")
        assert str(CONTEXT) in message
    assert http.post(COMPLETIONS, json={"prompt": ids, "max_tokens": CONTEXT - 500}).status_code == 200


def test_one_bad_prompt_of_many_refuses_all(http: httpx.Client) -> None:
    body = {"prompt": ["x", "1" * (CONTEXT + 1)], "max_tokens": 4}
    assert_error(http.post(COMPLETIONS, json=body), 400, "context_length_exceeded")


NEUTRAL: dict[str, Any] = {
    "audio": None,
    "frequency_penalty": 0,
    "function_call": "auto",
    "functions": [],
    "logit_bias": {},
    "logprobs": False,
    "max_completion_tokens": None,
    "metadata": {"a": "b"},
    "modalities": ["text"],
    "n": 1,
    "parallel_tool_calls": True,
    "prediction": None,
    "presence_penalty": 0,
    "reasoning_effort": "medium",
    "response_format": {"type": "text"},
    "seed": None,
    "service_tier": "auto",
    "stop": None,
    "store": False,
    "stream": False,
    "stream_options": None,
    "temperature": 1,
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1,
    "user": "someone",
    "anything_at_all": None,
}


def test_openai_defaults_and_nulls_are_fine(http: httpx.Client) -> None:
    for name, value in NEUTRAL.items():
        for given in (value, None):
            response = http.post(CHAT, json=chat(max_tokens=1, **{name: given}))
            assert response.status_code == 200, (name, given, response.text)
            assert "x-ignored-params" not in response.headers
    assert http.post(CHAT, json={**chat(**NEUTRAL), "max_tokens": 1}).status_code == 200


def test_the_sdks_own_messages_can_be_sent_back(http: httpx.Client) -> None:
    answer = {"role": "assistant", "content": "好", "refusal": None, "annotations": [], "audio": None}
    answer |= {"function_call": None, "tool_calls": None}
    body = {"messages": [*MESSAGES, answer, *MESSAGES], "max_tokens": 1}
    assert http.post(CHAT, json=body).status_code == 200


def test_duplicate_stop_strings_and_text_parts_are_fine(http: httpx.Client) -> None:
    parts = [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]
    body = {"messages": [{"role": "user", "content": parts}], "stop": ["好", "好"]}
    assert http.post(CHAT, json=body).json()["choices"][0]["stop_reason"] == "好"


@pytest.mark.parametrize("path", ["/nope", "/v1", "/v1/chat", "/v1/chat/completions/x", "/v2/models", "/metrics2"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_unknown_paths(http: httpx.Client, method: str, path: str) -> None:
    assert_error(http.request(method, path), 404, "not_found", None)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", CHAT),
        ("PUT", CHAT),
        ("DELETE", COMPLETIONS),
        ("GET", TOKENIZE),
        ("OPTIONS", CHAT),
        ("POST", "/v1/models"),
        ("POST", "/livez"),
        ("POST", "/metrics"),
        ("POST", "/"),
        ("PROPFIND", CHAT),
    ],
)
def test_wrong_methods(http: httpx.Client, method: str, path: str) -> None:
    response = http.request(method, path)
    assert_error(response, 405, "method_not_allowed", None)
    assert response.headers["allow"]


LIMIT = 1024 * 1024  # the shared service's max_body_mib


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, TOKENIZE, DETOKENIZE])
def test_a_body_over_the_limit(service: Any, path: str) -> None:
    body = json.dumps(chat(user="x" * LIMIT)).encode()
    with httpx.Client(base_url=service.url) as client:  # the server may close this connection
        assert_error(client.post(path, content=body), 413, "body_too_large", None)

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(body), 64 * 1024):
            yield body[start : start + 64 * 1024]

    with httpx.Client(base_url=service.url) as client:
        response = client.post(path, content=pieces())
        assert "content-length" not in response.request.headers
        assert_error(response, 413, "body_too_large", None)


def test_a_body_at_the_limit_is_read(http: httpx.Client) -> None:
    body = json.dumps(chat(max_tokens=1)).encode()
    assert http.post(CHAT, content=body + b" " * (LIMIT - len(body))).status_code == 200


def test_errors_come_before_a_stream_begins(http: httpx.Client) -> None:
    for body, status in ((chat(n=0), 400), (chat(model="nope"), 404), (chat(max_tokens=CONTEXT), 400)):
        response = http.post(CHAT, json={**body, "stream": True})
        assert response.headers["content-type"] == "application/json"
        assert_error(response, status)


def test_lenient_servers_ignore_unknown_parameters_and_say_so(start_service: StartService) -> None:
    service = start_service(unknown_params="warn")
    odd = {"guided_json": {}, "温度": 1, "a\r\nX-Evil: 1": 2, "tools": [{"type": "function"}], "x" * 10_000: 1}
    messages = [{"role": "user", "content": "x", "id": "m1"}]
    with httpx.Client(base_url=service.url) as client:
        for path, body in ((CHAT, {"messages": messages}), (COMPLETIONS, {"prompt": "x"}), (TOKENIZE, {"prompt": "x"})):
            response = client.post(path, json={**body, **odd})
            assert response.status_code == 200, response.text
            names = response.headers["x-ignored-params"].split(", ")
            assert {"guided_json", "tools", "%E6%B8%A9%E5%BA%A6", "a%0D%0AX-Evil:%201"} <= set(names)
            assert ("messages[].id" in names) == (path == CHAT)
            assert "x-evil" not in response.headers
        response = client.post(CHAT, json={"messages": messages, "stream": True, "cheese": 1})
        assert response.headers["x-ignored-params"] == "cheese, messages[].id"
        many = {f"p{i}": i for i in range(5_000)}
        response = client.post(CHAT, json={"messages": MESSAGES, **many})
        assert response.status_code == 200 and response.headers["x-ignored-params"].endswith("...")
        assert_error(client.post(CHAT, json={"messages": messages, "n": 0}), 400, "invalid_value", "n")
