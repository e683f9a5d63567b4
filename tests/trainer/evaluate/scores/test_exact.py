"""BBH's short answers: what is compared, and what counts as the same."""

import pytest

from trainer.evaluate.scores.exact import exact_match, final_answer

RIGHT = [
    ("Let's think step by step. … So the answer is (B).", "(B)"),
    ("So the answer is (B) 04/13/2001.", "(B)"),
    ("B", "(B)"),
    ("**B.**", "(B)"),
    ("The answer is: C", "(C)"),
    ("答案是（Ｃ）。", "(C)"),
    ("The options are (A) and (B). The answer is (A), not (B).", "(A)"),
    ("\\boxed{R}", "(R)"),
    ("So the answer is True.", "True"),
    ("the answer is true", "True"),
    ("not ( True ) is False.\nSo the answer is False.", "False"),
    ("Yes", "yes"),
    ("So the answer is valid.", "valid"),
    ("So the answer is 1,234.", "1234"),
    ("So the answer is -50.", "-50"),
    ("So the answer is ] } ).", "] } )"),
    ("So the answer is apple banana  cherry.", "apple banana cherry"),
    ("First the answer is 3, but I erred.\nThe answer is 4.", "4"),
    ("… the answer is 24.\n\nQ: Next?\nA: the answer is 99.", "24"),
    ("Reasoning here\n42", "42"),
]
WRONG = [
    ("So the answer is (A).", "(B)"),
    ("The answer is (A) or (B).", "(B)"),
    ("It is between (A) and (B)", "(B)"),
    ("A big dog", "(A)"),
    ("", "(A)"),
    ("", "True"),
    ("So the answer is 3.", "-3"),
    ("So the answer is 24.5", "24"),
    ("invalid", "valid"),
    ("So the answer is ] )", "] } )"),
    ("banana apple", "apple banana"),
    ("the answer is True.\nThe answer is False.", "True"),
]


@pytest.mark.parametrize(("answer", "reference"), RIGHT)
def test_right(answer: str, reference: str) -> None:
    assert exact_match(answer, reference) == 1.0


@pytest.mark.parametrize(("answer", "reference"), WRONG)
def test_wrong(answer: str, reference: str) -> None:
    assert exact_match(answer, reference) == 0.0


def test_the_final_answer() -> None:
    assert exact_match("The answer is ..", "..") == 1.0 and exact_match("The answer is ..", "!") == 0.0  # only marks
    assert final_answer("一步步想。\n所以答案是 42。") == "42。"
    with pytest.raises(ValueError):
        exact_match("x", "  ")
