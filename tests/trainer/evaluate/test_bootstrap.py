"""Intervals against every resample there is, the normal approximation, and numpy's own loop."""

import itertools
import math
import random
import tracemalloc

import numpy as np
import pytest

from trainer.evaluate.bootstrap import interval, paired_interval, statistic_interval
from trainer.evaluate.results import Interval


def test_a_few_items_against_every_possible_resample() -> None:
    values = [0.0, 1.0, 1.0, 5.0]
    every = [sum(drawn) / 4 for drawn in itertools.product(values, repeat=4)]
    low, high = np.quantile(every, (0.025, 0.975))
    found = interval(values, seed=3, num_resamples=40_000)
    assert found.mean == 1.75
    assert found.low == pytest.approx(low, abs=0.26) and found.high == pytest.approx(high, abs=0.26)  # steps of 0.25


def test_many_items_against_the_normal_approximation() -> None:
    draw = random.Random(5)
    values = [draw.gauss(0.6, 0.2) for _ in range(2000)]
    found = interval(values, seed=1)
    error = 1.959964 * float(np.std(values)) / math.sqrt(2000)
    assert found.mean == pytest.approx(float(np.mean(values)))
    assert found.low == pytest.approx(found.mean - error, abs=error * 0.05)
    assert found.high == pytest.approx(found.mean + error, abs=error * 0.05)


def test_it_covers_the_truth_about_19_times_in_20() -> None:
    draw = np.random.default_rng(7)
    hits = 0
    for trial in range(300):
        found = interval(draw.binomial(1, 0.4, size=120).astype(float), seed=trial, num_resamples=400)
        hits += found.low <= 0.4 <= found.high
    assert 0.90 <= hits / 300 <= 0.985


def test_pairs_are_narrower_than_two_intervals_and_p_is_the_normal_ones() -> None:
    draw = np.random.default_rng(2)
    base = draw.normal(0, 1, 400)
    tuned = base + draw.normal(0.02, 0.2, 400)
    found = paired_interval(base, tuned, seed=4)
    changes = tuned - base
    error = changes.std() / math.sqrt(400)
    assert found.difference == pytest.approx(changes.mean())
    assert found.low == pytest.approx(changes.mean() - 1.96 * error, abs=0.1 * error)
    assert found.p == pytest.approx(math.erfc(abs(changes.mean()) / error / math.sqrt(2)), abs=0.01)
    alone = interval(tuned, seed=4)
    assert found.high - found.low < (alone.high - alone.low) / 3


def test_the_statistic_of_sums_gives_the_interval_of_the_mean() -> None:
    values = np.random.default_rng(9).random(500)
    rows = np.stack((values, np.ones(500)), axis=1)
    ratio = statistic_interval(rows, lambda sums: sums[:, 0] / sums[:, 1], seed=1)
    plain = interval(values, seed=1)
    assert ratio.mean == pytest.approx(plain.mean)
    assert (ratio.low, ratio.high) == pytest.approx((plain.low, plain.high), abs=2e-3)


def test_the_same_seed_gives_the_same_figures() -> None:
    values = [math.sin(i) for i in range(100)]
    assert interval(values, seed=1) == interval(values, seed=1)
    assert interval(values, seed=1) != interval(values, seed=2)
    assert paired_interval(values, values[::-1], seed=1) == paired_interval(values, values[::-1], seed=1)


def test_one_item_has_no_interval_and_none_no_mean() -> None:
    assert interval([0.7], seed=1) == Interval(mean=0.7, low=None, high=None)
    of_sums = statistic_interval(np.array([[3.0, 4.0]]), lambda sums: sums[:, 0] / sums[:, 1], seed=1)
    assert of_sums == Interval(mean=0.75, low=None, high=None)
    with pytest.raises(ValueError, match="no item"):
        interval([], seed=1)
    with pytest.raises(ValueError, match="no item"):
        statistic_interval(np.zeros((0, 2)), lambda sums: sums[:, 0], seed=1)


def test_one_pair_closes_every_gate() -> None:
    pair = paired_interval([0.1], [0.9], seed=1)
    assert pair.difference == pytest.approx(0.8) and pair.num_pairs == 1
    for low in (pair.low, paired_interval([], [], seed=1).low):
        assert math.isnan(low) and not low > 0 and not low <= 0


def test_equal_items_have_no_width() -> None:
    found = interval([0.3] * 50, seed=1)
    assert found.low == pytest.approx(0.3) and found.high == pytest.approx(0.3)
    same = paired_interval([0.1, 0.9, 0.4], [0.1, 0.9, 0.4], seed=1)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    better = paired_interval([0.0] * 50, [0.1] * 50, seed=1, num_resamples=999)
    assert better.low == pytest.approx(0.1) and better.p == pytest.approx(0.001)


def test_wrong_values_are_named() -> None:
    with pytest.raises(ValueError, match="number 1 is nan"):
        interval([1.0, math.nan], seed=1)
    with pytest.raises(ValueError, match="number 0 is inf"):
        paired_interval([math.inf, 1.0], [1.0, 1.0], seed=1)
    with pytest.raises(ValueError, match="2 of the one candidate, 1 of the other"):
        paired_interval([1.0, 2.0], [1.0], seed=1)


def test_memory_stays_small() -> None:
    values = np.random.default_rng(1).random(20_000)
    tracemalloc.start()
    interval(values, seed=1, num_resamples=200)  # 4 M draws, 32 MB at once were they kept
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 << 20
