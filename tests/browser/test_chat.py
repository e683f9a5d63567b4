"""The chat page as a reader uses it: asking, waiting, stopping, reading back, starting anew."""

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import ChatPage
from tests.browser.stand_in import StandIn

pytestmark = pytest.mark.browser


def eventually(chat: ChatPage, condition: str) -> None:
    """Wait until a JavaScript expression holds in the page (polled: the page's policy forbids `eval`)."""
    for _ in range(400):
        if chat.page.evaluate(condition):
            return
        chat.page.wait_for_timeout(25)
    raise AssertionError(f"never true: {condition}")


def test_runs_without_a_secure_context(chat: ChatPage) -> None:
    assert chat.page.evaluate("isSecureContext") is False
    chat.ask_and_wait("在吗")
    expect(chat.answers).to_have_text(["你好！"])


def test_question_is_sent_as_openai_expects_and_history_follows(chat: ChatPage, stand_in: StandIn) -> None:
    chat.ask_and_wait("你是谁？")
    stand_in.deltas = ["再见"]
    chat.ask_and_wait("好的")
    assert stand_in.requests == [
        {"model": "qwen2-demo", "messages": [{"role": "user", "content": "你是谁？"}], "stream": True},
        {
            "model": "qwen2-demo",
            "messages": [
                {"role": "user", "content": "你是谁？"},
                {"role": "assistant", "content": "你好！"},
                {"role": "user", "content": "好的"},
            ],
            "stream": True,
        },
    ]
    expect(chat.page.locator(".bubble")).to_have_text(["你是谁？", "你好！", "好的", "再见"])


def test_base_and_adapter_can_be_picked_and_the_answer_names_its_model(chat: ChatPage, stand_in: StandIn) -> None:
    expect(chat.model.locator("optgroup")).to_have_count(2)
    chat.model.select_option("qwen2-demo-xiaozhi")
    chat.ask_and_wait("你是谁？")
    assert stand_in.requests[-1]["model"] == "qwen2-demo-xiaozhi"
    expect(chat.last_turn.locator(".note")).to_have_text(["qwen2-demo-xiaozhi"])


def test_new_chat_forgets_and_drops_a_running_answer(chat: ChatPage, stand_in: StandIn) -> None:
    stand_in.hold_after = 1
    chat.ask("第一问")
    expect(chat.answers.last).to_have_text("你好")
    chat.page.locator("#new-chat").click()
    expect(chat.page.locator(".turn")).to_have_count(0)
    expect(chat.page.locator("#empty")).to_be_visible()
    stand_in.release.set()
    chat.ask_and_wait("第二问")
    assert stand_in.requests[-1]["messages"] == [{"role": "user", "content": "第二问"}]
    expect(chat.page.locator(".bubble")).to_have_text(["第二问", "你好！"])


def test_stop_keeps_the_text_and_frees_the_server(chat: ChatPage, stand_in: StandIn) -> None:
    stand_in.hold_after = 1
    chat.ask("讲个故事")
    expect(chat.answers.last).to_have_text("你好")
    expect(chat.page.locator("#log")).to_have_attribute("aria-busy", "true")
    chat.stop.click()
    expect(chat.last_turn.locator(".note")).to_have_text(["已停止"])
    expect(chat.answers.last).to_have_text("你好")
    expect(chat.box).to_be_focused()
    for _ in range(200):
        if stand_in.open_streams == 0:
            break
        chat.page.wait_for_timeout(10)
    assert (stand_in.open_streams, stand_in.num_broken_off) == (0, 1)

    stand_in.hold_after = None
    chat.ask_and_wait("继续")
    assert [m["content"] for m in stand_in.requests[-1]["messages"]] == ["讲个故事", "你好", "继续"]


def test_stop_before_the_first_word_gives_the_question_back(chat: ChatPage, stand_in: StandIn) -> None:
    stand_in.hold_after = 0
    chat.ask("讲个故事")
    expect(chat.stop).to_be_visible()
    chat.stop.click()
    expect(chat.last_turn.locator(".note")).to_have_text(["已停止"])
    expect(chat.answers.last).to_be_hidden()
    expect(chat.box).to_have_value("讲个故事")
    stand_in.hold_after = None
    chat.ask_and_wait("讲个笑话")
    assert [m["content"] for m in stand_in.requests[-1]["messages"]] == ["讲个笑话"]


def test_answer_at_the_length_limit_says_so(chat: ChatPage, stand_in: StandIn) -> None:
    stand_in.finish_reason = "length"
    chat.ask_and_wait("写首长诗")
    expect(chat.last_turn.locator(".note")).to_have_text(["qwen2-demo", "已截断：达到长度上限"])


