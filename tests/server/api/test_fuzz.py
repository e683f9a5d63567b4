"""Random bodies from the real parameter names: any answer but a 5xx, and never a hang."""

import httpx
from hypothesis import given, settings
from hypothesis import strategies as st

from server.api.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

NUMBERS = st.one_of(
    st.integers(-3, 30),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([2**31, 2**63, -(2**63), 2**64, 1e308, 0.0, -0.0]),
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
LIKELY = {
    "model": st.one_of(st.none(), TEXT),
    "messages": st.lists(
        st.dictionaries(
            st.sampled_from(["role", "content", "name", "tool_calls", "refusal", "x"]),
            st.one_of(st.sampled_from(["user", "assistant", "system", "tool"]), TEXT, ANYTHING),
        ),
        max_size=3,
    ),
    "prompt": st.one_of(TEXT, st.lists(st.integers(0, 500), max_size=4), st.lists(TEXT, max_size=3)),
    "tokens": st.lists(st.integers(0, 500), max_size=5),
    "chat_template_kwargs": st.dictionaries(
        st.sampled_from(["self", "tools", "x", "loop", "raise_exception"]), ANYTHING
    ),
    "logit_bias": st.dictionaries(st.one_of(TEXT, st.integers().map(str)), NUMBERS, max_size=3),
    "stream": st.booleans(),
    "n": st.integers(0, 5),
    "stop": st.one_of(TEXT, st.lists(TEXT, max_size=3)),
}
KINDS = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
REQUIRED = {
    "messages": [{"role": "user", "content": "你好"}],
    "prompt": "你好",
    "tokens": [5],
}


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, dict[str, object]]:
    """A path and a body: some parameters with fitting or wild values, on a base that alone would be right."""
    path = draw(st.sampled_from(sorted(KINDS)))
    names = sorted({*KINDS[path].model_fields, *KINDS[path].neutral, "unheard_of"})
    chosen = draw(st.lists(st.sampled_from(names), max_size=5, unique=True))
    base = {name: REQUIRED[name] for name, field in KINDS[path].model_fields.items() if field.is_required()}
    return path, {**base, **{name: draw(st.one_of(LIKELY.get(name, ANYTHING), NUMBERS, ANYTHING)) for name in chosen}}


@settings(max_examples=300)
@given(calls())
def test_no_body_is_a_server_error(http: httpx.Client, call: tuple[str, dict[str, object]]) -> None:
    path, body = call
    response = http.post(path, json=body, timeout=10)
    may_be_late = {504} if "timeout" in body else set()
    assert response.status_code in {200, 400, 404} | may_be_late, response.text
    if response.status_code != 200:
        assert isinstance(response.json()["error"]["code"], str)
    elif body.get("stream") is True and path.startswith("/v1"):
        assert response.text.endswith("data: [DONE]\n\n") or (may_be_late and '"deadline_exceeded"' in response.text)


@settings(max_examples=50)
@given(st.sampled_from(sorted(KINDS)), st.binary(max_size=60))
def test_no_bytes_are_a_server_error(http: httpx.Client, path: str, body: bytes) -> None:
    assert http.post(path, content=body, timeout=10).status_code == 400
