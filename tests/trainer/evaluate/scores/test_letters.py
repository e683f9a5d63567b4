"""Which option a written answer chooses, and which answers choose none."""

import pytest

from trainer.evaluate.scores.letters import letters_in, option_in

CHOOSING = {
    # the whole answer, or its first line
    "B": "B",
    "b": "B",
    " B.\n": "B",
    "(B)": "B",
    "（Ｂ）": "B",
    "Ｂ": "B",
    "【B】": "B",
    "<B>": "B",
    "**B**": "B",
    "d)": "D",
    "A、C": "AC",
    "A，B，D": "ABD",
    "ABD": "ABD",
    "A, B and D": "ABD",
    "A and C": "AC",
    "C选项": "C",
    "选项C": "C",
    "选AC": "AC",
    "B\n\n解析：因为……": "B",
    "CA": "AC",
    "C、A、B": "ABC",
    "AC两项": "AC",
    "\\boxed{C}": "C",
    "$\\boxed{\\text{C}}$": "C",
    # a conclusion
    "答案是B": "B",
    "答案：ＡＢＤ。": "ABD",
    "正确答案为：A、C、D": "ACD",
    "故选D。": "D",
    "答案应为C项": "C",
    "【答案】B": "B",
    "【答案】 ABD": "ABD",
    "因此，正确选项是 D 。": "D",
    "综上，答案选ABD": "ABD",
    "正确答案是A和B": "AB",
    "正确的是C": "C",
    "The answer is B.": "B",
    "The correct answer is (C) because": "C",
    "The correct answer is **B**: depression": "B",
    "Answer: C": "C",
    'I think the answer should be "A".': "A",
    "The answer is B.Depression": "B",
    "Thus, (D).": "D",
    "A. 错误\nB. 正确\n故选B": "B",
    "有人会选A，但答案是C。": "C",
    "正确选项的字母是 ABD": "ABD",
    "正确选项的字母：B": "B",
    "所有正确选项的字母是：ABD": "ABD",
    "正确答案的字母为C。": "C",
    "正确答案有ABD。": "ABD",
    "正确的有A和B两个": "AB",
    "正确答案包括A、C、D。": "ACD",
    "正确选项分别是A、C": "AC",
    "本题答案为ABD，C选项错误。": "ABD",
    "答案是A，B不对": "A",
    "The answer is A, B is wrong.": "A",
    "The answers are A, C, and D.": "ACD",
    # a choice
    "不选A，选B": "B",
    "根据题意选 A": "A",
    "我选择B，因为": "B",
    "A不对，B正确": "B",
    "A、B两项均不对，选C": "C",
    "A和B都正确": "AB",
    "A、B、D三项正确": "ABD",
    "A、B两个选项都是正确的": "AB",
    "应选AC两项": "AC",
    "I would choose D.": "D",
    "Option B is correct.": "B",
    "A is not correct; C is correct": "C",
    "Both A and B are correct": "AB",
    # the letter that leads
    "B. 抑郁症": "B",
    "B、抑郁症": "B",
    "B：抑郁症": "B",
    "(D) foo": "D",
    "B) foo": "B",
    "C选项描述的是强迫症": "C",
    "C选项最符合题意，A选项太片面": "C",
    "A. 缺乏维生素 B、维生素 D": "A",
}
SILENT = [
    "",
    "  \n",
    "我不知道",
    "A patient has a fever.",
    "The answer is A patient with fever",
    "a patient",
    "本题应选择B超检查",
    "C反应蛋白升高",
    "BC 200 years",
    "B.C. 200",
    "The answer is B-cell lymphoma",
    "维生素B缺乏",
    "答案是A还是B？",
    "A or B",
    "答案不是A",
    "The answer is not A.",
    "BAD",
    "FACE",
    "AABB",
    "A. 错误\nB. 正确",
    "选项：\nA. 一\nB. 二",
    "B\n所以答案是C",
    "选B。选C。",
    "A\nB\nC",
    "A:The patient",
    "答案是A。等等，答案是B。",
    "Dear user, the options are listed above.",
    "A. B. C.",
    "A. 甲 C. 丙",
    "A、甲；C、丙",
    "(A) 甲，(C) 丙",
    "A. 12 C. 15",
    "答案是A、B两项均不对",
    "选A、B都不对",
    "答案不包括A",
    "正确答案没有A",
    "选项有A、B、C、D四个",
    "A、B、C、D四个选项各有道理",
    "CAB",
    "ca",
    "I",
]


@pytest.mark.parametrize(("answer", "letters"), CHOOSING.items())
def test_a_plain_choice_is_read(answer: str, letters: str) -> None:
    assert letters_in(answer, 4) == letters


@pytest.mark.parametrize("answer", SILENT)
def test_no_guess(answer: str) -> None:
    assert letters_in(answer, 4) is None


@pytest.mark.parametrize("answer", ["E", "答案是E", "The answer is AE.", "选BF"])
def test_a_letter_without_an_option_is_no_choice(answer: str) -> None:
    assert letters_in(answer, 4) is None


def test_more_options_more_letters() -> None:
    assert letters_in("答案是E", 5) == "E"
    assert letters_in("选择 A、E、J", 10) == "AEJ"


def test_every_letter_is_read_alike() -> None:
    """A form that is read for B and not for A would look like a preference of the model's."""
    forms = [
        "{0}",
        "({0})",
        "{0}.",
        "{0}. text here",
        "{0}、文字",
        "{0}：文字",
        "答案是{0}",
        "故选{0}。",
        "The answer is {0}.",
        "I choose {0}",
    ]
    for form in forms:
        assert [letters_in(form.format(letter), 5) for letter in "ABCDE"] == list("ABCDE"), form


OPTIONS = ("抑郁症", "重度抑郁症", "强迫症", "焦虑症")


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("重度抑郁症", 1),
        ("抑郁症。", 0),
        ("我认为是重度抑郁症。", 1),
        ("应诊断为 强迫症", 2),
        ("抑郁症和强迫症", None),
        ("不是抑郁症", None),
        ("重度抑郁症，也叫抑郁症", None),
        ("都不对", None),
    ],
)
def test_the_text_of_one_option(answer: str, index: int | None) -> None:
    assert option_in(answer, OPTIONS) == index
    assert letters_in(answer, 4, OPTIONS) == (None if index is None else "ABCD"[index])


@pytest.mark.parametrize(
    ("answer", "index"), [("It is 5.", 0), ("15", 1), ("the value 1.5", 2), ("5.5", None), ("-5", 3), ("155", None)]
)
def test_a_number_stands_alone(answer: str, index: int | None) -> None:
    assert option_in(answer, ("5", "15", "1.5", "-5")) == index


def test_equal_options_cannot_be_told_apart() -> None:
    assert option_in("抑郁症", ("抑郁症", "抑郁症 ", "焦虑症")) is None


def test_letters_come_before_texts() -> None:
    assert letters_in("B. 强迫症", 4, OPTIONS) == "B"
