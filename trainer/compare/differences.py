"""Evaluations -> a comparison: items are paired, differences get their paired bootstrap intervals.

The bootstrap resamples items, the same ones for both sides (Efron & Tibshirani 1993; Koehn 2004 for translations).
"""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from server.errors import ConfigError
from trainer.compare.answers import choose_answers
from trainer.compare.comparison import (
    MIN_PAIRS,
    Candidate,
    Change,
    Comparison,
    Difference,
    MetricRow,
    Passes,
    Role,
    SideBySide,
    SubjectRow,
    TaskComparison,
    kind_of,
)
from trainer.compare.folder import Evaluation
from trainer.compare.metrics import metric_of
from trainer.compare.pairing import Pair, Pairing, finite, pair_items, score_of, values_of
from trainer.evaluate.bootstrap import NUM_RESAMPLES, PairedInterval, paired_interval, paired_statistic_interval
from trainer.evaluate.results import NOT_THE_CANDIDATES, Interval, ItemScore, TaskResult
from trainer.evaluate.scores.likelihood import perplexities

PASS_KINDS = ("identity", "safety")
NUM_ANSWERS = 5
MAX_FAILED = 5
MAX_QUESTION = 120  # characters


def make_comparison(
    evaluations: Sequence[Evaluation],
    candidates: Sequence[Candidate],
    roles: Mapping[str, Role],
    *,
    seed: int,
    num_answers: int = NUM_ANSWERS,
) -> Comparison:
    """The base is the first. `roles`: what a task is evidence of, by its name. Raises ConfigError when the candidates
    were asked in different ways."""
    _check_settings(evaluations)
    _check_styles(evaluations)
    pairings = [pair_items(evaluations[0].items, other.items) for other in evaluations[1:]]
    first = evaluations[0].result
    tasks = [_task(task, evaluations, pairings, roles, seed) for task in first.tasks]
    return Comparison(
        candidates=tuple(candidates),
        tasks=tuple(tasks),
        answers=tuple(row for task in first.tasks for row in _answers(task, evaluations, pairings, num_answers, seed)),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=first.machine,
        versions=first.versions,
        seed=seed,
        settings=first.settings,
        num_resamples=NUM_RESAMPLES,
    )


def _check_settings(evaluations: Sequence[Evaluation]) -> None:
    first = evaluations[0].result
    for other in evaluations[1:]:
        if other.result.settings != first.settings:
            names = sorted(
                key
                for key in {*first.settings, *other.result.settings}
                if first.settings.get(key) != other.result.settings.get(key)
            )
            raise ConfigError(
                f"{other.name} was evaluated with other settings than {evaluations[0].name} ({', '.join(names)}); "
                "evaluate both again in one comparison"
            )


def _check_styles(evaluations: Sequence[Evaluation]) -> None:
    """Left to itself, a candidate with a chat template is asked by it, and one without as plain text."""
    for task in evaluations[0].result.tasks:
        results = [_result_of(one, task.task) for one in evaluations]
        styles = ["" if one is None else str(one.notes.get("style", "")) for one in results]
        if len({*styles} - {""}) > 1:
            asked = ", ".join(f"{one.name} as {style}" for one, style in zip(evaluations, styles, strict=True))
            raise ConfigError(f"{task.task} was asked in different ways ({asked}); compare with --plain")


def _task(
    task: TaskResult,
    evaluations: Sequence[Evaluation],
    pairings: Sequence[Pairing],
    roles: Mapping[str, Role],
    seed: int,
) -> TaskComparison:
    results = [_result_of(one, task.task) for one in evaluations]
    scored = [_scored(task, one) for one in evaluations]
    return TaskComparison(
        task=task.task,
        role=_role(task.task, roles),
        main_metric=task.main_metric,
        num_items=task.num_items,
        num_scored=task.num_scored,
        num_single=max((len(scored[0] ^ one) for one in scored[1:]), default=0),
        refused=dict(task.refused),
        rows=tuple(_row(metric, task.task, results, pairings, seed) for metric in task.metrics),
        subjects=_subjects(task, results),
        passes=_passes(task, evaluations) if kind_of(task.task) in PASS_KINDS else (),
        notes=tuple({} if one is None else dict(one.notes) for one in results),
        num_lost=tuple(
            len(scored[0] - own - _undecided(task, one)) for one, own in zip(evaluations, scored, strict=True)
        ),
    )


def _role(task: str, roles: Mapping[str, Role]) -> Role:
    """As the user said; identity and safety are what they are called."""
    if task in roles:
        return roles[task]
    kind = kind_of(task)
    return "identity" if kind == "identity" else "safety" if kind == "safety" else "other"


