"""`KIND=PATH` -> tasks. Reads files; asks nobody."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.errors import ConfigError
from trainer.errors import DataError
from trainer.evaluate.items import ChoiceItem, ItemSet, SqlItem, TextItem
from trainer.evaluate.read_items import read_items, with_examples
from trainer.evaluate.settings import EvalSettings
from trainer.evaluate.tasks.choice import ChoiceTask
from trainer.evaluate.tasks.identity import IdentityTask
from trainer.evaluate.tasks.likelihood import LikelihoodTask, held_out
from trainer.evaluate.tasks.safety import SafetyTask
from trainer.evaluate.tasks.sql import SqlTask
from trainer.evaluate.tasks.task import Task
from trainer.evaluate.tasks.text import BbhTask, TextTask

READ_KINDS = ("choice", "text", "bbh", "sql")  # told from the file where no kind is named
KINDS = (*READ_KINDS, "likelihood", "identity", "safety")
UNCHANGED = EvalSettings()


def make_tasks(specs: Sequence[str], settings: EvalSettings) -> list[Task[Any]]:
    """Tasks of `KIND=PATH`, `PATH`, `identity=NAME` and `safety`, in order.

    Raises ConfigError for an unknown kind or a path that is not there, DataError for a file that is broken as a whole
    or holds nothing that can be scored.
    """
    tasks = [task for spec in specs for task in tasks_of(spec, settings)]
    check_together(tasks, settings)
    return tasks


def tasks_of(spec: str, settings: EvalSettings) -> list[Task[Any]]:
    """Of one of them, most often a single task. What was refused where nothing else is, such as a broken file of a
    folder, counts with the first of its tasks. Raises as `make_tasks`."""
    kind, value = parse(spec)
    made = _made(kind, value, settings)
    if not any(task.items for task in made):
        where = f"; python -m trainer benchmarks {value} --show 5 shows where" if kind in ("", *READ_KINDS) else ""
        raise DataError(f"--task {spec}: nothing in it can be scored ({_why(made)}){where}")
    kept = [task for task in made if task.items]
    for task in made:
        if not task.items:
            kept[0].count_refused(task.refused)
    return kept


def check_together(tasks: Sequence[Task[Any]], settings: EvalSettings) -> None:
    """Raises ConfigError for two tasks of one name, and for a setting that none of the tasks would hear of."""
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"two tasks are called {name}: give it once, put their files into one folder, or evaluate them apart"
            )
    kinds = {task.kind for task in tasks}
    if settings.shots and not kinds & {"choice", "bbh"}:
        raise ConfigError("--shots: only tasks of the kinds choice and bbh show examples, and there is none")
    if "choice" not in kinds and (settings.shuffle or settings.by == "answer"):
        option = "--shuffle" if settings.shuffle else "--by"
        raise ConfigError(f"{option}: is for tasks of the kind choice, and there is none")
    for name in ("max_tokens", "temperature"):
        if getattr(settings, name) != getattr(UNCHANGED, name) and not any(_writes(task) for task in tasks):
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option}: is for answers that are written, and none of the tasks asks for one")


def _writes(task: Task[Any]) -> bool:
    if task.kind == "choice":
        return task.settings.by == "answer" or any(item.is_multiple for item in task.items)
    return task.kind != "likelihood"


def parse(spec: str) -> tuple[str, str]:
    """Kind ("" where it is to be told from the file) and path or name. Raises ConfigError for an unknown kind."""
    kind, separator, value = spec.partition("=")
    if Path(spec).exists() or not (separator or kind in KINDS):
        return "", spec
    if kind not in KINDS:
        raise ConfigError(f"--task {spec}: {kind} is no kind of task; there are {', '.join(KINDS)}")
    if kind == "safety" and value:
        raise ConfigError(f"--task {spec}: safety has prompts of its own and takes nothing after =")
    if not value and kind != "safety":
        wanted = "NAME" if kind == "identity" else "PATH"
        raise ConfigError(f"--task {spec}: say {kind}={wanted}; what comes after = is missing")
    return kind, value


def _made(kind: str, value: str, settings: EvalSettings) -> list[Task[Any]]:
    if kind == "identity":
        return [IdentityTask(value, settings)]
    return [SafetyTask(settings)] if kind == "safety" else _of_file(kind, value, settings)


def _of_file(kind: str, value: str, settings: EvalSettings) -> list[Task[Any]]:
    path = Path(value).expanduser()
    if kind == "likelihood":
        if not path.exists():
            raise ConfigError(f"{path}: no such file")
        found = held_out(path)
        return [LikelihoodTask(f"likelihood/{found.benchmark}", found.items, settings, found.refused)]  # type: ignore[arg-type]
    sets = read_items(path, kind or None)  # type: ignore[arg-type]
    return [task for each in sets for task in _of_set(with_examples(each, settings.shots), settings)]


def _of_set(found: ItemSet, settings: EvalSettings) -> list[Task[Any]]:
    """A task for each kind of item in it."""
    choice = [item for item in found.items if isinstance(item, ChoiceItem)]
    exact = [item for item in found.items if isinstance(item, TextItem) and item.is_exact]
    text = [item for item in found.items if isinstance(item, TextItem) and not item.is_exact]
    sql = [item for item in found.items if isinstance(item, SqlItem)]
    makers: list[tuple[Any, list[Any]]] = [(ChoiceTask, choice), (BbhTask, exact), (TextTask, text), (SqlTask, sql)]
    kept = [(make, items) for make, items in makers if items] or [(ChoiceTask, [])]
    return [
        make(f"{make.kind}/{found.benchmark}", items, settings, found.refused if place == 0 else ())
        for place, (make, items) in enumerate(kept)
    ]


def _why(tasks: Sequence[Task[Any]]) -> str:
    reasons = [f"{count} x {code}" for task in tasks for code, count in task.refused.items()]
    reasons += [f"{task.num_examples} shown as examples" for task in tasks if task.num_examples]
    return ", ".join(reasons) or "no items"
