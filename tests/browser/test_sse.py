"""The event parser in a real browser: whatever the network does to the bytes, the text is the same."""

import random
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import ChatPage
from tests.browser.stand_in import StandIn

pytestmark = pytest.mark.browser

NUM_CASES = 2_400
ALPHABET = [*'你好。，𠮷🌏éa :"{', "👩‍👩‍👧", "🇨🇳", "\\n", "data", "\ufeff", "\u2028"]

DECODE = """async (cases) => {
  const { EventDecoder } = await import(new URL("static/js/sse.js", document.baseURI).href);
  return cases.map(({ bytes, cuts }) => {
    const decoder = new EventDecoder();
    const all = Uint8Array.from(bytes);
    const events = [];
    let start = 0;
    for (const end of [...cuts, all.length]) { events.push(...decoder.push(all.subarray(start, end))); start = end; }
    return events;
  });
}"""


def make_case(rng: random.Random) -> tuple[dict[str, list[int]], list[dict[str, str]]]:
    """A random event stream cut at random bytes, and the events it means."""
    text, events = "", []
    end_of_line = rng.choice(["\n", "\r\n", "\r"])
    for _ in range(rng.randint(1, 5)):
        if rng.random() < 0.2:
            text += f": keep-alive {rng.choice(ALPHABET)}{end_of_line}{end_of_line}"
        name = rng.choice(["", "", "error"])
        lines = ["".join(rng.choices(ALPHABET, k=rng.randint(0, 9))) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
        if name:
            text += f"event: {name}{end_of_line}"
        text += "".join(f"data: {line}{end_of_line}" for line in lines) + end_of_line
        events.append({"event": name or "message", "data": "\n".join(lines)})
    data = (text + ": end\n").encode()  # a lone CR at the very end could still become CRLF
    num_cuts = rng.choice([1, 2, 5, len(data) - 1])
    cuts = sorted(rng.sample(range(1, len(data)), min(num_cuts, len(data) - 1)))
    return {"bytes": list(data), "cuts": cuts}, events


def test_any_cut_of_the_bytes_gives_the_same_events(chat: ChatPage) -> None:
    rng = random.Random(20)
    made = [make_case(rng) for _ in range(NUM_CASES)]
    decoded: list[Any] = []
    for start in range(0, NUM_CASES, 300):
        decoded += chat.page.evaluate(DECODE, [case for case, _ in made[start : start + 300]])
    wrong = [(case, got, want) for (case, want), got in zip(made, decoded, strict=True) if got != want]
    assert wrong[:1] == []


@pytest.mark.parametrize(
    "stream", ["data: 未完", "data: 未完\n", "data: 未完\r\n", "event: x\n\n", ": 注释\n\n", "id: 7\n\n"]
)
def test_what_is_not_a_finished_event_is_not_an_event(chat: ChatPage, stream: str) -> None:
    assert chat.page.evaluate(DECODE, [{"bytes": list(stream.encode()), "cuts": []}]) == [[]]


@pytest.mark.parametrize("cut_bytes", [1, 2, 3, 5, 7, 64])
def test_streamed_answer_is_whole_in_the_page(chat: ChatPage, stand_in: StandIn, cut_bytes: int) -> None:
    stand_in.deltas = ["你好，", "世界🌏！", "我很难过", "👩‍👩‍👧", "\n第二行 𠮷"]
    stand_in.cut_bytes = cut_bytes
    chat.ask_and_wait("你好")
    assert chat.answers.last.text_content() == "".join(stand_in.deltas)
    expect(chat.last_turn.locator(".note")).to_have_text(["qwen2-demo"])
