"""Evaluations made by hand, for tests that need no model."""

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.compare.folder import Evaluation
from trainer.evaluate.bootstrap import interval
from trainer.evaluate.results import CandidateInfo, EvalResult, ItemScore, SubjectScore, TaskResult
from trainer.evaluate.tasks.task import error_notes

SETTINGS = {"shots": 0, "seed": 0}


def item(task: str, number: int, metric: str, score: float, **more: Any) -> ItemScore:
    facts = {
        "prompt": f"question {number}",
        "answer": f"answer {number}",
        "reference": "right",
        "subject": "all",
        **more,
    }
    return ItemScore(item_id=f"i{number}", task=task, scores={metric: score}, **facts)


def evaluation(
    name: str,
    tasks: Mapping[str, tuple[str, Sequence[float]]],
    *,
    items: Sequence[ItemScore] = (),
    settings: Mapping[str, Any] = SETTINGS,
    **info: Any,
) -> Evaluation:
    """`tasks`: by name, the main metric and one score per item. `items` are put in besides."""
    made = [item(task, n, metric, score) for task, (metric, scores) in tasks.items() for n, score in enumerate(scores)]
    every = [*made, *items]
    results = tuple(
        _result(task, [one for one in every if one.task == task]) for task in dict.fromkeys(i.task for i in every)
    )
    result = EvalResult(
        candidate=CandidateInfo(**{"name": name, "kind": "engine", "model": "m", "engine": "hf fp32", **info}),
        tasks=results,
        date="2026-01-01T00:00:00+00:00",
        machine="a machine",
        versions={"qloop": "0"},
        seed=0,
        settings=dict(settings),
    )
    return Evaluation(result, tuple(every), f"hash of {name}")


def _result(task: str, items: Sequence[ItemScore]) -> TaskResult:
    metric = next(iter(items[0].scores))
    scores = [one.scores[metric] for one in items if metric in one.scores]
    names = dict.fromkeys(one.subject for one in items)
    return TaskResult(
        task=task,
        main_metric=metric,
        metrics={metric: interval(scores, seed=0)},
        subjects=tuple(_subject(name, metric, [one for one in items if one.subject == name]) for name in names),
        num_items=len(items),
        num_scored=len(items),
        num_examples=0,
        refused={},
        notes=error_notes(items),
    )


def _subject(name: str, metric: str, items: Sequence[ItemScore]) -> SubjectScore:
    values = [one.scores.get(metric, 0.0) for one in items]
    return SubjectScore(subject=name, num_items=len(items), scores={metric: sum(values) / len(values)})
