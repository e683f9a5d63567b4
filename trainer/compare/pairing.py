"""The same item as two candidates answered it: what every difference is made of."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trainer.evaluate.results import ItemScore


def finite(value: float | None) -> float | None:
    """None where there is no number: report.json has no NaN."""
    return value if value is not None and math.isfinite(value) else None


def score_of(item: ItemScore, metric: str) -> float | None:
    """None where the candidate was never heard: then the item tells nothing of it, whatever its score says."""
    return None if item.error_code else finite(item.scores.get(metric))


@dataclass(frozen=True)
class Pair:
    base: ItemScore
    other: ItemScore

    def difference(self, metric: str) -> float | None:
        """`other - base`; None where one of them has no such number."""
        base, other = score_of(self.base, metric), score_of(self.other, metric)
        return None if base is None or other is None else other - base


@dataclass(frozen=True)
class Pairing:
    """`num_single`: items that only one of the two has; they take no part in any difference."""

    pairs: tuple[Pair, ...]
    num_single: int

    def of_task(self, task: str) -> tuple[Pair, ...]:
        return tuple(pair for pair in self.pairs if pair.base.task == task)


def pair_items(base: Sequence[ItemScore], other: Sequence[ItemScore]) -> Pairing:
    """Pairs by task and item_id, in that order: resampling gives the same interval however the answers came."""
    ours, theirs = ({(item.task, item.item_id): item for item in items} for items in (base, other))
    pairs = [Pair(ours[key], theirs[key]) for key in sorted(ours.keys() & theirs.keys())]
    return Pairing(tuple(pairs), len(base) + len(other) - 2 * len(pairs))


def values_of(pairs: Iterable[Pair], metric: str) -> tuple[list[float], list[float]]:
    """The metric of both sides, item by item."""
    kept = [pair for pair in pairs if pair.difference(metric) is not None]
    return [pair.base.scores[metric] for pair in kept], [pair.other.scores[metric] for pair in kept]
