"""Whether a model prefers a place among the options, whatever stands there."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from trainer.evaluate.items import LETTERS

_MIN_EXPECTED: Final = 5.0  # Cochran's rule: with fewer expected choices the χ² distribution does not fit


@dataclass(frozen=True, kw_only=True)
class PositionBias:
    """`shares` of each letter among the choices, `gold_shares` among the right answers of the same questions."""

    shares: dict[str, float]
    gold_shares: dict[str, float]
    num_choices: int
    num_without: int  # answers from which no letter was read
    chi_square: float | None  # None, as p, where a letter is right in too few questions to tell (fewer than 5)
    p: float | None


def position_bias(chosen: Sequence[str | None], gold: Sequence[str]) -> PositionBias:
    """Compares the letters that were chosen with the right ones, question by question of the same list, by Pearson's
    χ² test of fit with the right letters' shares as the expected ones.

    For single-choice questions whose options were shuffled: only then is a preferred letter the model's doing and not
    the questions'. A small p says that the model prefers places. Letters that are nowhere chosen or right are left
    out. Raises ValueError where an entry of `gold` is not one letter or the lengths differ.
    """
    if len(chosen) != len(gold) or any(len(letter) != 1 for letter in gold):
        raise ValueError("position bias needs one right letter for each of the chosen ones")
    pairs = [(letter, right) for letter, right in zip(chosen, gold, strict=True) if letter and len(letter) == 1]
    found, right = Counter(letter for letter, _ in pairs), Counter(right for _, right in pairs)
    letters = [letter for letter in LETTERS if found[letter] or right[letter]]
    total = len(pairs)
    is_testable = len(letters) > 1 and min(right[letter] for letter in letters) >= _MIN_EXPECTED
    statistic = sum((found[letter] - right[letter]) ** 2 / right[letter] for letter in letters) if is_testable else None
    return PositionBias(
        shares={letter: found[letter] / total for letter in letters},
        gold_shares={letter: right[letter] / total for letter in letters},
        num_choices=total,
        num_without=len(chosen) - total,
        chi_square=statistic,
        p=None if statistic is None else chi_square_tail(statistic, len(letters) - 1),
    )


def chi_square_tail(statistic: float, degrees: int) -> float:
    """P(χ² with `degrees` degrees of freedom ≥ statistic), by the closed forms for whole degrees (Abramowitz & Stegun
    26.4.4 and 26.4.5)."""
    half = statistic / 2
    if degrees % 2:
        terms = (half ** (k - 0.5) / math.gamma(k + 0.5) for k in range(1, (degrees + 1) // 2))
        return math.erfc(math.sqrt(half)) + math.exp(-half) * math.fsum(terms)
    return math.exp(-half) * math.fsum(half**k / math.factorial(k) for k in range(degrees // 2))
