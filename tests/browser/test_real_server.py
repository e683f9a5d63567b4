"""The page as the real server gives it, with workers and an engine behind it."""

import pytest
from playwright.sync_api import Browser, Error, expect

from tests.browser.conftest import ChatPage
from tests.conftest import StartService
from tests.services import MODEL, Service, wait_until

pytestmark = pytest.mark.browser


def opened(browser: Browser, service: Service, **context: object) -> ChatPage:
    page = browser.new_context(locale="zh-CN", **context).new_page()  # type: ignore[arg-type]
    chat = ChatPage(page, service.url)
    chat.open()
    return chat


def test_an_answer_streams_into_the_page(browser: Browser, start_service: StartService) -> None:
    chat = opened(browser, start_service(workers=1))
    expect(chat.model).to_have_value(MODEL)
    chat.ask_and_wait("你好，世界🌏！<b>x</b>")
    expect(chat.answers.last).to_contain_text("你好，世界🌏！<b>x</b>")
    assert chat.foreign_requests() == chat.violations() == chat.script_errors == []


def test_stop_frees_the_engine(browser: Browser, start_service: StartService) -> None:
    service = start_service(workers=1, fake_tokens_per_s=5)
    chat = opened(browser, service)
    chat.ask("一二三四五六七八九十一二三四五六七八九十")
    wait_until(lambda: service.gauge("qloop_sequences_running") == 1, 10, "a running sequence")
    expect(chat.answers.last).not_to_be_empty()
    chat.stop.click()
    wait_until(lambda: service.gauge("qloop_sequences_running") == 0, 2, "an idle engine")


def test_a_browser_logs_in_with_a_key_as_password(browser: Browser, start_service: StartService) -> None:
    service = start_service(workers=1, api_keys="right,other")
    chat = opened(browser, service, http_credentials={"username": "anyone", "password": "right"})
    chat.ask_and_wait("在吗")
    expect(chat.answers.last).to_contain_text("在吗")


def test_a_browser_without_a_key_is_asked_for_one(browser: Browser, start_service: StartService) -> None:
    service = start_service(workers=1, api_keys="right")
    with pytest.raises(Error, match="ERR_INVALID_AUTH_CREDENTIALS"):  # nobody is here to type one
        browser.new_page().goto(service.url)