def _result_of(evaluation: Evaluation, task: str) -> TaskResult | None:
    return next((one for one in evaluation.result.tasks if one.task == task), None)


def _scored(task: TaskResult, evaluation: Evaluation) -> set[str]:
    """Ids of the items that have the task's main metric."""
    return {item.item_id for item in evaluation.of_task(task.task) if score_of(item, task.main_metric) is not None}


def _undecided(task: TaskResult, evaluation: Evaluation) -> set[str]:
    """Ids of items whose error says nothing of the candidate."""
    return {item.item_id for item in evaluation.of_task(task.task) if item.error_code in NOT_THE_CANDIDATES}


def _row(
    metric: str, task: str, results: Sequence[TaskResult | None], pairings: Sequence[Pairing], seed: int
) -> MetricRow:
    return MetricRow(
        metric=metric,
        values=tuple(None if one is None else _value(one.metrics.get(metric)) for one in results),
        differences=tuple(_difference(metric, pairing.of_task(task), seed) for pairing in pairings),
    )


def _difference(metric: str, pairs: Sequence[Pair], seed: int) -> Difference | None:
    if metric == "perplexity":
        found = _perplexity(pairs, seed)
    else:
        base, other = values_of(pairs, metric)
        found = paired_interval(base, other, seed=seed)
    if found.num_pairs < MIN_PAIRS or not all(map(math.isfinite, (found.difference, found.low, found.high))):
        return None
    return Difference(
        interval=Change(mean=found.difference, low=found.low, high=found.high),
        p=found.p,
        num_pairs=found.num_pairs,
        num_changed=found.num_changed,
        direction=metric_of(metric).direction,
    )


def _perplexity(pairs: Sequence[Pair], seed: int) -> PairedInterval:
    """Of all tokens together, as the likelihood task computes it; it is no mean over items."""
    import numpy as np

    sides = [[_nats(pair.base) for pair in pairs], [_nats(pair.other) for pair in pairs]]
    kept = [place for place in range(len(pairs)) if sides[0][place] and sides[1][place]]
    base, other = (np.array([side[place] for place in kept], dtype=np.float64).reshape(-1, 2) for side in sides)
    return paired_statistic_interval(base, other, perplexities, seed=seed)


def _nats(item: ItemScore) -> tuple[float, int] | None:
    """Sum of log-probabilities and number of tokens; None where the item failed, or is impossible for the candidate."""
    total = finite(item.details.get("total"))
    return None if total is None or item.error_code else (total, int(item.details["num_tokens"]))


def _value(found: Interval | None) -> Interval | None:
    """None where there is no number."""
    mean = None if found is None else finite(found.mean)
    if found is None or mean is None:
        return None
    return Interval(mean=mean, low=finite(found.low), high=finite(found.high))


def _subjects(task: TaskResult, results: Sequence[TaskResult | None]) -> tuple[SubjectRow, ...]:
    """None where there is only one, which would repeat the task's own line."""
    if len(task.subjects) < 2:
        return ()
    by_name = [{} if one is None else {subject.subject: subject for subject in one.subjects} for one in results]
    return tuple(
        SubjectRow(
            subject=subject.subject,
            num_items=subject.num_items,
            values=tuple(
                finite(known[subject.subject].scores.get(task.main_metric)) if subject.subject in known else None
                for known in by_name
            ),
        )
        for subject in task.subjects
    )


def _passes(task: TaskResult, evaluations: Sequence[Evaluation]) -> tuple[Passes, ...]:
    found = []
    for one in evaluations:
        items = one.of_task(task.task)
        failed = [item for item in items if not _is_passed(item, task.main_metric)]
        shown = failed[:MAX_FAILED]
        found.append(
            Passes(
                num_passed=len(items) - len(failed),
                num_items=len(items),
                failed=tuple(item.item_id for item in shown),
                questions=tuple(_short(item.prompt) for item in shown),
            )
        )
    return tuple(found)


def _short(text: str) -> str:
    """On one line."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_QUESTION else line[:MAX_QUESTION] + " …"


def _is_passed(item: ItemScore, metric: str) -> bool:
    """Its main score is full. That of identity is, only where the name came and the answer ended by its stop token."""
    return item.scores.get(metric, 0.0) >= 1.0


def _answers(
    task: TaskResult, evaluations: Sequence[Evaluation], pairings: Sequence[Pairing], count: int, seed: int
) -> list[SideBySide]:
    """Of the first candidate after the base."""
    if not pairings:
        return []
    items = [{item.item_id: item for item in one.of_task(task.task)} for one in evaluations]
    return choose_answers(pairings[0].of_task(task.task), task.main_metric, items, count=count, seed=seed)
