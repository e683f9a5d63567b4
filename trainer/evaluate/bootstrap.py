"""Intervals by the bootstrap: items are drawn again with replacement, and the score is computed anew each time.

Percentile intervals at 95 % (Efron & Tibshirani 1993, §13.3); pairs for two candidates that answered the same items
(Koehn 2004, aclanthology.org/W04-3250). The same seed gives the same figures. They tell how far the score would move
with other items of this kind, and nothing of other seeds, prompts or trainings.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from trainer.evaluate.results import Interval

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[Any, np.dtype[np.float64]]

NUM_RESAMPLES: Final = 10_000
_TAIL: Final = 0.025
_MAX_CELLS: Final = 1 << 20  # drawn at a time: 8 MiB of indices, 8 MiB of values


@dataclass(frozen=True, kw_only=True)
class PairedInterval:
    """Second candidate less first, over the items that both answered."""

    difference: float
    low: float
    high: float
    p: float  # two-sided: how often chance alone makes a difference this large
    num_pairs: int
    num_changed: int = 0  # pairs whose two sides differ


def interval(values: Sequence[float], *, seed: int, num_resamples: int = NUM_RESAMPLES) -> Interval:
    """The mean of the items' scores and its 95 % interval.

    Raises ValueError for no item, and where a value is not finite, whose place it names.
    """
    import numpy as np

    numbers = _finite(values)
    if len(numbers) == 0:
        raise ValueError("no item has this score: there is no mean")
    if len(numbers) == 1:
        return Interval(mean=float(numbers[0]), low=None, high=None)
    means = np.concatenate([numbers[drawn].mean(axis=1) for drawn in _draws(len(numbers), seed, num_resamples)])
    low, high = np.quantile(means, (_TAIL, 1 - _TAIL))
    return Interval(mean=float(numbers.mean()), low=float(low), high=float(high))


def paired_interval(
    base: Sequence[float], tuned: Sequence[float], *, seed: int, num_resamples: int = NUM_RESAMPLES
) -> PairedInterval:
    """The mean of tuned[i] - base[i], its 95 % interval, and a p value: the share of resamples whose difference is as
    far from the observed one as the observed one is from 0, (1 + count) / (1 + num_resamples) (Riezler & Maxwell
    2005).

    Fewer than two pairs have no interval: NaN. Raises ValueError where the lengths differ.
    """
    import numpy as np

    if len(base) != len(tuned):
        raise ValueError(f"pairs need the same items: {len(base)} of the one candidate, {len(tuned)} of the other")
    changes = _finite(tuned) - _finite(base)
    if len(changes) < 2:
        observed = float(changes[0]) if len(changes) else math.nan
        return PairedInterval(difference=observed, low=math.nan, high=math.nan, p=math.nan, num_pairs=len(changes))
    means = np.concatenate([changes[drawn].mean(axis=1) for drawn in _draws(len(changes), seed, num_resamples)])
    return _paired(float(changes.mean()), means, changes != 0)


def statistic_interval(
    rows: "Floats",
    statistic: Callable[["Floats"], "Floats"],
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """The same for a score of the whole set that is computed from sums, corpus BLEU (`scores.corpus`) for one.

    rows: [items, counts]; statistic: [sets, counts] sums to [sets] scores. `mean` is the score of all items. Raises
    ValueError for no item.
    """
    import numpy as np

    if len(rows) == 0:
        raise ValueError("no item has this score: there is nothing to compute it from")
    observed = float(statistic(rows.sum(axis=0, keepdims=True))[0])
    if len(rows) == 1:
        return Interval(mean=observed, low=None, high=None)
    scores = np.concatenate([statistic(sums) for sums in _sums(rows, seed, num_resamples)])
    low, high = np.quantile(scores, (_TAIL, 1 - _TAIL))
    return Interval(mean=observed, low=float(low), high=float(high))


def paired_statistic_interval(
    base: "Floats",
    tuned: "Floats",
    statistic: Callable[["Floats"], "Floats"],
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> PairedInterval:
    """`statistic_interval` of two candidates: both are resampled alike, and their scores subtracted."""
    import numpy as np

    if base.shape != tuned.shape:
        raise ValueError(f"pairs need the same items: {base.shape} of the one candidate, {tuned.shape} of the other")
    both = np.concatenate((base, tuned), axis=1)
    width = base.shape[1]

    def change(sums: "Floats") -> "Floats":
        return statistic(sums[:, width:]) - statistic(sums[:, :width])

    observed = float(change(both.sum(axis=0, keepdims=True))[0]) if len(both) else math.nan
    if len(both) < 2:
        return PairedInterval(difference=observed, low=math.nan, high=math.nan, p=math.nan, num_pairs=len(both))
    changes = np.concatenate([change(sums) for sums in _sums(both, seed, num_resamples)])
    return _paired(observed, changes, (base != tuned).any(axis=1))


def _paired(observed: float, resampled: "Floats", is_changed: "np.ndarray[Any, np.dtype[np.bool_]]") -> PairedInterval:
    import numpy as np

    low, high = np.quantile(resampled, (_TAIL, 1 - _TAIL))
    # A hair of slack: sums in another order differ in their last bits, and would else count as nearer.
    as_far = int((np.abs(resampled - observed) >= abs(observed) * (1 - 1e-9)).sum())
    p = (1 + as_far) / (1 + len(resampled))
    return PairedInterval(
        difference=observed,
        low=float(low),
        high=float(high),
        p=p,
        num_pairs=len(is_changed),
        num_changed=int(is_changed.sum()),
    )


def _draws(num_items: int, seed: int, num_resamples: int) -> Iterator["np.ndarray[Any, np.dtype[np.int64]]"]:
    """Indices of drawn items, [resamples at a time, items], in bounded memory."""
    import numpy as np

    draw = np.random.default_rng(seed)
    for count in _portions(num_items, num_resamples):
        yield draw.integers(num_items, size=(count, num_items))


def _sums(rows: "Floats", seed: int, num_resamples: int) -> Iterator["Floats"]:
    """Sums of drawn rows, [resamples at a time, counts]."""
    import numpy as np

    draw = np.random.default_rng(seed)
    even = np.full(len(rows), 1 / len(rows))
    for count in _portions(len(rows), num_resamples):
        yield draw.multinomial(len(rows), even, size=count) @ rows


def _portions(num_items: int, num_resamples: int) -> Iterator[int]:
    if num_resamples < 1:
        raise ValueError("num_resamples must be at least 1")
    portion = max(1, _MAX_CELLS // num_items)
    for start in range(0, num_resamples, portion):
        yield min(portion, num_resamples - start)


def _finite(values: Sequence[float]) -> "Floats":
    import numpy as np

    numbers = np.asarray(values, dtype=np.float64).reshape(-1)
    wrong = np.flatnonzero(~np.isfinite(numbers))
    if len(wrong):
        raise ValueError(f"score number {wrong[0]} is {numbers[wrong[0]]}: only finite scores have a mean")
    return numbers
