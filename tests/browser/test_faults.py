"""When something fails, the page says what and offers a way on."""

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import ChatPage
from tests.browser.stand_in import MODELS, StandIn, envelope

pytestmark = pytest.mark.browser


def error_text(chat: ChatPage) -> str:
    return chat.last_turn.locator(".error-text").text_content() or ""


def test_refusal_shows_the_servers_words_and_code_and_gives_the_question_back(
    chat: ChatPage, stand_in: StandIn
) -> None:
    stand_in.refuse = (400, envelope("The prompt has 600 tokens.", "context_length_exceeded"), {})
    chat.ask_and_wait("很长的问题")
    assert error_text(chat) == "出错了: The prompt has 600 tokens. (context_length_exceeded)"
    expect(chat.box).to_have_value("很长的问题")
    stand_in.refuse = None
    chat.ask_and_wait("短问题")
    assert stand_in.requests[-1]["messages"] == [{"role": "user", "content": "短问题"}]


def test_overload_says_when_to_come_back(chat: ChatPage, stand_in: StandIn) -> None:
    stand_in.refuse = (503, envelope("The queue is full.", "overloaded"), {"Retry-After": "7"})
    chat.ask_and_wait("在吗")
    assert error_text(chat) == "出错了: The queue is full. (overloaded) 请在 7 秒后重试。"


@pytest.mark.parametrize("body", [{}, {"error": "text"}, {"error": {"message": ""}}, [1]])
def test_refusal_in_another_shape_still_has_a_text_and_the_status(
    chat: ChatPage, stand_in: StandIn, body: dict[str, object]
) -> None:
    stand_in.refuse = (502, body, {})
    chat.ask_and_wait("在吗")
    assert error_text(chat) == "出错了: 服务器的回应无法识别。 (502)"


def test_error_in_mid_stream_keeps_the_text_and_the_turn(chat: ChatPage, stand_in: StandIn) -> None:
    stand_in.error_after = envelope("The engine stopped.", "engine_unavailable")
    chat.ask_and_wait("在吗")
    expect(chat.answers.last).to_have_text("你好！")
    assert error_text(chat) == "出错了: The engine stopped. (engine_unavailable)"
    expect(chat.box).to_have_value("")
    stand_in.error_after = None
    chat.ask_and_wait("继续")
    assert [m["role"] for m in stand_in.requests[-1]["messages"]] == ["user", "assistant", "user"]


def test_stream_without_an_end_is_called_incomplete(chat: ChatPage, stand_in: StandIn) -> None:
    stand_in.finish_reason = None
    chat.ask_and_wait("在吗")
    expect(chat.answers.last).to_have_text("你好！")
    assert error_text(chat) == "出错了: 连接中断，回答不完整。"


def test_server_out_of_reach(chat: ChatPage) -> None:
    chat.page.context.set_offline(True)
    chat.ask_and_wait("在吗")
    assert error_text(chat) == "出错了: 连不上服务器，请检查网络后再试。"
    chat.page.context.set_offline(False)
    chat.box.press("Enter")
    expect(chat.answers.last).to_have_text("你好！")


def test_model_list_can_be_tried_again_and_the_typed_text_stays(closed_chat: ChatPage, stand_in: StandIn) -> None:
    chat = closed_chat
    stand_in.models = None
    chat.page.goto(chat.address)
    notice = chat.page.locator("#notice-text")
    expect(notice).to_have_text("读不到模型列表。 The engine is still loading. (engine_unavailable)")
    chat.ask("等一下")
    expect(chat.send).to_be_disabled()
    expect(chat.page.locator(".turn")).to_have_count(0)
    stand_in.models = MODELS
    chat.page.locator("#retry").click()
    expect(notice).to_be_hidden()
    expect(chat.box).to_have_value("等一下")
    chat.send.click()
    expect(chat.answers).to_have_text(["你好！"])


def test_empty_model_list_is_said(closed_chat: ChatPage, stand_in: StandIn) -> None:
    stand_in.models = []
    closed_chat.page.goto(closed_chat.address)
    expect(closed_chat.model).to_have_text("没有模型")
    expect(closed_chat.model).to_be_disabled()


def test_key_is_asked_for_kept_for_the_tab_and_sent(closed_chat: ChatPage, stand_in: StandIn) -> None:
    chat = closed_chat
    stand_in.api_key = "sk-right"
    chat.page.goto(chat.address)
    dialog = chat.page.get_by_role("dialog", name="需要 API 密钥")
    expect(dialog).to_be_visible()
    chat.page.locator("#key").fill("sk-wrong")
    chat.page.locator("#key").press("Enter")
    expect(chat.page.locator("#key")).to_have_value("")
    expect(chat.page.locator("#key-error")).to_have_text("The API key is missing or wrong.")
    chat.page.locator("#key").fill("sk-right")
    dialog.get_by_role("button", name="确定").click()
    expect(dialog).to_be_hidden()
    expect(chat.model).to_be_enabled()
    chat.page.reload()
    expect(chat.model).to_be_enabled()

    stand_in.api_key = "sk-new"  # the operator changed it: the question waits for the new key
    chat.ask("在吗")
    expect(dialog).to_be_visible()
    chat.page.locator("#key").fill("sk-new")
    chat.page.locator("#key").press("Enter")
    expect(chat.answers).to_have_text(["你好！"])
    assert len(stand_in.requests) == 1
    assert chat.page.evaluate("document.cookie + JSON.stringify(localStorage)") == "{}"


def test_key_dialog_can_be_left(closed_chat: ChatPage, stand_in: StandIn) -> None:
    chat = closed_chat
    stand_in.api_key = "sk-right"
    chat.page.goto(chat.address)
    expect(chat.page.locator("#key-dialog")).to_be_visible()
    chat.page.locator("#key-cancel").click()
    expect(chat.page.locator("#notice-text")).to_contain_text("invalid_api_key")
    chat.page.locator("#retry").click()
    expect(chat.page.locator("#key-dialog")).to_be_visible()
    chat.page.keyboard.press("Escape")
    expect(chat.page.locator("#notice")).to_be_visible()
