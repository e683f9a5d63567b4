"""The report's tables as rows of text, the same for every format. Nothing is escaped here."""

from collections.abc import Iterator

from trainer.compare.comparison import Comparison, Passes, TaskComparison
from trainer.compare.metrics import metric_of
from trainer.compare.published import MMCU_SUBJECTS, MMCU_ZERO_SHOT
from trainer.compare.words import Words


def candidate_head(words: Words) -> list[str]:
    return [words(key) for key in ("name", "model", "adapter", "engine")]


def candidate_rows(comparison: Comparison, words: Words) -> Iterator[list[str]]:
    for number, one in enumerate(comparison.candidates):
        mark = "" if number else f" ({words('base_mark')})"
        yield [one.name + mark, one.info.model, one.info.adapter or "–", one.info.engine or "–"]


def score_head(words: Words) -> list[str]:
    keys = ("task", "role", "metric", "base_mark", "name", "score", "difference", "interval", "items", "verdict")
    return [words(key) for key in keys]


def score_rows(comparison: Comparison, words: Words) -> Iterator[list[str]]:
    """A line per task, metric and candidate after the base; main metrics first."""
    for task in comparison.tasks:
        for row in sorted(task.rows, key=lambda row: row.metric != task.main_metric):
            metric = metric_of(row.metric)
            for number, found in enumerate(row.differences, 1):
                base, own = row.values[0], row.values[number]
                yield [
                    task.task,
                    words(f"role_{task.role}"),
                    row.metric + ("\u00a0*" if row.metric == task.main_metric else ""),
                    "–" if base is None else metric.show(base.mean),
                    comparison.candidates[number].name,
                    "–" if own is None else metric.show(own.mean),
                    "–" if found is None else metric.show_difference(found.interval.mean),
                    "–" if found is None else metric.show_interval(found.interval),
                    "0" if found is None else str(found.num_pairs),
                    "–" if found is None else words(f"verdict_{found.verdict}"),
                ]


def pass_lines(task: TaskComparison, comparison: Comparison, words: Words) -> Iterator[str]:
    """Of identity and safety: who passed how many, and which were failed."""
    for candidate, passes in zip(comparison.candidates, task.passes, strict=True):
        yield f"{task.task}, {candidate.name}: {_passed(passes, words)}"


def _passed(passes: Passes, words: Words) -> str:
    text = f"{words('passed')} {passes.num_passed} / {passes.num_items}"
    failed = [f"{item_id} “{asked}”" for item_id, asked in zip(passes.failed, passes.questions, strict=True)]
    if passes.num_items - passes.num_passed > len(failed):
        failed.append("…")
    return text + (f"; {words('failed_items', items=', '.join(failed))}" if failed else "")


def subject_rows(task: TaskComparison) -> Iterator[list[str]]:
    metric = metric_of(task.main_metric)
    for row in task.subjects:
        yield [row.subject, str(row.num_items), *("–" if one is None else metric.show(one) for one in row.values)]


def published_head(words: Words) -> list[str]:
    return [words("model"), *(words(f"published_{subject}") for subject in MMCU_SUBJECTS)]


def published_rows() -> Iterator[list[str]]:
    for model, values in MMCU_ZERO_SHOT.items():
        yield [model, *(f"{100 * value:.1f}" for value in values)]
