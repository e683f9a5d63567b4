"""The χ² test against printed tables, simulation, and a model that always says B."""

import random

import pytest

from trainer.evaluate.scores.position import chi_square_tail, position_bias


@pytest.mark.parametrize(
    ("statistic", "degrees", "p"),
    [
        (3.841, 1, 0.05),
        (5.991, 2, 0.05),
        (7.815, 3, 0.05),
        (9.488, 4, 0.05),
        (11.070, 5, 0.05),
        (16.919, 9, 0.05),
        (6.635, 1, 0.01),
        (11.345, 3, 0.01),
        (16.266, 3, 0.001),
        (0.0, 3, 1.0),
    ],
)
def test_the_tail_is_the_printed_tables(statistic: float, degrees: int, p: float) -> None:
    assert chi_square_tail(statistic, degrees) == pytest.approx(p, rel=0.002)


def test_by_hand() -> None:
    # right: 10 each of A and B; chosen: 15 A, 5 B → 25/10 + 25/10 = 5, one degree of freedom.
    found = position_bias("A" * 15 + "B" * 5, "AB" * 10)
    assert found.chi_square == 5 and found.p == pytest.approx(0.02535, abs=1e-5)
    assert found.shares == {"A": 0.75, "B": 0.25} and found.gold_shares == {"A": 0.5, "B": 0.5}


def test_a_model_that_always_says_b_and_one_that_reads() -> None:
    draw = random.Random(2)
    gold = [draw.choice("ABCD") for _ in range(400)]
    always = position_bias(["B"] * 400, gold)
    assert always.shares["B"] == 1 and always.p is not None and always.p < 1e-12
    perfect = position_bias(gold, gold)
    assert perfect.chi_square == 0 and perfect.p == 1


def test_blind_choices_are_rarely_called_biased() -> None:
    """Letters drawn evenly against right letters that are even, too: no preference, so few small p values."""
    draw = random.Random(3)
    gold = list("ABCD" * 50)
    found = [position_bias([draw.choice("ABCD") for _ in gold], gold).p for _ in range(400)]
    assert 0.02 <= sum(p is not None and p < 0.05 for p in found) / 400 <= 0.09


def test_too_few_and_none() -> None:
    few = position_bias(["A", "C", None, "AB"], ["A", "B", "A", "B"])
    assert few.p is None and few.chi_square is None and few.num_choices == 2 and few.num_without == 2
    assert position_bias([], []).shares == {}
    with pytest.raises(ValueError):
        position_bias(["A"], ["AB"])
    with pytest.raises(ValueError):
        position_bias(["A"], [])
