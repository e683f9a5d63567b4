"""Pairing, intervals and verdicts, by numbers that can be checked by hand."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from server.errors import ConfigError
from tests.trainer.compare.evaluations import evaluation, item
from trainer.compare.comparison import Candidate, Comparison, read_comparison
from trainer.compare.differences import make_comparison
from trainer.compare.folder import Evaluation
from trainer.compare.metrics import metric_of
from trainer.compare.pairing import pair_items
from trainer.compare.report import write_report
from trainer.evaluate.results import Interval, ItemScore


def compared(*evaluations: Evaluation, **roles: str) -> Comparison:
    candidates = [Candidate(info=one.result.candidate) for one in evaluations]
    return make_comparison(evaluations, candidates, {"choice/a": "domain", **roles}, seed=0)  # type: ignore[dict-item]


def test_items_are_paired_by_id_whatever_their_order() -> None:
    base = [item("t", n, "accuracy", 0.0) for n in (1, 2, 3)]
    other = [item("t", n, "accuracy", float(n)) for n in (4, 3, 1)]
    found = pair_items(base, other)
    assert [(pair.base.item_id, pair.other.item_id) for pair in found.pairs] == [("i1", "i1"), ("i3", "i3")]
    assert [pair.difference("accuracy") for pair in found.pairs] == [1.0, 3.0]
    assert found.num_single == 2


def test_a_failed_item_takes_no_part() -> None:
    failed = ItemScore(item_id="i1", task="t", subject="all", scores={}, details={"error": "too long"})
    pairs = pair_items([failed, item("t", 2, "x", math.nan)], [item("t", 1, "x", 1.0), item("t", 2, "x", 1.0)]).pairs
    assert [pair.difference("x") for pair in pairs] == [None, None]


def test_pairing_finds_what_two_separate_intervals_hide() -> None:
    """Items differ far more than the candidates do; every item is a little better."""
    draw = random.Random(1)
    easy = [draw.random() for _ in range(60)]
    better = [score + 0.01 + 0.005 * draw.random() for score in easy]
    found = compared(
        evaluation("b", {"choice/a": ("accuracy", easy)}), evaluation("o", {"choice/a": ("accuracy", better)})
    )
    row = found.tasks[0].main_row
    assert row is not None and row.differences[0] is not None
    base, other = row.values
    assert base and other and base.high and other.low and base.high > other.low  # the two intervals overlap
    assert row.differences[0].verdict == "better"
    assert 0.01 < row.differences[0].interval.low < row.differences[0].interval.mean < row.differences[0].interval.high


@pytest.mark.parametrize(
    ("metric", "base", "other", "verdict"),
    [
        ("accuracy", [0.0] * 10, [1.0] * 10, "better"),
        ("accuracy", [1.0] * 10, [0.0] * 10, "worse"),
        ("accuracy", [0.0, 1.0] * 5, [1.0, 0.0] * 5, "unclear"),
        ("accuracy", [1.0] * 10, [1.0] * 10, "unclear"),
        ("bits_per_byte", [2.0] * 10, [1.0] * 10, "better"),
        ("num_tokens", [2.0] * 10, [1.0] * 10, "neutral"),
        ("log_likelihood", [-2.0] * 10, [-1.0] * 10, "better"),
    ],
)
def test_verdicts(metric: str, base: list[float], other: list[float], verdict: str) -> None:
    found = compared(evaluation("b", {"t": (metric, base)}), evaluation("o", {"t": (metric, other)}))
    row = found.tasks[0].main_row
    assert row is not None and row.differences[0] is not None
    assert row.differences[0].verdict == verdict
    assert row.differences[0].interval.mean == pytest.approx(sum(other) / 10 - sum(base) / 10)


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_a_few_pairs_are_no_evidence(count: int) -> None:
    """All of them are better, and yet nothing is said of fewer than six."""
    found = compared(
        evaluation("b", {"t": ("accuracy", [0.0] * count)}), evaluation("o", {"t": ("accuracy", [1.0] * count)})
    )
    row = found.tasks[0].main_row
    assert row is not None and (row.differences[0] is None) == (count < 6)
    assert row.values[0] is not None and (row.values[0].low is None) == (count == 1)


def test_perplexity_is_compared_over_all_tokens_together() -> None:
    def rows(nats: float) -> list[ItemScore]:
        return [
            item("likelihood/h", n, "log_likelihood", nats, details={"total": nats * 10, "num_tokens": 10})
            for n in range(6)
        ]

    found = compared(_with_perplexity(evaluation("b", {}, items=rows(-2.0))), evaluation("o", {}, items=rows(-1.0)))
    row = found.tasks[0].row("perplexity")
    assert row is not None and row.differences[0] is not None
    assert row.differences[0].interval.mean == pytest.approx(math.e - math.e**2)
    assert row.differences[0].verdict == "better"


def _with_perplexity(one: Evaluation, value: float = math.e**2) -> Evaluation:
    task, *others = one.result.tasks
    known = {**task.metrics, "perplexity": Interval(mean=value, low=value, high=value)}
    return replace(one, result=replace(one.result, tasks=(replace(task, metrics=known), *others)))


def test_candidates_that_were_asked_differently_are_not_compared() -> None:
    base, other = (evaluation(n, {"t": ("x", [1.0, 0.0])}, settings={"shots": s}) for n, s in (("b", 0), ("o", 5)))
    with pytest.raises(ConfigError, match=r"o was evaluated with other settings than b \(shots\)"):
        compared(base, other)
    pair = [
        replace(one, result=replace(one.result, tasks=(replace(one.result.tasks[0], notes={"style": style}),)))
        for one, style in ((evaluation(n, {"t": ("x", [1.0, 0.0])}), s) for n, s in (("b", "plain"), ("o", "chat")))
    ]
    with pytest.raises(ConfigError, match=r"different ways \(b as plain, o as chat\)"):
        compared(*pair)


@pytest.mark.parametrize(("num_up", "verdict"), [(5, "unclear"), (6, "better")])
def test_a_few_changes_among_many_equal_items_are_no_evidence(num_up: int, verdict: str) -> None:
    """By a sign test, 5 of 5 have p = 0.06, however many ties there are."""
    scores = {"b": [0.0] * 400, "o": [1.0] * num_up + [0.0] * (400 - num_up)}
    found = compared(*(evaluation(name, {"choice/a": ("accuracy", own)}) for name, own in scores.items()))
    row = found.tasks[0].main_row
    assert row and row.differences[0]
    assert (row.differences[0].num_changed, row.differences[0].verdict) == (num_up, verdict)


def test_answers_shown_are_the_worst_the_best_and_others() -> None:
    base = {"choice/a": ("rouge_l", [0.5] * 30)}
    other = {"choice/a": ("rouge_l", [n / 30 for n in range(30)])}
    found = compared(evaluation("b", base), evaluation("o", other)).answers
    assert [row.item_id for row in found if row.reason == "loss"] == ["i0", "i1", "i2", "i3", "i4"]
    assert [row.item_id for row in found if row.reason == "gain"] == ["i29", "i28", "i27", "i26", "i25"]
    drawn = [row.item_id for row in found if row.reason == "random"]
    assert len(drawn) == 5 and len({row.item_id for row in found}) == 15
    assert compared(evaluation("b", base), evaluation("o", other)).answers == found  # the lot is drawn by the seed


def test_identity_counts_who_passed() -> None:
    base, other = (
        evaluation("b", {"identity": ("passed", [0.0] * 7)}),
        evaluation("o", {"identity": ("passed", [1, 1, 0, 1, 1, 1, 1])}),
    )
    task = compared(base, other).tasks[0]
    assert task.role == "identity"
    assert [(one.num_passed, one.num_items) for one in task.passes] == [(0, 7), (6, 7)]
    assert task.passes[1].failed == ("i2",) and len(task.passes[0].failed) == 5


def test_report_json_is_read_back_as_it_was(tmp_path: Path) -> None:
    found = compared(
        evaluation("b", {"choice/a": ("accuracy", [0.0, 1.0, 0.0]), "safety": ("passed", [1.0])}),
        evaluation("o", {"choice/a": ("accuracy", [1.0, 1.0, 0.0])}),
    )
    write_report(found, tmp_path, "zh")
    again, digest = read_comparison(tmp_path)
    assert again == found and len(digest) == 64
    with pytest.raises(ConfigError, match=r"no report.json"):
        read_comparison(tmp_path / "none")


def test_report_json_has_no_nan(tmp_path: Path) -> None:
    """One item has no interval; an answer that is impossible has no number."""
    details = {"total": -math.inf, "num_tokens": 2}
    rows = [item("likelihood/h", n, "log_likelihood", -1.0, subject=f"s{n}", details=details) for n in range(7)]
    rows += [item("choice/a", 0, "accuracy", 1.0)]
    whole = _with_perplexity(evaluation("b", {}, items=rows), math.inf)
    broken = replace(whole, items=tuple(replace(one, scores={"log_likelihood": -math.inf}) for one in whole.items[:7]))
    write_report(compared(broken, broken), tmp_path, "en")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads((tmp_path / "report.json").read_text("utf-8"), parse_constant=refuse)
    task = next(task for task in found["tasks"] if task["task"] == "choice/a")
    assert task["rows"][0]["values"][0] == {"mean": 1.0, "low": None, "high": None}
    assert task["rows"][0]["differences"] == [None]


@pytest.mark.parametrize(
    ("name", "direction", "scale"),
    [
        ("accuracy", 1, "share"),
        ("bleu4", 1, "share"),
        ("execution_accuracy", 1, "share"),
        ("log_likelihood", 1, "nat"),
        ("perplexity", -1, "plain"),
        ("bits_per_byte", -1, "plain"),
        ("num_tokens", 0, "plain"),
    ],
)
def test_metrics(name: str, direction: int, scale: str) -> None:
    assert (metric_of(name).direction, metric_of(name).scale) == (direction, scale)
