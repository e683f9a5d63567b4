import pytest

from trainer.data.rows import RowRefused
from trainer.evaluate.readers.answers import answers_of, letters_of

OPTIONS = ["甲", "乙", "丙", "丁"]


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("B", "B"),
        ("b", "B"),
        (" B ", "B"),
        ("Ｂ", "B"),
        ("(B)", "B"),
        ("（Ｂ）。", "B"),
        ("B.", "B"),
        ("答案：B", "B"),
        ("正确答案是：B", "B"),
        ("故选B", "B"),
        ("The correct answer is B.", "B"),
        ("Answer: (B)", "B"),
        ("AB", "AB"),
        ("A,B", "AB"),
        ("A、B", "AB"),
        ("A，B", "AB"),
        ("A / B", "AB"),
        ("ABCD", "ABCD"),
        ("DCBA", "ABCD"),
        ("ＡＢＤ", "ABD"),
        ("abd", "ABD"),
        ("A,A,C", "AC"),
        ("A和C", "AC"),
        ("A，", "A"),
    ],
)
def test_letters_are_read_however_they_are_written(text: str, letters: str) -> None:
    found = letters_of(text)
    assert found is not None
    assert "".join("ABCD"[index] for index in found) == letters


@pytest.mark.parametrize("text", ["", " ", "无", "对", "3", "A dog", "BX", "AK", "因为A", "1A", "A=B", "Because"])
def test_what_is_no_answer_of_letters_is_not_guessed(text: str) -> None:
    assert letters_of(text) is None


@pytest.mark.parametrize(
    ("value", "answers", "note"),
    [
        ("C", (2,), ""),
        ("BD", (1, 3), ""),
        ("DB", (1, 3), "answer-tidied"),
        ("c", (2,), "answer-tidied"),
        (["A", "C"], (0, 2), ""),
        (["B"], (1,), ""),
        (2, (2,), "answer-is-index"),
        ("丙", (2,), "answer-is-text"),
    ],
)
def test_answers_become_indices(value: object, answers: tuple[int, ...], note: str) -> None:
    assert answers_of(value, OPTIONS) == (answers, note)


def test_an_option_called_like_a_letter_beyond_the_options_is_meant_by_its_text() -> None:
    assert answers_of("E", ["E", "F", "G"]) == ((0,), "answer-is-text")
    assert answers_of("A", ["B", "A"]) == ((0,), "")  # a letter that names an option is a letter


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ("", "missing-answer"),
        (" , ", "missing-answer"),
        ("甲和乙都对", "bad-answer"),
        (1.5, "bad-answer"),
        (True, "bad-answer"),
        ({"A": 1}, "bad-answer"),
        ([1, 2], "bad-answer"),
        ([], "bad-answer"),
        (-1, "gold-outside"),
        (99, "gold-outside"),
    ],
)
def test_unusable_answers_are_refused_by_name(value: object, code: str) -> None:
    with pytest.raises(RowRefused) as refused:
        answers_of(value, OPTIONS)
    assert refused.value.code == code
    assert "甲" not in refused.value.detail  # never the text
