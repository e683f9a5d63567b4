"""The rule of agreement, with an engine that is a list of tokens."""

import asyncio
from collections.abc import Sequence

import pytest

from trainer.verify.parity import CLEAR_GAPS, Agreement, Reference, compare, compare_choices

EXPECTED = [5, 6, 7, 8, 9, 10]


class Engine:
    """Says the reference's tokens, but `wrong[i]` at place i; behind a wrong token all it says is wrong."""

    def __init__(self, reference: Reference, wrong: dict[int, int]) -> None:
        self.reference = reference
        self.wrong = wrong
        self.calls: list[int] = []  # the places from which it was asked to go on

    async def go_on(self, ids: Sequence[int], count: int) -> list[str]:
        place = len(ids) - len(self.reference.prompt_ids)
        assert list(ids[len(self.reference.prompt_ids) :]) == self.reference.token_ids[:place]  # teacher forcing
        self.calls.append(place)
        found: list[str] = []
        for token in self.reference.token_ids[place : place + count]:
            own = self.wrong.get(place + len(found), token)
            if own != token:
                return [*found, str(own)] + ["999"] * (count - len(found) - 1)
            found.append(str(own))
        return found


def agreement(gaps: list[float], wrong: dict[int, int]) -> tuple[Agreement, list[int]]:
    reference = Reference("你好", [1, 2], EXPECTED, gaps)
    engine = Engine(reference, wrong)
    return asyncio.run(compare(reference, engine.go_on, str, 1e-3)), engine.calls


def test_the_same_tokens_agree_in_one_call() -> None:
    found, calls = agreement([1.0] * 6, {})
    assert (found.num_tokens, found.num_same, found.disagreements, calls) == (6, 6, (), [0])


def test_after_a_tie_it_goes_on_from_the_references_tokens() -> None:
    gaps = [1.0, 5e-4, 1.0, 1.0, 9e-4, 1.0]
    found, calls = agreement(gaps, {1: 77, 4: 88})
    assert (found.num_tokens, found.num_same, found.disagreements) == (6, 4, ())
    assert calls == [0, 2, 5]  # every place was compared


def test_a_clear_choice_that_differs_is_named() -> None:
    found, calls = agreement([1.0, 5e-4, 1.0, 0.2, 1.0, 1.0], {1: 77, 3: 88})
    assert len(found.disagreements) == 1 and calls == [0, 2]
    assert str(found.disagreements[0]) == "'你好', token 3: 88 instead of 8, gap 0.2 nat"
    assert found.num_tokens == 4 and found.num_same == 2


def test_a_difference_at_the_last_place_and_an_engine_that_says_nothing() -> None:
    found, _ = agreement([1.0] * 5 + [1e-9], {5: 1})
    assert found.disagreements == () and found.num_tokens == 6

    async def silent(ids: Sequence[int], count: int) -> list[str]:
        return []

    reference = Reference("x", [1], EXPECTED, [1.0] * 6)
    assert "nothing instead of 5" in str(asyncio.run(compare(reference, silent, str, 1e-3)).disagreements[0])


def test_choices_are_compared_place_by_place() -> None:
    reference = Reference("x", [1], EXPECTED, [1.0, 1.0, 0.05, 1.0, 1.0, 1.0])
    found = compare_choices(reference, [5, 6, 0, 0, 9, 10], CLEAR_GAPS["bf16"])
    assert (found.num_tokens, found.num_same, [one.place for one in found.disagreements]) == (6, 4, [3])
    assert found.share == pytest.approx(4 / 6)
    assert (found + found).num_tokens == 12
