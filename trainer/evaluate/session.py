"""An evaluation from a name to a finished folder: which folder, which candidate, finished already or not."""

import asyncio
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.store.hashes import text_hash
from server.store.home import Home
from trainer.evaluate.candidate import Candidate
from trainer.evaluate.eval_folder import RESULT, differences_of, read_result
from trainer.evaluate.open_candidate import CandidateOptions, open_candidate
from trainer.evaluate.results import LASTING, EvalResult, TaskResult
from trainer.evaluate.run import GO_ON, evaluate, record_of
from trainer.evaluate.settings import EvalSettings
from trainer.evaluate.tasks.task import Task

EVALS = "evals"
_ODD = re.compile(r"[^\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Evaluated:
    result: EvalResult
    folder: Path
    was_finished: bool


def evaluate_name(
    name: str,
    tasks: Sequence[Task[Any]],
    home: Home,
    settings: EvalSettings,
    options: CandidateOptions,
    *,
    output: Path | None = None,
    again: bool = False,
    shows_progress: bool = True,
) -> Evaluated:
    """Evaluate into `output`, or into a folder of the home whose name says candidate, settings and files: the same
    evaluation comes to the same folder, and goes on there. `again` forgets what that folder holds.

    A finished evaluation is not repeated, unless the candidate is a URL that does not say which weights it serves; its
    items that could not be asked are asked again, and that is said.
    Raises as `open_candidate` and `trainer.evaluate.run.evaluate`.
    """

    async def run() -> Evaluated:
        async with open_candidate(name, home, options) as candidate:
            folder = output or home.path / EVALS / evaluation_id(candidate, tasks, settings)
            finished = _finished(folder, record_of(candidate, tasks, settings))
            anew = again or (finished is not None and not candidate.info.fingerprint)
            if finished is not None and not anew:
                num_failed = sum(_num_failed(task) for task in finished.tasks)
                if not num_failed:
                    return Evaluated(finished, folder, True)
                print(f"{num_failed} not answered on {finished.date}; asking again", file=sys.stderr)
            result = await evaluate(candidate, tasks, folder, settings, again=anew, shows_progress=shows_progress)
            return Evaluated(result, folder, False)

    try:
        return asyncio.run(run())
    except KeyboardInterrupt:
        print(f"what was answered is kept; {GO_ON}", file=sys.stderr)
        raise


def _num_failed(task: TaskResult) -> int:
    """Items that may be answered if they are asked again."""
    return sum(count for code, count in task.notes.get("errors", {}).items() if code not in LASTING)


def _finished(folder: Path, record: Mapping[str, Any]) -> EvalResult | None:
    """None also where the folder belongs to another evaluation, which is not to be forgotten."""
    is_finished = (folder / RESULT).exists() and not differences_of(folder, record)
    return read_result(folder) if is_finished else None


def evaluation_id(candidate: Candidate, tasks: Sequence[Task[Any]], settings: EvalSettings) -> str:
    """`qwen2-demo-1a2b3c4d5e6f`."""
    name = candidate.info.name.rstrip("/").replace("://", "-")
    short = _ODD.sub("-", name[-40:] if "/" in name else name).strip("-.")
    record = json.dumps(record_of(candidate, tasks, settings), sort_keys=True)
    return f"{short}-{text_hash(record)[:12]}"
