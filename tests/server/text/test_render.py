import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.text_parity import parity_failures, random_chat, random_text
from server.text.render import ChatRenderer
from server.text.template import TemplateError
from server.text.tokenizer import TextError

HELLO = [{"role": "user", "content": "你好"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "今天天气 of a <city>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def stock_ids(stock, messages, **kwargs):
    return stock.apply_chat_template(messages, tokenize=True, return_dict=False, **kwargs)


def test_a_thousand_random_chats_equal_stock(renderer, stock):
    rng = random.Random(1)
    assert parity_failures(renderer, stock, [random_chat(rng) for _ in range(1000)]) == []


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_equals_stock(renderer, stock, text):
    messages = [{"role": "user", "content": text}]
    assert renderer.render(messages) == stock_ids(stock, messages, add_generation_prompt=True)


def tool_chat(rng):
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": random_text(rng), "n": 3}}}
    return [
        {"role": "system", "content": random_text(rng)},
        {"role": "user", "content": random_text(rng), "name": "小明"},
        {"role": "assistant", "content": None, "reasoning_content": random_text(rng), "tool_calls": [call]},
        {"role": "tool", "content": random_text(rng)},
        {"role": "assistant", "content": random_text(rng)},
    ]


def test_tool_chats_equal_stock(tools_renderer, tools_stock):
    rng = random.Random(2)
    for _ in range(200):
        messages = tool_chat(rng)
        for tools in (None, [TOOL]):
            assert tools_renderer.render(messages, tools=tools) == stock_ids(
                tools_stock, messages, tools=tools, add_generation_prompt=True
            )


@pytest.mark.parametrize("content", ["The quick", "  two spaces  ", "line\n", "<|", "好<", "\n", ""])
@pytest.mark.parametrize("kind", ["chatml", "trimming"])
def test_continuing_the_final_message_equals_stock(renderer, stock, new_folder, load_stock, kind, content):
    if kind == "trimming":
        folder = new_folder("{% for m in messages %}<|im_start|>{{ m.content | trim }}<|im_end|>{% endfor %}")
        renderer, stock = ChatRenderer.load(folder), load_stock(folder)
    messages = [*HELLO, {"role": "assistant", "content": content}]
    assert renderer.render(messages, add_generation_prompt=False, continue_final_message=True) == stock_ids(
        stock, messages, continue_final_message=True
    )


def test_template_variables_reach_the_template(new_folder, load_stock):
    folder = new_folder("{{ eos_token }}{{ mood }}{% if enable_thinking %}T{% endif %}{{ messages[0].content }}")
    kwargs = {"mood": "glad", "enable_thinking": True}
    assert ChatRenderer.load(folder).render(HELLO, **kwargs) == stock_ids(load_stock(folder), HELLO, **kwargs)


def test_content_parts_are_joined_by_newlines(renderer):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert renderer.render([{"role": "user", "content": parts}]) == renderer.render(
        [{"role": "user", "content": "a\nb"}]
    )


def test_render_text_is_the_prompt(renderer):
    text = renderer.render_text([{"role": "user", "content": "a<|im_end|>b<"}])
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\na<|im_end|>b<<|im_end|>\n<|im_start|>assistant\n"
    )


def test_turn_end_is_what_the_template_writes_not_the_eos(new_folder, renderer):
    assert renderer.turn_end_id == renderer.tokenizer.control_tokens["<|im_end|>"]
    base = ChatRenderer.load(new_folder("{{ messages[-1].content }}<|im_end|>\n", eos_token="<|endoftext|>"))
    assert base.turn_end_id == base.tokenizer.control_tokens["<|im_end|>"] != base.tokenizer.eos_token_id
    eos = ChatRenderer.load(new_folder("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"))
    assert eos.turn_end_id == eos.tokenizer.eos_token_id


@pytest.mark.parametrize(
    "template",
    [None, "{{ messages[-1].content }} more<|im_end|>", "{{ messages[-1].content }}", "{{ raise_exception('x') }}"],
)
def test_no_turn_end_where_the_template_writes_none(new_folder, template):
    assert ChatRenderer.load(new_folder(template)).turn_end_id is None


def nested(depth):
    return [nested(depth - 1)] if depth else "x"


@pytest.mark.parametrize(
    ("messages", "param", "message"),
    [
        ([], "messages", "must not be empty"),
        (["hi"], "messages[0]", "must be an object"),
        ([*HELLO, {"role": "user", "content": "\ud800"}], "messages[1].content", "lone surrogate"),
        ([{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}], "messages[0].content[0].text", "lone"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type", "only 'text' parts"),
        ([{"role": "user", "content": ["hi"]}], "messages[0].content[0].type", "only 'text' parts"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text", "must be a string"),
        ([{"role": "user", "content": "".join(map(chr, range(0xFDD0, 0xFDF0)))}], "messages", "noncharacters"),
        ([{"role": "user", "content": "x", "more": nested(100)}], None, "levels deep"),
    ],
)
def test_bad_messages_are_named(renderer, messages, param, message):
    with pytest.raises(TextError, match=message) as caught:
        renderer.render(messages)
    assert param is None or caught.value.param == param


def test_continuing_needs_text_and_no_generation_prompt(renderer):
    with pytest.raises(TextError, match="exclude each other"):
        renderer.render(HELLO, continue_final_message=True)
    with pytest.raises(TextError, match="must be text") as caught:
        renderer.render(
            [*HELLO, {"role": "assistant", "content": None}], add_generation_prompt=False, continue_final_message=True
        )
    assert caught.value.param == "messages[1].content"


def test_continuing_a_message_that_the_template_drops(new_folder):
    renderer = ChatRenderer.load(new_folder("{{ messages[0].content }}"))
    with pytest.raises(TemplateError, match="drops the final message"):
        renderer.render(
            [*HELLO, {"role": "assistant", "content": "x"}], add_generation_prompt=False, continue_final_message=True
        )


def test_a_model_without_template_says_so(new_folder):
    with pytest.raises(TemplateError, match="no chat template"):
        ChatRenderer.load(new_folder(None)).render(HELLO)


def test_a_templates_refusal_shows_the_text_as_it_was_sent(new_folder):
    renderer = ChatRenderer.load(new_folder("{{ raise_exception('no: ' + messages[0].content) }}"))
    with pytest.raises(TemplateError, match=r"^no: <\|im_end\|><$"):
        renderer.render([{"role": "user", "content": "<|im_end|><"}])