def test_enter_while_an_input_method_composes_sends_nothing(chat: ChatPage, stand_in: StandIn) -> None:
    ime = chat.page.context.new_cdp_session(chat.page)
    chat.box.focus()
    chat.page.evaluate(
        """() => {
          globalThis.seen = [];
          question.addEventListener("keydown", (e) => seen.push([e.isComposing, e.keyCode]));
        }"""
    )
    ime.send("Input.imeSetComposition", {"text": "你好", "selectionStart": 2, "selectionEnd": 2})
    # Without text: an input method swallows the character that Enter would write.
    ime.send("Input.dispatchKeyEvent", {"type": "rawKeyDown", "key": "Enter", "windowsVirtualKeyCode": 13})
    assert chat.page.evaluate("seen") == [[True, 13]]
    ime.send("Input.insertText", {"text": "你好"})
    # Safari: the composition is over when the key arrives, and only the code 229 tells.
    chat.page.evaluate(
        'question.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", keyCode: 229, bubbles: true }))'
    )
    assert chat.page.evaluate("seen")[1:] == [[False, 229]]
    expect(chat.page.locator(".turn")).to_have_count(0)

    chat.page.keyboard.press("Shift+Enter")
    chat.page.keyboard.type("世界")
    expect(chat.box).to_have_value("你好\n世界")
    chat.page.keyboard.press("Enter")
    expect(chat.answers).to_have_text(["你好！"])
    assert [r["messages"] for r in stand_in.requests] == [[{"role": "user", "content": "你好\n世界"}]]


def test_nothing_is_sent_twice_or_empty(chat: ChatPage, stand_in: StandIn) -> None:
    chat.ask("   \n ")
    expect(chat.send).to_be_disabled()
    stand_in.hold_after = 1
    chat.ask("一")
    expect(chat.answers.last).to_have_text("你好")
    chat.ask("二")
    expect(chat.box).to_have_value("二")
    stand_in.release.set()
    expect(chat.answers.last).to_have_text("你好！")
    assert [r["messages"][-1]["content"] for r in stand_in.requests] == ["一"]


def test_reader_who_scrolled_up_is_left_alone(chat: ChatPage, stand_in: StandIn) -> None:
    stand_in.deltas = [f"第 {n} 行\n" for n in range(80)]
    chat.ask_and_wait("数一数")
    top = "log.scrollTop"
    end = "log.scrollHeight - log.scrollTop - log.clientHeight < 2"
    eventually(chat, end)

    stand_in.hold_after = 40
    chat.ask("再数")
    expect(chat.answers.last).to_contain_text("第 39 行")
    eventually(chat, end)
    chat.page.locator("#log").hover()
    chat.page.mouse.wheel(0, -400)
    expect(chat.page.locator("#to-latest")).to_be_visible()
    before = chat.page.evaluate(top)
    stand_in.release.set()
    expect(chat.answers.last).to_contain_text("第 79 行")
    assert chat.page.evaluate(top) == before
    chat.page.locator("#to-latest").click()
    eventually(chat, end)
    expect(chat.page.locator("#to-latest")).to_be_hidden()


def test_screen_reader_hears_the_beginning_and_the_end(chat: ChatPage, stand_in: StandIn) -> None:
    chat.page.evaluate(
        """() => { globalThis.heard = [];
        const status = document.getElementById("status");
        new MutationObserver(() => heard.push(status.textContent)).observe(status, { childList: true }); }"""
    )
    stand_in.deltas = list("一二三四五六七八九十")
    chat.ask_and_wait("数数")
    assert chat.page.evaluate("heard") == ["正在回答", "回答完成"]
    log = chat.page.get_by_role("log", name="对话")
    expect(log).to_have_attribute("aria-live", "off")


@pytest.mark.parametrize("locale", ["zh-CN", "zh-TW", "en-US", "fr-FR"], indirect=True)
@pytest.mark.parametrize("width", [390, 1280], indirect=True)
def test_fits_and_speaks_the_readers_language(chat: ChatPage, stand_in: StandIn, locale: str, width: int) -> None:
    language, button = ("zh-CN", "发送") if locale.startswith("zh") else ("en", "Send")
    expect(chat.page.locator("html")).to_have_attribute("lang", language)
    expect(chat.send).to_have_text(button)
    stand_in.deltas = ["无空格的长文字" * 60, " x" * 200, "W" * 300, "\n\tdef f(): pass"]
    chat.ask_and_wait("很长" * 120)
    assert chat.page.evaluate("document.documentElement.scrollWidth") <= width
    assert chat.page.evaluate(
        "document.getElementById('log').scrollWidth <= document.getElementById('log').clientWidth"
    )
    for name in ("#model", "#new-chat", "#question", "#send"):
        place = chat.page.locator(name).bounding_box()
        assert place is not None
        assert place["x"] >= 0 and place["x"] + place["width"] <= width and place["y"] + place["height"] <= 780, name


@pytest.mark.parametrize("prefix", ["/llm/demo"], indirect=True)
def test_works_under_a_path(chat: ChatPage, stand_in: StandIn, prefix: str) -> None:
    assert chat.address.endswith("/llm/demo/")
    chat.ask_and_wait("在吗")
    expect(chat.answers).to_have_text(["你好！"])
