"""Each benchmark's files, in their real shapes, to items; and what of them is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.evaluate.readers import benchmark_files as files
from trainer.evaluate.items import ChoiceItem, ItemSet, TextItem
from trainer.evaluate.read_items import read_items


def only(path: Path) -> ItemSet:
    found = read_items(path)
    assert len(found) == 1
    return found[0]


def choice_items(item_set: ItemSet) -> list[ChoiceItem]:
    return [item for item in item_set.items if isinstance(item, ChoiceItem)]


def test_mmcu_workbooks(tmp_path: Path) -> None:
    found = only(files.mmcu(tmp_path))
    assert found.benchmark == "mmcu"
    assert not found.refused
    items = choice_items(found)
    assert [(item.subject, item.letters, item.is_example) for item in items] == [
        ("医疗", "A", True),
        ("医疗", "A", False),
        ("医疗", "C", False),
        ("医疗", "C", False),
    ]
    assert items[1].options == ("布洛芬", "胰岛素", "地高辛")  # the unused fourth is left out
    assert items[2].source.endswith("test/医疗.xlsx#内科2题")
    assert items[2].line == 3
    assert found.notes == {"unused-option-dropped": 1, "answer-tidied": 2}


def test_mmcu_as_alpaca_cot_has_it(tmp_path: Path) -> None:
    found = only(files.mmcu_json(tmp_path))
    one, several = choice_items(found)
    assert (found.benchmark, one.subject, one.options) == ("mmcu", "心理", ("表情", "血压", "体温", "记忆"))
    assert (one.letters, one.is_multiple) == ("A", False)
    assert (several.letters, several.is_multiple) == ("AB", True)


def test_ceval_and_its_test_split_without_answers(tmp_path: Path) -> None:
    found = only(files.ceval(tmp_path))
    dev, first, second = choice_items(found)
    assert found.benchmark == "ceval"
    assert {item.subject for item in (dev, first, second)} == {"law"}
    assert (dev.is_example, dev.letters, dev.options[2]) == (True, "C", "2021年")
    assert (first.question, first.letters) == ("成年的年龄是\n____。", "B")
    assert (second.question, second.line) == ("甲,乙", 4)
    assert [(item.code, item.line) for item in found.refused] == [("missing-answer", 2)]


def test_cmmlu_with_an_index_column_and_a_byte_order_mark(tmp_path: Path) -> None:
    found = only(files.cmmlu(tmp_path))
    assert found.benchmark == "cmmlu"
    assert [(item.letters, item.is_example) for item in choice_items(found)] == [
        ("A", True),
        ("B", False),
        ("D", False),
    ]
    assert not found.refused


def test_mmlu_without_a_header(tmp_path: Path) -> None:
    found = only(files.mmlu(tmp_path))
    dev, first, second = choice_items(found)
    assert (found.benchmark, dev.subject, first.subject) == ("mmlu", "anatomy", "anatomy")
    assert (dev.is_example, dev.letters, dev.line) == (True, "C", 1)
    assert (first.question, first.letters) == ("The heart, in man, has", "D")
    assert (second.options[0], second.letters, second.line) == ("ulna, left", "B", 2)


def test_gaokao_options_and_questions_come_out_of_the_text(tmp_path: Path) -> None:
    found = only(files.gaokao(tmp_path))
    single, first, second = choice_items(found)
    assert (found.benchmark, single.subject) == ("gaokao", "2010-2022_History_MCQs")
    assert single.options == ("河南、河北", "湖南、湖北", "山东、山西", "广东、广西")
    assert (single.letters, single.question[-2:]) == ("C", "　）")
    assert first.question == "阅读下面文字，完成1～2题。\n甲地多雨。\n1．甲地的气候是（ ）"
    assert second.question == "阅读下面文字，完成1～2题。\n甲地多雨。\n2．甲地种植（ ）"
    assert (first.letters, second.letters, second.options[3], second.line) == ("A", "B", "甜菜", 2)


def test_agieval_single_several_five_and_no_options(tmp_path: Path) -> None:
    found = only(files.agieval(tmp_path))
    assert found.benchmark == "agieval"
    by_subject = {item.subject: item for item in found.items}
    biology, law, logic = (by_subject[name] for name in ("gaokao-biology", "jec-qa-kd", "lsat-ar"))
    assert isinstance(biology, ChoiceItem) and isinstance(law, ChoiceItem) and isinstance(logic, ChoiceItem)
    assert (biology.options[1], biology.letters, biology.is_multiple) == ("磷脂", "B", False)
    assert (law.letters, law.is_multiple) == ("AC", True)
    assert (logic.question, logic.letters) == ("Six people sit in a row.\nWho sits first?", "E")
    cloze = by_subject["gaokao-mathcloze"]
    assert isinstance(cloze, TextItem)
    assert (cloze.references, cloze.is_exact) == (("2",), True)


def test_cpsyexam_by_its_question_type(tmp_path: Path) -> None:
    found = only(files.cpsyexam(tmp_path))
    several, single = choice_items(found)
    assert (found.benchmark, several.subject) == ("cpsyexam", "普通心理学")
    assert (several.letters, several.is_multiple, len(several.options)) == ("ABCD", True, 4)
    assert (single.letters, single.is_multiple) == ("A", False)


def test_gold_that_is_an_options_text(tmp_path: Path) -> None:
    found = only(files.option_text(tmp_path))
    chinese, english = choice_items(found)
    assert (found.benchmark, chinese.subject) == ("option_text", "exam_option_text")
    assert (chinese.question, chinese.options, chinese.letters) == ("分离沸点不同的物质用", ("膜分离法", "分馏法"), "B")
    assert (english.question, english.options, english.letters) == ("Capital of France?", ("Paris", "Rome"), "A")


RECORDS: dict[str, dict[str, Any]] = {
    "columns": {"question": "1+1?", "A": 1, "B": 2, "answer": "B"},
    "named columns": {"题干": "1+1?", "选项A": "1", "选项B": "2", "标准答案": "b"},
    "object": {"question": "1+1?", "options": {"A": "1", "B": "2"}, "answer": "B"},
    "list and index": {"question": "1+1?", "choices": [1, 2], "answer": 1},
    "keys and values": {"question": "1+1?", "options": [{"key": "A", "value": "1"}, {"key": "B", "value": "2"}],
                        "answer": "2", "answer_idx": "B"},
    "text and label": {"question": "1+1?", "choices": {"text": ["1", "2"], "label": ["A", "B"]}, "answerKey": "B"},
    "lines": {"question": "1+1?", "options": "A. 1\nB. 2", "answer": "B"},
    "tabs": {"question": "1+1?", "options": "1\t2", "answer": "答案：B"},
    "in the question": {"question": "1+1?\nA. 1\nB. 2", "answer": "B"},
    "alpaca": {"instruction": "1+1?\nA. 1\nB. 2", "input": "", "output": "B"},
    "medmcqa": {"question": "1+1?", "opa": "1", "opb": "2", "answer": "B"},
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_an_exam_of_ones_own(name: str, tmp_path: Path) -> None:
    found = only(files.write_lines(tmp_path / "entry_exam.jsonl", [RECORDS[name]]))
    assert not found.refused
    (item,) = choice_items(found)
    assert (found.benchmark, item.question, item.options, item.letters) == ("entry_exam", "1+1?", ("1", "2"), "B")


def test_a_workbook_without_a_header_and_one_with_other_names(tmp_path: Path) -> None:
    files.write_book(tmp_path / "a.xlsx", {"S": [("一加一", 1, 2.0, "B"), ("半", 0.5, 3, "A")]})
    rows = [("序号", "题目", "选项1", "选项2", "答案"), (1, "一加一", "1", "2", "B")]
    files.write_book(tmp_path / "b.xlsx", {"S": [row[1:] for row in rows]})
    first, second = (choice_items(item_set) for item_set in read_items(tmp_path))
    assert [(item.options, item.letters, item.line) for item in first] == [(("1", "2"), "B", 1), (("0.5", "3"), "A", 2)]
    assert [(item.question, item.options, item.letters) for item in second] == [("一加一", ("1", "2"), "B")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_encodings_and_line_ends(encoding: str, end: str, tmp_path: Path) -> None:
    rows = ["id,question,A,B,C,D,answer", "0,水的化学式是什么,水,冰,汽,雪,Ａ", '1,"甲，乙",丙,丁,戊,己,c']
    found = only(files.write(tmp_path / "ceval.csv", end.join(rows), encoding))
    assert [(item.question, item.letters) for item in choice_items(found)] == [
        ("水的化学式是什么", "A"),
        ("甲，乙", "C"),
    ]
    assert not found.refused


GOOD = {"question": "1+1?", "A": "1", "B": "2", "C": "3", "D": "", "answer": "B"}
REFUSED: dict[str, tuple[Any, str]] = {
    "gold names an empty option": ({**GOOD, "answer": "D"}, "empty-gold"),
    "gold outside": ({**GOOD, "answer": "E"}, "gold-outside"),
    "no answer": ({**GOOD, "answer": ""}, "missing-answer"),
    "null answer": ({**GOOD, "answer": None}, "missing-answer"),
    "answer in words": ({**GOOD, "answer": "see book"}, "bad-answer"),
    "no question": ({**GOOD, "question": "  "}, "missing-question"),
    "null question": ({**GOOD, "question": None}, "missing-question"),
    "an empty option before others": ({**GOOD, "A": ""}, "empty-option"),
    "the right option twice": ({**GOOD, "A": "2"}, "duplicate-option"),
    "one option": ({**GOOD, "B": "", "C": "", "answer": "A"}, "no-options"),
    "no options": ({"question": "1+1?", "answer": "B"}, "no-options"),
    "eleven options": ({"question": "?", "options": [str(n) for n in range(11)], "answer": "B"}, "too-many-options"),
    "an option that is a list": ({**GOOD, "A": ["1"]}, "list-content"),
    "not an object": (["1+1?", "1", "2", "B"], "wrong-shape"),
    "a lone surrogate": ({**GOOD, "question": "\ud800"}, "lone-surrogate"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_question_that_cannot_be_scored_is_refused_by_name(name: str, tmp_path: Path) -> None:
    record, code = REFUSED[name]
    path = tmp_path / "exam.jsonl"

    path.write_text("\n".join(json.dumps(each) for each in (GOOD, GOOD, GOOD, record, GOOD)))
    found = only(path)
    assert [(item.code, item.line, item.source) for item in found.refused] == [(code, 4, str(path))]
    assert "1+1" not in found.refused[0].detail
    assert len(found.items) == 4


def test_wrong_rows_of_a_table_cost_themselves_only(tmp_path: Path) -> None:
    rows = "Why?,a,b,c,d,A\nWhat?,a,b,D\nWho?,a,b,c,d,B\nWhen?,a,b,c,d,e,C\nWhere?,a,b,c,d,\n"
    found = only(files.write(tmp_path / "mmlu_test.csv", rows))
    assert [item.question for item in choice_items(found)] == ["Why?", "Who?"]
    assert [(item.line, item.code) for item in found.refused] == [
        (2, "wrong-columns"),
        (4, "wrong-columns"),
        (5, "missing-answer"),
    ]


def test_two_equal_wrong_options_are_noted_and_used(tmp_path: Path) -> None:
    found = only(files.write_lines(tmp_path / "exam.jsonl", [{**GOOD, "C": "1"}]))
    assert (len(found.items), found.notes["equal-wrong-options"]) == (1, 1)


Writer = Callable[[Path], Path]


@pytest.mark.parametrize("writer", [files.mmcu_json, files.gaokao, files.cpsyexam, files.option_text])
def test_a_kind_that_is_asked_for_is_the_only_one_read(writer: Writer, tmp_path: Path) -> None:
    path = writer(tmp_path)
    assert read_items(path, "choice")[0].items
    (as_sql,) = read_items(path, "sql")
    assert not as_sql.items
    assert as_sql.refused
