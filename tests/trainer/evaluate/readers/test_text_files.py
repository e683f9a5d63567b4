from pathlib import Path

import pytest

from tests.trainer.evaluate.readers import benchmark_files as files
from trainer.evaluate.items import TextItem
from trainer.evaluate.read_items import read_items


def text_items(path: Path) -> list[TextItem]:
    (found,) = read_items(path)
    assert not found.refused
    return [item for item in found.items if isinstance(item, TextItem)]


def said(item: TextItem) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in item.messages]


def test_a_prompt_and_its_response(tmp_path: Path) -> None:
    files.text(tmp_path)
    (item,) = text_items(tmp_path / "advert.jsonl")
    assert (item.benchmark, item.subject, item.references) == ("advert", "advert", ("好裤子。",))
    assert said(item) == [("user", "类型#裤")]
    assert not item.is_exact


def test_questions_about_one_case_are_asked_one_by_one(tmp_path: Path) -> None:
    files.text(tmp_path)
    first, second = text_items(tmp_path / "clinic.json")
    assert said(first) == [("user", "病人，男。\n\n诊断？")]
    assert said(second) == [("user", "病人，男。\n\n治疗？")]
    assert (first.references, second.references) == (("疝。",), ("手术。",))


def test_of_a_conversation_the_last_turn_is_asked_and_answers_may_be_several(tmp_path: Path) -> None:
    files.text(tmp_path)
    talk, sums = text_items(tmp_path / "chat.jsonl")
    assert said(talk) == [("user", "你好"), ("assistant", "你好！"), ("user", "再见")]
    assert talk.references == ("再见！",)
    assert sums.references == ("2", "two")


def test_a_table_in_gbk(tmp_path: Path) -> None:
    files.text(tmp_path)
    (item,) = text_items(tmp_path / "clinic_gbk.csv")
    assert (said(item), item.references) == ([("user", "头痛怎么办")], ("多休息",))


@pytest.mark.parametrize(
    ("record", "code"),
    [
        ({"prompt": "问", "response": ""}, "empty-answer"),
        ({"prompt": "", "response": "答"}, "empty-question"),
        ({"prompt": "问", "response": None}, "null-text"),
        ({"title": "x"}, "unknown-shape"),
        ({"description": "x", "QA_pairs": [{"question": "问", "answer": ""}]}, "missing-answer"),
        ({"question": "问", "answers": ["答", " "]}, "missing-answer"),
        ({"question": "问", "A": "1", "B": "2", "answer": "A"}, "exam-question"),
    ],
)
def test_rows_without_question_or_answer_are_refused(record: object, code: str, tmp_path: Path) -> None:
    good = {"prompt": "问", "response": "答"}
    (found,) = read_items(files.write_lines(tmp_path / "qa.jsonl", [good, good, record]))
    assert [(item.line, item.code) for item in found.refused] == [(3, code)]
    assert len(found.items) == 2


def test_bbh_with_its_worked_examples(tmp_path: Path) -> None:
    (found,) = read_items(files.bbh(tmp_path))
    items = [item for item in found.items if isinstance(item, TextItem)]
    assert (found.benchmark, {item.subject for item in items}) == ("bbh", {"boolean_expressions"})
    scored = [item for item in items if not item.is_example]
    assert [(item.references, item.is_exact) for item in scored] == [(("False",), True), (("True",), True)]
    first, second = (item for item in items if item.is_example)
    assert said(first) == [("system", "Evaluate the expression."), ("user", "not True is")]
    assert first.references == ("Let's think.\nSo the answer is False.",)
    assert second.references == ("It is True.\nSo the answer is True.",)


def test_bbh_one_example_a_line_without_worked_examples(tmp_path: Path) -> None:
    rows = [{"input": "sort: b a", "target": "a b"}, {"input": "sort: c", "target": ""}]
    (found,) = read_items(files.write_lines(tmp_path / "word_sorting.jsonl", rows))
    assert (found.benchmark, len(found.items), [item.code for item in found.refused]) == ("bbh", 1, ["missing-answer"])


def test_input_and_target_elsewhere_are_a_text_set_unless_bbh_is_asked_for(tmp_path: Path) -> None:
    path = files.write_lines(tmp_path / "mine.jsonl", [{"input": "问", "target": "答"}])
    (item,) = text_items(path)
    assert (item.benchmark, item.is_exact) == ("mine", False)
    (found,) = read_items(path, "bbh")
    assert [item.is_exact for item in found.items if isinstance(item, TextItem)] == [True]


@pytest.mark.parametrize(
    ("given", "reference"),
    [
        ({"answer": 0}, "0"),
        ({"answer": 0.5}, "0.5"),
        ({"answer": " 2 "}, "2"),
        ({"answer": "", "label": 0}, "0"),
        ({"answer": " "}, None),
        ({"answer": []}, None),
        ({"answer": None}, None),
    ],
)
def test_a_short_answer_may_be_zero_but_not_empty(
    given: dict[str, object], reference: str | None, tmp_path: Path
) -> None:
    empty = {"passage": None, "options": None, "label": None}
    rows = [{**empty, "question": "1 + 1 = ?", "answer": "2"}, {**empty, "question": "1 - 1 = ?", **given}]
    (found,) = read_items(files.write_lines(tmp_path / "mathematics.jsonl", rows))
    if reference is None:
        assert [(item.line, item.code) for item in found.refused] == [(2, "missing-answer")]
    else:
        assert [item.references for item in text_items(tmp_path / "mathematics.jsonl")] == [("2",), (reference,)]
