"""A comparison in sentences that anyone can read: did it get better, by how much, and is that more than chance?"""

from collections.abc import Iterator

from trainer.compare.comparison import MIN_PAIRS, Comparison, Difference, TaskComparison, kind_of
from trainer.compare.metrics import Metric, metric_of
from trainer.compare.words import Words
from trainer.evaluate.results import Interval

SMALL = 50_000_000  # a tenth of the smallest Qwen2
_ANSWERS = {"better": {"better"}, "unclear": {"unclear"}, "partly": {"better", "unclear"}}


def headline(comparison: Comparison, candidate: int, words: Words) -> str:
    """The answer, and which of identity and safety are not passed, however much better it is."""
    text = _answer(comparison, candidate, words)
    for task in comparison.tasks:
        if task.passes and task.passes[candidate].num_passed < task.passes[candidate].num_items:
            text = words("answer_but", answer=text, more=_failing(comparison, task, candidate, words))
    return text


def _answer(comparison: Comparison, candidate: int, words: Words) -> str:
    """By the domain's tasks; where none is marked so, by all that are not general."""
    tasks = comparison.of_role("domain") or tuple(task for task in comparison.tasks if task.role == "other")
    verdicts = {found.verdict for task in tasks if (found := _difference(task, candidate))} - {"neutral"}
    names = {"base": comparison.base.name, "other": comparison.candidates[candidate].name}
    if not verdicts:
        return words("answer_none", **names)
    for kind, expected in _ANSWERS.items():
        if verdicts == expected:
            return words(f"answer_{kind}", **names)
    return words("answer_worse" if "worse" in verdicts and "better" not in verdicts else "answer_mixed", **names)


def _failing(comparison: Comparison, task: TaskComparison, candidate: int, words: Words) -> str:
    own, base = task.passes[candidate], task.passes[0]
    return words(
        "but_worse" if own.num_passed < base.num_passed else "but_failing",
        task=words(f"role_{kind_of(task.task)}"),
        base=comparison.base.name,
        other=comparison.candidates[candidate].name,
        passed=own.num_passed,
        total=own.num_items,
        base_passed=base.num_passed,
    )


def sentences(comparison: Comparison, candidate: int, words: Words) -> Iterator[str]:
    """One for each task, those of the domain first."""
    order = {"domain": 0, "general": 1, "identity": 2, "safety": 3, "other": 4}
    for task in sorted(comparison.tasks, key=lambda task: order[task.role]):
        yield _sentence(comparison, task, candidate, words)
    if not comparison.of_role("general"):
        yield words("no_general")
    if 0 < (size := comparison.base.info.num_parameters) < SMALL:
        yield words("small_model", base=comparison.base.name, size=f"{size:,}")


def _sentence(comparison: Comparison, task: TaskComparison, candidate: int, words: Words) -> str:
    if task.passes:
        own, base = task.passes[candidate], task.passes[0]
        return words(
            "plain_passes",
            task=task.task,
            base=comparison.base.name,
            other=comparison.candidates[candidate].name,
            passed=own.num_passed,
            total=own.num_items,
            base_passed=base.num_passed,
        )
    row, found = task.main_row, _difference(task, candidate)
    if row is None or found is None:
        return words("plain_single", task=task.task, least=MIN_PAIRS)
    metric = metric_of(task.main_metric)
    return words(
        f"plain_{_kind(found)}",
        task=task.task,
        metric=words(f"metric_{task.main_metric}"),
        base=_shown(row.values[0], metric),
        other=_shown(row.values[candidate], metric),
        difference=metric.show_difference(found.interval.mean),
        low=metric.show_difference(found.interval.low),
        high=metric.show_difference(found.interval.high),
        count=found.num_pairs,
        changed=found.num_changed,
        least=MIN_PAIRS,
    )


def _kind(found: Difference) -> str:
    """Its verdict; `few` where that is unclear though the interval is on one side of 0."""
    is_aside = found.gain.low > 0 or found.gain.high < 0
    return "few" if found.verdict == "unclear" and is_aside else found.verdict


def method(comparison: Comparison, words: Words) -> Iterator[str]:
    """How it was measured and where its limits are."""
    yield words("method_paired", resamples=f"{comparison.num_resamples:,}", seed=comparison.seed)
    yield words("method_interval")
    count = sum(found is not None for task in comparison.tasks for row in task.rows for found in row.differences)
    yield words("method_many", count=count)
    yield words("method_percent")
    refused = [f"{task.task} {sum(task.refused.values())}" for task in comparison.tasks if task.refused]
    if refused:
        yield words("method_refused", refused=", ".join(refused))
    if single := sum(task.num_single for task in comparison.tasks):
        yield words("method_single", count=single)
    yield words("method_bias")


def _difference(task: TaskComparison, candidate: int) -> Difference | None:
    row = task.main_row
    return row.differences[candidate - 1] if row else None


def _shown(value: Interval | None, metric: Metric) -> str:
    return "–" if value is None else metric.show(value.mean)
