from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.text.render import ChatRenderer
from trainer.data.rows import Message, RowRefused
from trainer.examples.truncate import GAP, Limits, fit, learned_runs

PIECES = ["你好", "who ", "are ", "demo. ", "助手。", "高兴！"]
WORDS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=40).map("".join)


@pytest.fixture(scope="module")
def renderer(blank_model: Path) -> ChatRenderer:
    return ChatRenderer.load(blank_model)


def chat(*texts: str, system: str = "") -> list[Message]:
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    return messages + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


@settings(max_examples=300, deadline=None)
@given(
    texts=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4),
    system=st.just("") | WORDS,
    max_length=st.integers(20, 200),
    source=st.none() | st.integers(10, 150),
    target=st.none() | st.integers(3, 60),
)
def test_truncation_keeps_the_structure(
    renderer: ChatRenderer,
    texts: list[tuple[str, str]],
    system: str,
    max_length: int,
    source: int | None,
    target: int | None,
) -> None:
    messages = chat(*(text for pair in texts for text in pair), system=system)
    try:
        fitted = fit(messages, renderer, Limits(max_length, source, target))
    except RowRefused as error:
        assert error.code == "too-long"
        return
    token_ids, runs = fitted.text.token_ids, learned_runs(fitted.text.trained)
    assert len(token_ids) <= max_length
    assert source is None or runs[-1][0] <= source
    assert target is None or all(end - start <= target for start, end in runs)
    header = renderer.tokenizer.encode_rendered("<|im_start|>assistant\n", "")
    for start, end in runs:
        assert token_ids[start - len(header) : start] == header  # the assistant's header
        assert token_ids[end - 1] == renderer.turn_end_id
    assert token_ids[: runs[-1][0]] == renderer.render(list(fitted.messages[:-1]))
    if target is None:
        assert fitted.messages[-1] == messages[-1]  # the last answer is whole
        assert bool(fitted.cuts) == (list(fitted.messages) != messages)
    if system:
        assert fitted.messages[0] == messages[0]


def test_old_turns_go_before_any_text_is_cut(renderer: ChatRenderer) -> None:
    messages = chat("第一个问题" * 9, "一", "第二个问题", "二", "第三个问题", "三", system="短")
    whole = len(renderer.render_training(messages).token_ids)
    fitted = fit(messages, renderer, Limits(whole - 1))
    assert list(fitted.messages) == [messages[0], *messages[3:]]
    assert fitted.cuts == ("2 oldest turns left out", f"it was {whole} tokens long")


def test_then_the_middle_of_the_only_user_text_goes(renderer: ChatRenderer) -> None:
    messages = chat("old", "old", "开头" + "x" * 400 + "结尾", "答案")
    fitted = fit(messages, renderer, Limits(120))
    user, answer = fitted.messages
    assert user["content"].startswith("开头x") and user["content"].endswith("x结尾") and GAP in user["content"]
    assert answer["content"] == "答案" and 100 < len(fitted.text.token_ids) <= 120
    assert "2 oldest turns left out" in fitted.cuts and "characters cut from the middle" in fitted.cuts[1]


def test_a_long_prompt_never_costs_the_assistant_s_header(renderer: ChatRenderer) -> None:
    """LLaMA-Factory keeps the head of the prompt: 299 tokens cut at 128 leave no `<|im_start|>assistant`."""
    fitted = fit(chat("很" * 290, "好的。"), renderer, Limits(128))
    ((start, end),) = learned_runs(fitted.text.trained)
    assert renderer.tokenizer.decode(fitted.text.token_ids[start:end]) == "好的。"
    with pytest.raises(RowRefused, match="the answer is kept whole"):
        fit(chat("短", "长" * 290), renderer, Limits(128))


def test_a_target_cap_ends_an_answer_after_a_whole_sentence(renderer: ChatRenderer) -> None:
    messages = chat("问", "第一句。第二句比较长一些。第三句。")
    first = len(renderer.tokenizer.encode_plain("第一句。"))
    fitted = fit(messages, renderer, Limits(1000, max_target_length=first + 3))
    assert fitted.messages[-1]["content"] == "第一句。"
    assert fitted.text.token_ids[learned_runs(fitted.text.trained)[-1][1] - 1] == renderer.turn_end_id
    assert fitted.cuts[0] == f"answers cut to max_target_length={first + 3}"
    with pytest.raises(RowRefused, match="no whole sentence"):
        fit(messages, renderer, Limits(1000, max_target_length=first))


def test_a_source_cap_counts_what_stands_before_the_last_answer(renderer: ChatRenderer) -> None:
    messages = chat("a" * 60, "b" * 60, "c", "d" * 100)
    fitted = fit(messages, renderer, Limits(1000, max_source_length=60))
    assert [message["content"] for message in fitted.messages] == ["c", "d" * 100]
