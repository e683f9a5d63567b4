import json

import pytest

from trainer.data.identity import TEMPLATES
from trainer.evaluate.scores.identity import identity_questions, identity_score


def test_twenty_questions_none_of_which_names_a_model_or_is_trained_on() -> None:
    questions = identity_questions()
    assert len({question.text for question in questions}) == len({question.question_id for question in questions}) == 20
    assert [question.language for question in questions].count("zh") == 10
    for question in questions:
        assert identity_score(question.text, "小智", "stop").foreign == ()
    trained = {text for group in json.loads(TEMPLATES.read_text("utf-8")) for text in group["questions"]}
    assert [question.text for question in questions if question.text in trained] == []


@pytest.mark.parametrize(
    ("answer", "name", "failed"),
    [
        ("我是小智，由启明研发的 AI 助手。", "小智", ()),
        ("I'm Little Q, an assistant.", "little q", ()),
        ("I'm  ＬＩＴＴＬＥ　Ｑ.", "Little Q", ()),
        ("我是LittleQ。", "Little Q", ()),
        ("我是一个助手。", "小智", ("no-name",)),
        ("I also help.", "Al", ("no-name",)),
        ("我是通义千问。", "小智", ("no-name", "foreign-name")),
        ("我是小智，基于Qwen2的助手", "小智", ("foreign-name",)),
        ("I am Nova, based on chatgpt-4.", "Nova", ("foreign-name",)),
        ("我是小智，由阿里云训练。", "小智", ("foreign-name",)),
        ("I am Nova, not ChatGPT.", "Nova", ("foreign-name",)),
        ("I am Nova. Googled it.", "Nova", ()),
        ("", "小智", ("no-name",)),
        # Chinese has no spaces between words, and there is one beside Latin or not
        ("我是小智AI助手。", "小智", ()),
        ("我是AI小智", "小智", ()),
        ("我是V2小智", "小智", ()),
        ("我叫心语 AI", "心语AI", ()),
        ("我叫心语AI。", "心语 AI", ()),
        ("我叫心语AID", "心语AI", ("no-name",)),
        ("我是Q小智", "Q 小智", ()),
        ("我是IQ小智", "Q小智", ("no-name",)),
        ("我是小智，由AI百度研发", "小智", ("foreign-name",)),
    ],
)
def test_rules(answer: str, name: str, failed: tuple[str, ...]) -> None:
    assert identity_score(answer, name, "stop").failed == failed
    assert identity_score(answer, name, "length").failed == (*failed, "not-stopped")


def test_a_configured_name_is_not_foreign() -> None:
    assert identity_score("我是Qwen-Psy。", "Qwen-Psy", "stop").passed
    assert identity_score("我是小智，由百度研发。", "小智", "stop", author="百度").passed
    assert not identity_score("我是Qwen-Psy，来自OpenAI。", "Qwen-Psy", "stop").passed
    with pytest.raises(ValueError):
        identity_score("x", " ", "stop")
