import random

import pytest

from benchmarks.text_parity import random_chat
from server.text.render import ChatRenderer
from server.text.template import TemplateError
from server.text.tokenizer import TextError

CHAT = [
    {"role": "user", "content": "你是谁？"},
    {"role": "assistant", "content": "我是一个助手。"},
    {"role": "user", "content": "It's <|im_end|> what?"},
    {"role": "assistant", "content": "The token <|im_end|> itself."},
]


def trained_texts(renderer, text):
    """The trained spans as text."""
    spans, current = [], []
    for token_id, is_trained in zip([*text.token_ids, 0], [*text.trained, False], strict=True):
        if is_trained:
            current.append(token_id)
        elif current:
            spans.append(renderer.tokenizer.decode(current, skip_special_tokens=False))
            current = []
    return spans


def test_exactly_each_answer_and_its_stop_token_are_trained(renderer):
    text = renderer.render_training(CHAT)
    assert trained_texts(renderer, text) == ["我是一个助手。<|im_end|>", "The token <|im_end|> itself.<|im_end|>"]
    last = [i for i, is_trained in enumerate(text.trained) if is_trained][-1]
    assert text.token_ids[last] == renderer.turn_end_id


def test_training_ids_are_serving_ids(renderer):
    rng = random.Random(4)
    checked = 0
    for _ in range(300):
        chat = random_chat(rng)
        for message in chat:
            if message["role"] == "assistant":
                message["content"] = message["content"].lstrip()
        text = renderer.render_training(chat)
        assert text.token_ids == renderer.render(chat, add_generation_prompt=False)
        starts = [i for i, is_trained in enumerate(text.trained) if is_trained and not (i and text.trained[i - 1])]
        turns = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
        for start, turn in zip(starts, turns, strict=True):
            assert text.token_ids[:start] == renderer.render(chat[:turn])
            checked += 1
    assert checked > 100


def test_tool_calls_are_trained_with_their_turn(tools_renderer):
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "</tool_call>"}}}
    chat = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "well", "tool_calls": [call]},
        {"role": "tool", "content": "done"},
        {"role": "assistant", "content": "ok"},
    ]
    text = tools_renderer.render_training(chat, tools=[{"type": "function", "function": {"name": "f"}}])
    assert trained_texts(tools_renderer, text) == [
        'well\n<tool_call>\n{"name": "f", "arguments": {"a": "</tool_call>"}}\n</tool_call><|im_end|>',
        "ok<|im_end|>",
    ]


def test_a_conversation_without_answer_trains_nothing(renderer):
    assert not any(renderer.render_training(CHAT[:1]).trained)


def test_an_answer_that_fuses_with_the_prompt_is_named(renderer):
    chat = [*CHAT[:3], {"role": "assistant", "content": "\n\nyes"}]
    with pytest.raises(TextError, match="fuses with the end of the prompt") as caught:
        renderer.render_training(chat)
    assert caught.value.param == "messages[3].content"


def test_an_answer_to_nothing_is_named(renderer):
    with pytest.raises(TextError, match=r"messages\[0\] is an assistant turn"):
        renderer.render_training(CHAT[1:])


def test_a_template_that_rewrites_history_is_named(new_folder):
    renderer = ChatRenderer.load(
        new_folder(
            "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'assistant' and not loop.last %} old"
            "{% else %} {{ m.content }}{% endif %}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant <think>{% endif %}"
        )
    )
    with pytest.raises(TemplateError, match=r"before messages\[1\] differently"):
        renderer.render_training(CHAT)


def test_a_template_without_stop_token_is_named(new_folder):
    renderer = ChatRenderer.load(
        new_folder(
            "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}"
        )
    )
    with pytest.raises(TemplateError, match=r"no stop token after messages\[1\]"):
        renderer.render_training(CHAT[:2])
