"""Nothing that a model, a server or a reader writes can become markup, script or a foreign request."""

import pytest

from tests.browser.conftest import ChatPage
from tests.browser.stand_in import StandIn, envelope

pytestmark = pytest.mark.browser

PAYLOADS = [
    "<script>globalThis.hit = 1</script>",
    "<img src=x onerror='globalThis.hit = 1'>",
    "<img src='https://evil.example/pixel.gif'>",
    "<svg onload='globalThis.hit = 1'><animate onbegin='globalThis.hit = 1' attributeName=x dur=1s>",
    "<iframe srcdoc='<script>parent.hit = 1</script>'></iframe>",
    "<iframe src='javascript:parent.hit=1'></iframe>",
    "<a href='javascript:globalThis.hit=1' autofocus onfocus='globalThis.hit = 1'>x</a>",
    "<style>body { display: none }</style><link rel=stylesheet href=https://evil.example/x.css>",
    "<meta http-equiv=refresh content='0;url=https://evil.example/'>",
    "<base href='https://evil.example/'>",
    "<form action='https://evil.example/'><button autofocus>x</button></form>",
    "<math><mtext><table><mglyph><style><img src=x onerror='globalThis.hit = 1'>",
    "</textarea></div><script src='https://evil.example/x.js'></script>",
    "<details open ontoggle='globalThis.hit = 1'>",
    "<object data='https://evil.example/'></object><embed src='https://evil.example/'>",
    "![x](https://evil.example/pixel.gif) [y](javascript:alert(1)) `<b>`",
    "{{constructor.constructor('globalThis.hit = 1')()}} ${globalThis.hit = 1} <%= 1 %>",
    "\u202e\u0000<b>\ufeffx</b>",
]


def assert_inert(chat: ChatPage, selector: str) -> None:
    assert chat.page.evaluate("globalThis.hit ?? null") is None
    assert chat.page.locator(f"{selector} *").count() == 0
    assert chat.page.url == chat.address


@pytest.mark.parametrize("payload", PAYLOADS)
def test_markup_in_question_answer_and_error_stays_text(chat: ChatPage, stand_in: StandIn, payload: str) -> None:
    stand_in.deltas = [payload[:7], payload[7:]]
    chat.ask_and_wait(payload)
    assert chat.answers.last.text_content() == payload
    assert chat.page.locator(".question .bubble").text_content() == payload
    stand_in.refuse = (400, envelope(payload, payload), {})
    chat.ask_and_wait("再来")
    assert chat.last_turn.locator(".note").text_content() == f"出错了: {payload} ({payload})"
    assert_inert(chat, ".bubble")
    assert_inert(chat, ".note")


def test_markup_in_model_names_and_list_errors_stays_text(closed_chat: ChatPage, stand_in: StandIn) -> None:
    chat = closed_chat
    stand_in.models = [{"id": p, "object": "model", "parent": None if n % 2 else p} for n, p in enumerate(PAYLOADS)]
    chat.open()
    chat.model.select_option(PAYLOADS[1])
    chat.ask_and_wait("你好")
    assert stand_in.requests[-1]["model"] == PAYLOADS[1]
    assert chat.last_turn.locator(".note").text_content() == PAYLOADS[1]
    assert_inert(chat, "option")
    assert_inert(chat, ".note")


def test_policy_stops_what_gets_in_anyway(closed_chat: ChatPage) -> None:
    """The control: a foreign image, an inline handler and a markup sink are refused, and the test sees it."""
    chat = closed_chat
    chat.open()
    chat.page.evaluate("new Image().src = 'https://evil.example/pixel.gif'")
    refused = chat.page.evaluate(
        """() => {
          try { document.body.innerHTML = "<b>x</b>"; return false; } catch (e) { return e instanceof TypeError; }
        }"""
    )
    assert refused
    chat.page.wait_for_timeout(50)
    assert any(v.startswith("img-src https://evil.example") for v in chat.violations())
    assert any(v.startswith("require-trusted-types-for") for v in chat.violations())
    chat.page.evaluate("violations.length = 0")
    chat.requests[:] = [url for url in chat.requests if "evil.example" not in url]
