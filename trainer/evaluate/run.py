"""One evaluation: every task's items asked of one candidate, written down as they come, and summed up at the end."""

import os
import platform
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tqdm import tqdm

import server
from trainer.evaluate.candidate import Candidate, CandidateLost
from trainer.evaluate.eval_folder import EvalFolder
from trainer.evaluate.results import EvalResult, ItemScore
from trainer.evaluate.settings import EvalSettings
from trainer.evaluate.tasks.task import Task

GO_ON = "run the same command again to go on"
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
    CandidateLost when the candidate goes away: what was answered is kept, and the same call goes on.
    """
    with EvalFolder(folder) as kept:
        done = kept.begin(record_of(candidate, tasks, settings), again=again)
        done = {key: score for key, score in done.items() if "error" not in score.details}
        pending = {task.name: [i for i in task.items if (task.name, i.item_id) not in done] for task in tasks}
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
                    raise CandidateLost(
                        f"{error}. {len(done)} of {total} items are kept in {folder}; {GO_ON}"
                    ) from None
        result = _result(candidate, tasks, done, settings, meter.figures())
        kept.finish(result)
        return result


def record_of(candidate: Candidate, tasks: Sequence[Task[Any]], settings: EvalSettings) -> dict[str, Any]:
    """All that decides the figures, and by which an unfinished evaluation is known again."""
    info = candidate.info
    return {
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
    done: dict[tuple[str, str], ItemScore],
    settings: EvalSettings,
    speed: dict[str, float],
) -> EvalResult:
    return EvalResult(
        candidate=candidate.info,
        tasks=tuple(task.result([done[task.name, item.item_id] for item in task.items]) for task in tasks),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=f"{platform.node()}, {platform.machine()}, {os.cpu_count()} CPUs",
        versions={"qloop": server.__version__, "python": platform.python_version(), **_versions()},
        seed=settings.seed,
        settings=settings.as_dict(),
        speed=speed,
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
