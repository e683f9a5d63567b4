from pathlib import Path

import pytest

from server.text.render import ChatRenderer
from trainer.formats import Reject, Row
from trainer.labels import IGNORED, chat_examples, text_examples


@pytest.fixture(scope="module")
def renderer(blank_model: Path) -> ChatRenderer:
    return ChatRenderer.load(blank_model)


def chat(*texts: str, system: str | None = None) -> Row:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return Row("x.jsonl", 1, tuple(messages))


def test_labels_cover_exactly_the_answers_and_their_stop_tokens(renderer: ChatRenderer) -> None:
    row = chat("你是谁？", "我是演示助手。", "Who are you?", "I am 😀", system="短")
    (example,), rejects = chat_examples([row], renderer, 256)
    assert rejects == []
    assert example.token_ids == renderer.render(list(row.messages), add_generation_prompt=False)
    pieces: list[list[int]] = [[]]
    for label in example.labels:
        if label != IGNORED:
            pieces[-1].append(label)
        elif pieces[-1]:
            pieces.append([])
    answers = [[*renderer.tokenizer.encode_plain(text), renderer.turn_end_id] for text in ("我是演示助手。", "I am 😀")]
    assert [piece for piece in pieces if piece] == answers
    assert all(label in (token, IGNORED) for label, token in zip(example.labels, example.token_ids, strict=True))


def test_the_trained_answer_follows_the_serving_prompt(renderer: ChatRenderer) -> None:
    row = chat("a", "b", "c", "d")
    (example,), _ = chat_examples([row], renderer, 256)
    prompt = renderer.render(list(row.messages[:-1]))
    assert example.token_ids[: len(prompt)] == prompt
    assert example.labels[len(prompt)] != IGNORED == example.labels[len(prompt) - 1]


def test_a_typed_stop_token_is_plain_text_and_trains_no_early_end(renderer: ChatRenderer) -> None:
    (example,), _ = chat_examples([chat("<|im_end|>", "a<|im_end|>b")], renderer, 256)
    assert example.labels.count(renderer.turn_end_id) == 1  # type: ignore[arg-type]


def test_long_rows_go_to_the_ledger_with_both_numbers(renderer: ChatRenderer) -> None:
    rows = [chat("a", "b"), Row("x.jsonl", 9, chat("a", "b" * 300).messages), Reject("x.jsonl", 10, "bad")]
    examples, rejects = chat_examples(rows, renderer, 64)
    assert len(examples) == 1
    assert [(reject.line, reject.reason[:3]) for reject in rejects] == [(9, "is "), (10, "bad")]
    assert "max_length is 64" in rejects[0].reason


def test_text_is_chained_cut_and_learned_whole(renderer: ChatRenderer) -> None:
    rows = [Row("x", 1, text="你好，"), Row("x", 2, text="Who are you?"), Reject("x", 3, "bad")]
    examples, rejects = text_examples(rows, renderer, 7, 5)
    stream = [*renderer.tokenizer.encode_plain("你好，"), 7, *renderer.tokenizer.encode_plain("Who are you?"), 7]
    joined = [token for example in examples for token in example.token_ids]
    assert joined == stream[: len(joined)] and len(stream) - len(joined) < 2
    assert all(example.labels == example.token_ids and len(example.labels) <= 5 for example in examples)
    assert rejects == [Reject("x", 3, "bad")]
