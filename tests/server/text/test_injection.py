"""No text in any message becomes a control token, and none of it is lost."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.text_parity import AROUND, control_counts, forgeries, is_altered, is_forged
from server.text.guard import ControlGuard
from server.text.render import ChatRenderer

TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")
HOSTILE = st.lists(
    st.one_of(
        st.sampled_from(TOKENS).flatmap(lambda t: st.integers(0, len(t)).map(lambda n: t[:n])),
        st.sampled_from(TOKENS).flatmap(lambda t: st.integers(0, len(t)).map(lambda n: t[n:])),
        st.sampled_from(AROUND),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
    ),
    max_size=8,
).map("".join)


@pytest.mark.parametrize("token", TOKENS)
def test_every_way_to_write_an_added_token_stays_text(renderer, stock, token):
    assert set(TOKENS) == set(renderer.tokenizer.control_tokens)
    for forged, harmless in forgeries(token, TOKENS, random.Random(3)):
        assert not is_forged(renderer, forged, harmless), forged
        assert not is_altered(renderer, stock, forged), forged


@given(body=HOSTILE)
def test_forged_text_has_the_ids_of_stock_with_special_tokens_split(renderer, stock, body):
    def split(text):
        return stock(text, split_special_tokens=True)["input_ids"]

    body = body.replace("tool_call", "tool")  # stock splits only tokens flagged special
    controls = renderer.tokenizer.control_tokens
    start, end = controls["<|im_start|>"], controls["<|im_end|>"]
    expected = [start, *split("system\n" + body), end, *split("\n"), start, *split("user\n" + body), end, *split("\n")]
    messages = [{"role": "system", "content": body}, {"role": "user", "content": body}]
    assert renderer.render(messages, add_generation_prompt=False) == expected


def everywhere(text):
    """A conversation, tools and variables with `text` in every place that a client can fill."""
    call = {
        "id": text,
        "type": "function",
        "function": {"name": text, "arguments": {text: text, "deep": [{"x": text}]}},
    }
    messages = [
        {"role": "system", "content": text, "name": text},
        {"role": "user", "content": [{"type": "text", "text": text}, {"type": "text", "text": text}], "name": text},
        {"role": "assistant", "content": text, "reasoning_content": text, "tool_calls": [call]},
        {"role": "tool", "content": text, "name": text, "tool_call_id": text},
        {"role": text or "x", "content": text},
    ]
    tools = [
        {"type": "function", "function": {"name": text, "description": text, "parameters": {text: {"enum": [text]}}}}
    ]
    return messages, tools


@given(text=HOSTILE)
def test_no_place_of_a_message_forges(tools_renderer, text):
    def counts(value):
        messages, tools = everywhere(value)
        ids = tools_renderer.render(messages, tools=tools)
        return Counter(filter(tools_renderer.tokenizer.control_ids.__contains__, ids))

    assert counts(text or "ok") == counts("harmless")


@given(first=HOSTILE, second=HOSTILE)
def test_neighbouring_bodies_cannot_join_to_a_token(new_joiner, first, second):
    ids = new_joiner.render([{"role": "user", "name": first, "content": second}])
    assert new_joiner.tokenizer.control_ids.isdisjoint(ids)


@pytest.fixture(scope="module", params=["{{ m.name + m.content }}", "{{ m.name | trim }}{{ m.content | trim }}"])
def new_joiner(request, new_folder):
    return ChatRenderer.load(new_folder("{% set m = messages[0] %}" + request.param))


@pytest.mark.parametrize("body", ["|im_end|>", "|im_end|> x", "  |im_end|>", ">"])
def test_a_body_cannot_complete_what_the_template_began(new_folder, body):
    renderer = ChatRenderer.load(new_folder("{% for m in messages %}<|im_end|<{{ m.content | trim }}{% endfor %}"))
    assert not control_counts(renderer, [{"role": "user", "content": body}])


def test_template_variables_cannot_forge(new_folder):
    renderer = ChatRenderer.load(new_folder("{{ eos_token }}{{ note }}{{ messages[0].content }}"))
    ids = renderer.render([{"role": "user", "content": "x"}], note="<|im_end|>", eos_token="<|im_start|>")
    assert renderer.tokenizer.control_ids.isdisjoint(ids)


def test_a_template_may_build_tokens_from_roles(new_folder, new_tokenizer, load_stock):
    tokenizer = new_tokenizer()
    tokenizer.add_special_tokens(["<|user|>", "<|assistant|>"])
    folder = new_folder(
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|im_end|>' }}{% endfor %}", tokenizer
    )
    messages = [{"role": "user", "content": "<|user|>"}, {"role": "assistant", "content": "ok"}]
    renderer = ChatRenderer.load(folder)
    assert control_counts(renderer, messages) == Counter(
        {
            renderer.tokenizer.control_tokens[t]: n
            for t, n in {"<|user|>": 1, "<|assistant|>": 1, "<|im_end|>": 2}.items()
        }
    )


@pytest.mark.parametrize("tokens", [["aa", "aba", "b "], ["abc", "bcd", "cd"], [" x", "x ", "  "], ["<a>", "<a><b>"]])
@given(data=st.data())
def test_no_token_of_any_shape_survives_the_guard(tokens, data):
    pieces = st.lists(st.text("".join(sorted(set("".join(tokens)))), max_size=8), min_size=1, max_size=3)
    bodies = data.draw(pieces)
    guarded = ControlGuard(tokens).guard(bodies, "\ufdd0")
    for joined in ("".join(guarded), "".join(body.strip() for body in guarded)):
        assert not any(token in joined for token in tokens)
    assert [body.replace("\ufdd0", "") for body in guarded] == bodies


@pytest.mark.parametrize("token", [*TOKENS, "aa", " x", "x ", "  ", " x "])
def test_no_template_text_beside_a_body_completes_a_token(token):
    guard = ControlGuard([token])
    for cut in range(1, len(token)):
        head, tail = token[:cut], token[cut:]
        assert token not in guard.guard(head, "\ufdd0") + tail
        assert token not in head + guard.guard(tail, "\ufdd0")


@given(body=st.text(" \t\na<|>", max_size=10))
def test_marks_do_not_hinder_trimming(body):
    guarded = ControlGuard(TOKENS).guard(body, "\ufdd0")
    assert guarded.strip().replace("\ufdd0", "") == body.strip()
