"""A comparison from names to three files: every candidate evaluated on the same tasks, paired, and written down."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from server.errors import ConfigError
from server.store.hashes import text_hash
from server.store.home import Home
from trainer.child_engine import find_trial
from trainer.compare.comparison import Candidate, Comparison, Role
from trainer.compare.differences import NUM_ANSWERS, make_comparison
from trainer.compare.folder import Evaluation, read_evaluation
from trainer.compare.report import write_report
from trainer.evaluate.open_candidate import CandidateOptions, check_url, is_url
from trainer.evaluate.session import evaluate_name
from trainer.evaluate.settings import EvalSettings
from trainer.evaluate.tasks.make import check_together, tasks_of
from trainer.evaluate.tasks.task import Task

REPORTS = "reports"
_ODD = re.compile(r"[^\w.-]+", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Request:
    """`candidates`, the base first, and `domain`, `general`, `others`, all as `eval` takes candidates and tasks."""

    candidates: Sequence[str]
    domain: Sequence[str] = ()
    general: Sequence[str] = ()
    others: Sequence[str] = ()
    settings: EvalSettings = field(default_factory=EvalSettings)
    options: CandidateOptions = field(default_factory=CandidateOptions)
    num_answers: int = NUM_ANSWERS


def compare(
    request: Request,
    home: Home,
    *,
    output: Path | None = None,
    language: str = "en",
    again: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Comparison, Path]:
    """Evaluate what is not evaluated yet, compare, and write the report into `output`, by default a folder of the home.

    Raises ConfigError, DataError, and what evaluating raises; an evaluation that was cut off goes on in the next call.
    """
    if len(request.candidates) < 2:
        raise ConfigError("compare: give the base and at least one other candidate")
    tasks, roles = _tasks(request)
    _check_names(request, home)
    evaluations = [_evaluate(name, tasks, request, home, again, say) for name in request.candidates]
    candidates = [
        Candidate(
            info=one.result.candidate, items_hash=one.items_hash, machine=one.result.machine, date=one.result.date
        )
        for one in evaluations
    ]
    comparison = make_comparison(
        evaluations, candidates, roles, seed=request.settings.seed, num_answers=request.num_answers
    )
    folder = output or home.path / REPORTS / _report_id(candidates, roles)
    folder.mkdir(parents=True, exist_ok=True)
    write_report(comparison, folder, language)
    return comparison, folder


def _tasks(request: Request) -> tuple[list[Task[Any]], dict[str, Role]]:
    """All tasks, and what those are evidence of that somebody said it of."""
    tasks: list[Task[Any]] = []
    roles: dict[str, Role] = {}
    given: list[tuple[Role | None, Sequence[str]]] = [
        ("domain", request.domain),
        ("general", request.general),
        (None, request.others),
    ]
    for role, specs in given:
        made = [task for spec in specs for task in tasks_of(spec, request.settings)]
        tasks += made
        if role is not None:
            roles |= {task.name: role for task in made}
    if not tasks:
        raise ConfigError("compare: nothing to ask; give --domain, --general or --task KIND=PATH")
    check_together(tasks, request.settings)
    return tasks, roles


def _check_names(request: Request, home: Home) -> None:
    """Every one is there, before the first of them takes its hours."""
    for name in request.candidates:
        if is_url(name):
            check_url(name)
        else:
            with TemporaryDirectory(prefix="qloop-") as work:
                find_trial(name, home, Path(work), request.options.base)


def _evaluate(
    name: str, tasks: Sequence[Task[Any]], request: Request, home: Home, again: bool, say: Callable[[str], None]
) -> Evaluation:
    say(f"evaluating {name}")
    done = evaluate_name(name, tasks, home, request.settings, request.options, again=again)
    if done.was_finished:
        say(f"{name} was evaluated already on {done.result.date}: {done.folder}")
    return read_evaluation(done.folder)


def _report_id(candidates: Sequence[Candidate], roles: Mapping[str, Role]) -> str:
    """`demo-against-base-1a2b3c4d`: the same answers in the same roles come to the same folder."""
    names = [_ODD.sub("-", Path(one.name.rstrip("/")).name).strip("-.") for one in candidates]
    evidence = [*(one.items_hash for one in candidates), *(f"{task} {role}" for task, role in sorted(roles.items()))]
    return f"{names[1]}-against-{names[0]}-{text_hash(chr(10).join(evidence))[:8]}"
