"""Do two implementations agree? The same greedy token wherever the reference's two best are clearly apart.

After a place where they part because the reference was undecided, the other goes on from the reference's own tokens, so
that every place is compared. Knows tokens only; whoever goes on may be an engine, a server or a model.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

CLEAR_GAPS = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.1}  # nat, by what the other side computes in

# The tokens that follow these, `count` of them, each as a label that `Label` gives for the same token.
GoOn = Callable[[Sequence[int], int], Awaitable[Sequence[str]]]
Label = Callable[[int], str]


@dataclass(frozen=True)
class Reference:
    """A greedy text and, at each place, the distance in nat between the two most likely tokens."""

    prompt: str
    prompt_ids: list[int]
    token_ids: list[int]
    gaps: list[float]


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """`gap`: of the reference, in nat. `expected` and `found` are labels."""

    prompt: str
    place: int  # of the token in the answer, from 0
    expected: str
    found: str
    gap: float

    def __str__(self) -> str:
        return f"{self.prompt!r}, token {self.place}: {self.found} instead of {self.expected}, gap {self.gap:.3g} nat"


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Places compared, those where the same token came, and those that differ although the reference was clear."""

    num_tokens: int
    num_same: int
    disagreements: tuple[Disagreement, ...] = ()

    @property
    def share(self) -> float:
        return self.num_same / self.num_tokens if self.num_tokens else 0.0

    def __add__(self, other: "Agreement") -> "Agreement":
        return Agreement(
            num_tokens=self.num_tokens + other.num_tokens,
            num_same=self.num_same + other.num_same,
            disagreements=self.disagreements + other.disagreements,
        )


NONE = Agreement(num_tokens=0, num_same=0)


async def compare(reference: Reference, go_on: GoOn, label: Label, clear_gap: float) -> Agreement:
    """All places of one answer; it ends at the first disagreement, behind which texts are different ones."""
    expected = [label(token) for token in reference.token_ids]
    place = num_same = 0
    while place < len(expected):
        found = await go_on([*reference.prompt_ids, *reference.token_ids[:place]], len(expected) - place)
        for own in found:
            if own == expected[place]:
                num_same += 1
            elif reference.gaps[place] > clear_gap:
                wrong = _disagreement(reference, place, expected[place], own)
                return Agreement(num_tokens=place + 1, num_same=num_same, disagreements=(wrong,))
            place += 1
            if own != expected[place - 1]:
                break
        if not found:
            wrong = _disagreement(reference, place, expected[place], "nothing")
            return Agreement(num_tokens=place + 1, num_same=num_same, disagreements=(wrong,))
    return Agreement(num_tokens=place, num_same=num_same)


def compare_choices(reference: Reference, found: Sequence[int], clear_gap: float) -> Agreement:
    """`found[i]` is the other's choice after the prompt and the reference's first i tokens."""
    wrong = tuple(
        _disagreement(reference, place, str(expected), str(own))
        for place, (expected, own) in enumerate(zip(reference.token_ids, found, strict=True))
        if expected != own and reference.gaps[place] > clear_gap
    )
    num_same = sum(expected == own for expected, own in zip(reference.token_ids, found, strict=True))
    return Agreement(num_tokens=len(reference.token_ids), num_same=num_same, disagreements=wrong)


def _disagreement(reference: Reference, place: int, expected: str, found: str) -> Disagreement:
    return Disagreement(prompt=reference.prompt, place=place, expected=expected, found=found, gap=reference.gaps[place])
