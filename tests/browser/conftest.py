"""Chromium, the stand-in server, and a page that is checked after every test.

The page is opened under a name that is not the loopback's, so it runs as on a plain-http LAN address
(`isSecureContext` is false). After each test: no foreign request, no broken Content-Security-Policy, no script error.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from tests.browser.stand_in import StandIn

LAN_NAME = "qloop.test"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
RECORD_VIOLATIONS = """
globalThis.violations = [];
addEventListener("securitypolicyviolation", (e) => violations.push(`${e.effectiveDirective} ${e.blockedURI}`));
"""


@dataclass
class ChatPage:
    """The open page, with the few moves that all tests share."""

    page: Page
    address: str
    requests: list[str] = field(default_factory=list)
    script_errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.script_errors.append(str(error)))
        self.page.add_init_script(RECORD_VIOLATIONS)

    def open(self) -> None:
        self.page.goto(self.address)
        expect(self.model).to_be_enabled()

    @property
    def box(self) -> Locator:
        return self.page.locator("#question")

    @property
    def model(self) -> Locator:
        return self.page.locator("#model")

    @property
    def send(self) -> Locator:
        return self.page.locator("#send")

    @property
    def stop(self) -> Locator:
        return self.page.locator("#stop")

    @property
    def answers(self) -> Locator:
        return self.page.locator(".answer .bubble")

    @property
    def last_turn(self) -> Locator:
        return self.page.locator(".turn").last

    def ask(self, question: str) -> None:
        """Type and send; returns when the answer is being waited for."""
        self.box.fill(question)
        self.box.press("Enter")

    def ask_and_wait(self, question: str) -> None:
        self.ask(question)
        expect(self.page.locator("#log")).to_have_attribute("aria-busy", "false")
        expect(self.send).to_be_visible()

    def violations(self) -> list[str]:
        found: list[str] = self.page.evaluate("violations")
        return found

    def foreign_requests(self) -> list[str]:
        return [url for url in self.requests if not url.startswith(self.address)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # Per module: while it lives, Playwright's event loop is this thread's running one, which asyncio tests would meet.
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    flags = ["--disable-gpu", f"--host-resolver-rules=MAP {LAN_NAME} 127.0.0.1"]
    if os.geteuid() == 0:
        flags.append("--no-sandbox")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def stand_in() -> StandIn:
    return StandIn()


@pytest.fixture(params=["zh-CN"])
def locale(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[1280])
def width(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(params=[""])
def prefix(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def closed_chat(browser: Browser, stand_in: StandIn, locale: str, width: int, prefix: str) -> Iterator[ChatPage]:
    """The page before its first load; checked at the end."""
    with stand_in.serve(prefix) as address:
        context = browser.new_context(locale=locale, viewport={"width": width, "height": 780})
        context.set_default_timeout(10_000)
        chat = ChatPage(context.new_page(), address.replace("127.0.0.1", LAN_NAME))
        yield chat
        assert chat.foreign_requests() == []
        assert chat.violations() == []
        assert chat.script_errors == []
        context.close()


@pytest.fixture
def chat(closed_chat: ChatPage) -> ChatPage:
    closed_chat.open()
    return closed_chat
