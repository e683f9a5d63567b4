"""One evaluation: every task's items asked of one candidate, written down as they come, and summed up at the end."""

import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tqdm import tqdm

import server
from trainer.evaluate.candidate import Candidate, CandidateChanged, CandidateLost
from trainer.evaluate.eval_folder import EvalFolder
from trainer.evaluate.items import Item
from trainer.evaluate.results import LASTING, EvalResult, ItemScore, TaskResult
from trainer.evaluate.settings import EvalSettings
from trainer.evaluate.tasks.task import Task

Done = Mapping[tuple[str, str], ItemScore]
GO_ON = "run the same command again to go on"
BACK_AGAIN = "they count only if the name means that again"
MIN_FAILED = 3  # of items, to say that it is not theirs
RULES = 2  # raised when prompts or scores change: figures by other rules are another evaluation's
_IDENTITY = ("name", "model", "adapter", "fingerprint", "sampling")
_LIBRARIES = ("torch", "transformers", "peft", "vllm", "tokenizers")


async def evaluate(
    candidate: Candidate,
    tasks: Sequence[Task[Any]],
    folder: Path,
    settings: EvalSettings,
    *,
    again: bool = False,
    shows_progress: bool = True,
) -> EvalResult:
    """Ask what `folder` does not hold yet, and write `result.json` there. `again` forgets what it holds.

    Raises DriftError when the folder belongs to another evaluation, ConfigError when another process has it, and
    CandidateLost when the candidate goes away or answers nothing of a task: what was answered is kept, and the same
    call goes on.
    """
    with EvalFolder(folder) as kept:
        before = kept.begin(record_of(candidate, tasks, settings), again=again)
        done = done_with(before)
        pending = {task.name: [i for i in task.items if (task.name, i.item_id) not in done] for task in tasks}
        if any(pending.values()):
            kept.reopen()
        total = sum(len(task.items) for task in tasks)
        meter = _Meter()
        with tqdm(total=total, initial=total - sum(map(len, pending.values())), disable=not shows_progress) as bar:

            def emit(score: ItemScore) -> None:
                kept.append(score)
                done[score.task, score.item_id] = score
                meter.add(score)
                bar.update()

            for task in tasks:
                bar.set_description(task.name)
                try:
                    await task.ask(candidate, pending[task.name], emit)
                except CandidateLost as error:
                    go_on = BACK_AGAIN if isinstance(error, CandidateChanged) else GO_ON
                    raise CandidateLost(
                        f"{error}. {len(done_with(done))} of {total} items are kept in {folder}; {go_on}"
                    ) from None
                _check_answered(candidate, task, pending[task.name], before, done)
        result = _result(candidate, tasks, done, settings, meter.figures())
        kept.finish(result)
        return result


def done_with(scores: Done) -> dict[tuple[str, str], ItemScore]:
    """Without those that failed for a reason that may pass."""
    return {key: one for key, one in scores.items() if not one.error_code or one.error_code in LASTING}


def _check_answered(candidate: Candidate, task: Task[Any], asked: Sequence[Item], before: Done, done: Done) -> None:
    """Raises CandidateLost when a URL answered nothing of what was asked now: that is no figure of the candidate. An
    engine of our own that answers nothing is: its model is broken, and a report has to say so.

    Items that failed `before` may do so again, beside others that were answered."""
    if candidate.info.kind != "url":
        return
    keys = [(task.name, item.item_id) for item in asked]
    failed = [key for key in keys if "error" in done[key].details]
    known = before if len(keys) < len(task.items) else {}
    if len(failed) < len(keys) or sum(key not in known for key in failed) < MIN_FAILED:
        return
    hint = "; for a model without a chat template try --plain" if task.settings.style == "auto" else ""
    raise CandidateLost(
        f"{candidate.info.name}: {task.name}: none of {len(keys)} items was answered "
        f"({done[failed[0]].details['error']}){hint}; the same command asks them again"
    )


def record_of(candidate: Candidate, tasks: Sequence[Task[Any]], settings: EvalSettings) -> dict[str, Any]:
    """All that decides the figures, and by which an unfinished evaluation is known again."""
    info = candidate.info
    return {
        "rules": RULES,
        "candidate": {field: getattr(info, field) for field in _IDENTITY},
        "settings": settings.as_dict(),
        "tasks": {task.name: {"items": len(task.items), "digest": task.digest} for task in tasks},
    }


class _Meter:
    """What this process asked, and how fast; items kept from before do not count."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._items = self._tokens = self._prompt_tokens = 0

    def add(self, score: ItemScore) -> None:
        self._items += 1
        self._tokens += int(score.details.get("num_tokens", 0)) if "finish_reason" in score.details else 0
        self._prompt_tokens += int(score.details.get("num_prompt_tokens", 0))

    def figures(self) -> dict[str, float]:
        seconds = max(time.perf_counter() - self._begin, 1e-9)
        return {
            "seconds": round(seconds, 3),
            "num_items": self._items,
            "items_per_s": round(self._items / seconds, 3),
            "tokens_per_s": round(self._tokens / seconds, 3),
            "prompt_tokens_per_s": round(self._prompt_tokens / seconds, 3),
        }


def _result(
    candidate: Candidate,
    tasks: Sequence[Task[Any]],
    done: Done,
    settings: EvalSettings,
    speed: dict[str, float],
) -> EvalResult:
    return EvalResult(
        candidate=candidate.info,
        tasks=tuple(_task_result(candidate, task, done) for task in tasks),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=f"{platform.node()}, {platform.machine()}, {os.cpu_count()} CPUs",
        versions={"qloop": server.__version__, "python": platform.python_version(), **_versions()},
        seed=settings.seed,
        settings=settings.as_dict(),
        speed=speed,
    )


def _task_result(candidate: Candidate, task: Task[Any], done: Done) -> TaskResult:
    """With the style in which it was asked, which `auto` leaves to the candidate."""
    found = task.result([done[task.name, item.item_id] for item in task.items])
    return replace(found, notes={**found.notes, "style": task.style(candidate)})


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
