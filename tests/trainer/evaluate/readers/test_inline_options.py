import time

import pytest

from trainer.evaluate.readers.inline_options import joined_lines, question_in, questions_in, without_letters

ABCD = ("猫", "狗", "鸟", "鱼")


@pytest.mark.parametrize(
    "text",
    [
        "哪个会飞（　）\nA．猫\nB．狗\nC．鸟\nD．鱼\n",
        "哪个会飞（　） A. 猫 B. 狗 C. 鸟 D. 鱼",
        "哪个会飞（　）A、猫B、狗C、鸟D、鱼",
        "哪个会飞（　）\nA：猫\nB：狗\nC：鸟\nD：鱼",
        "哪个会飞（　）\n(A) 猫\n(B) 狗\n(C) 鸟\n(D) 鱼",
        "哪个会飞（　）\nA．猫 B．狗16C．鸟 D．鱼",  # the number of a page
        "哪个会飞（　）\nA 猫\nB 狗\nC 鸟\nD 鱼",
    ],
)
def test_options_are_taken_out_of_the_text(text: str) -> None:
    found = question_in(text)
    assert found is not None
    assert (found.stem, found.options) == ("哪个会飞（　）", ABCD)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("基因 G、g与 A、a，正确的是\nA．纯合 B．杂合 C．显性 D．隐性", ("纯合", "杂合", "显性", "隐性")),
        (
            "合成的是\nA．脂质、RNA B．氨基酸\nC．RNA、DNA D．DNA、蛋白质",
            ("脂质、RNA", "氨基酸", "RNA、DNA", "DNA、蛋白质"),
        ),
        ("A根尖 B精巢 C红细胞 D口腔\nA．A B．B C．C D．D", ("A", "B", "C", "D")),
        ("注射 A后 A. 甲 B. 维生素A. 多 C. 丙 D. 丁", ("甲", "维生素A. 多", "丙", "丁")),
        (
            "Which? A. In Washington, D.C. B. Rome C. Paris, F.R. D. Bern",
            ("In Washington, D.C.", "Rome", "Paris, F.R.", "Bern"),
        ),
        ("若 $A$ 则 A. $A.$ B. $B=2$ C. 0 D. 1", ("$A.$", "$B=2$", "0", "1")),
    ],
)
def test_letters_within_the_text_are_no_options(text: str, options: tuple[str, ...]) -> None:
    found = question_in(text)
    assert found is not None
    assert found.options == options


@pytest.mark.parametrize("text", ["", "没有选项。", "A. 只有一个", "B. 二 C. 三", "RNA、DNA"])
def test_a_text_without_a_run_of_options_has_none(text: str) -> None:
    assert question_in(text) is None


def test_each_of_several_questions_keeps_what_they_share() -> None:
    text = "材料。\n56. What? \nA. 1.5  B. 2  C. 3  D. 4\n57. Why?\nA. a B. b C. c D. d\n58 Where? A. x B. y C. z D. w"
    found = questions_in(text, 3)
    assert found is not None
    assert [question.stem for question in found] == ["材料。\n56. What?", "材料。\n57. Why?", "材料。\n58 Where?"]
    assert [question.options[-1] for question in found] == ["4", "d", "w"]


def test_numbers_stuck_to_the_option_before_part_questions() -> None:
    text = "材料，2014年。1. 首因（ ） A. 交通 B. 政策 C. 技术 D. 市场"
    text += "2. 目的（ ） A. 培育 B. 提高 C. 降低 D. 提升效 益3. 提高（ ） A. 产量 B. 质量 C. 利润 D. 价格"
    found = questions_in(text, 3)
    assert found is not None
    assert [question.options[-1] for question in found] == ["市场", "提升效 益", "价格"]
    assert [question.stem.rpartition("\n")[2][:2] for question in found] == ["1.", "2.", "3."]


def test_blanks_may_share_one_list_of_options() -> None:
    found = questions_in("First 71 . Then 72 .\nA. one\nB. two\nC. three\nD. four", 2)
    assert found is not None
    assert [question.stem.splitlines()[-1] for question in found] == ["71.", "72."]
    assert found[0].options == found[1].options == ("one", "two", "three", "four")


@pytest.mark.parametrize("count", [1, 3])
def test_answers_and_runs_of_options_must_match(count: int) -> None:
    assert questions_in("1. 甲 A. a B. b C. c 2. 乙 A. a B. b C. c", count) is None


def test_own_letters_are_left_out_where_most_options_have_them() -> None:
    assert without_letters(["(A)猫", "(B)狗", "鸟"]) == ["猫", "狗", "鸟"]
    assert without_letters(["A. cat", "B、dog", "", ""]) == ["cat", "dog", "", ""]
    assert without_letters(["A.B.公司", "乙公司", "丙公司"]) == ["A.B.公司", "乙公司", "丙公司"]
    assert without_letters(["B. cat", "A. dog"]) == ["B. cat", "A. dog"]  # not their own


def test_printed_lines_are_joined() -> None:
    assert joined_lines("漠\n不关心") == "漠不关心"
    assert joined_lines(" the\n  cat ") == "the cat"
    assert joined_lines("DNA\n分布") == "DNA 分布"


@pytest.mark.parametrize(
    "text",
    [
        "A. " * 20_000,
        "A" + " " * 60_000,
        "1 " * 20_000 + "A. a B. b C. c " * 2,
        "\n" * 60_000 + "A. x B. y",
        "（" * 60_000,
    ],
)
def test_hostile_texts_take_no_time(text: str) -> None:
    start = time.process_time()
    question_in(text)
    questions_in(text, 2)
    joined_lines(text)
    assert time.process_time() - start < 3  # squares would take minutes
